"""A transformer of a few lines on the dual-mode op, so that the runtime is tested without a compiler or HuggingFace."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.ops import STEP_TENSORS, draw_tokens, quantised_product
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.build import Target
from sparsespec_compile.runtime.device.interface import Device
from sparsespec_compile.runtime.device.sampling import DrawParams, SamplingRows
from sparsespec_compile.runtime.device.state import State
from sparsespec_compile.runtime.device.weights import DraftCopies, DraftGraph
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.iteration_times import IterationTime
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.session import Session

_DECODED: dict[tuple[object, ...], list[int]] = {}
"""Texts as far as `Toy.decode` has computed them: by windows, weights, sampling settings and prompt."""

HIDDEN, Q_HEADS, KV_HEADS, HEAD, VOCABULARY = 32, 4, 2, 8, 37

Product = Callable[[Tensor, Tensor], Tensor]
"""Rows times a weight [N, K]."""


@dataclass
class Toy:
    """Random weights, attention with learned-free sinusoidal positions, a window for each layer, sliding or chunked."""

    windows: tuple[int, ...] = (0, 0)
    chunked: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 1.5 / math.sqrt(shape[0])

        self.embedding = weight(VOCABULARY, HIDDEN) * math.sqrt(VOCABULARY)
        self.qkv = [weight(HIDDEN, (Q_HEADS + 2 * KV_HEADS) * HEAD).t().contiguous() for _ in self.windows]
        self.out = [weight(Q_HEADS * HEAD, HIDDEN).t().contiguous() for _ in self.windows]
        self.head = weight(HIDDEN, VOCABULARY).t().contiguous()

    def layout(self, page_size: int) -> KVLayout:
        layers = [
            AttentionLayer(i, Q_HEADS, KV_HEADS, HEAD, HEAD, HEAD**-0.5, window, 0.0, self.chunked and window > 0)
            for i, window in enumerate(self.windows)
        ]
        return KVLayout(tuple(layers), page_size)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        frequency = torch.exp(-torch.arange(0, HIDDEN, 2) * math.log(1000.0) / HIDDEN)
        angle = positions[:, None] * frequency
        return self.embedding[tokens] + torch.cat([angle.sin(), angle.cos()], dim=1)

    def _project(self, layer: int, hidden: Tensor, product: Product = linear) -> tuple[Tensor, ...]:
        normal = torch.nn.functional.layer_norm(hidden, (HIDDEN,))
        parts = product(normal, self.qkv[layer]).split([Q_HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], dim=1)
        return tuple(part.unflatten(1, (-1, HEAD)) for part in parts)

    def forward(self, page_size: int, product: Product = linear):
        layout = self.layout(page_size)

        def run(input_ids, position_ids, logits_to_keep, pool, scores, pillar_index, *step):
            hidden = self._embed(input_ids[0], position_ids[0])
            place = STEP_TENSORS.index("page_table")
            steps = [(*step[:place], table, *step[place + 1 :]) for table in step[place]]
            for i, layer in enumerate(layout.layers):
                q, k, v = self._project(i, hidden, product)
                start = layout.page_offset(i)
                kv = pool[:, start : start + layout.page_elements(i)].view(-1, KV_HEADS, page_size, 2 * HEAD)
                heads = slice(layout.head_offset(i), layout.head_offset(i) + KV_HEADS)
                mixed = torch.ops.sparsespec.dual_mode_attention(
                    q,
                    k,
                    v,
                    kv,
                    scores[:, heads],
                    *steps[layout.group_of(i)],
                    pillar_index[:, heads],
                    layer.scale,
                    layer.window,
                    0.0,
                    layer.chunked,
                    None,
                )
                hidden = hidden + product(mixed.flatten(1), self.out[i])
            return product(torch.nn.functional.layer_norm(hidden[logits_to_keep], (HIDDEN,)), self.head)[None]

        return run

    def drafts(self, page_size: int) -> DraftGraph:
        """The form that reads 8-bit copies, which have no memory yet."""
        copies = {}
        for weight in (*self.qkv, *self.out, self.head):
            values = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), dtype=torch.float32)
            for value in values:
                value.untyped_storage().resize_(0)
            copies[weight] = values

        def product(rows: Tensor, weight: Tensor) -> Tensor:
            return quantised_product(rows, *copies[weight])

        held = DraftCopies([(weight, *values, True) for weight, values in copies.items()], "int8")
        return DraftGraph(self.forward(page_size, product), held, required=True, settled=lambda _: None)

    def engine(self, device: Device | None = None, iteration_time: IterationTime | None = None, **settings) -> Engine:
        config = SpecConfig(**{"draft_tokens": 8, **settings})
        target = Target(
            self.forward(config.page_size),
            self.layout(config.page_size),
            torch.float32,
            torch.device("cpu"),
            weights=(self.embedding, self.head, *self.qkv, *self.out),
            drafts=self.drafts(config.page_size) if config.draft_weights == "int8" else None,
            iteration_time=iteration_time,
        )
        return Engine(target, config, device)

    def logits(self, tokens: list[int]) -> Tensor:
        """Last row's logits by dense attention over the whole sequence: no cache, no op, no pages."""
        positions = torch.arange(len(tokens))
        hidden = self._embed(torch.tensor(tokens), positions)
        for i, window in enumerate(self.windows):
            q, k, v = (part.transpose(0, 1) for part in self._project(i, hidden))
            distance = positions[:, None] - positions
            if self.chunked and window:
                seen = (distance >= 0) & (positions[:, None] // window == positions // window)
            else:
                seen = (distance >= 0) & ((distance < window) if window else True)
            group = Q_HEADS // KV_HEADS
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            weights = (q @ k.transpose(1, 2) * HEAD**-0.5).masked_fill(~seen, -math.inf).softmax(-1)
            hidden = hidden + linear((weights @ v).transpose(0, 1).flatten(1), self.out[i])
        return linear(torch.nn.functional.layer_norm(hidden[-1], (HIDDEN,)), self.head)

    def decode(self, request: Request) -> list[int]:
        """The text that decoding token by token gives a request. Of equal weights nothing is computed twice."""
        p = request.params
        values = (p.temperature, p.top_k, p.top_p, p.min_p, p.seed)
        key = self.windows, self.chunked, self._contents(), *values, *request.prompt
        rows = SamplingRows(*(torch.tensor([value]) for value in values))
        known, output = _DECODED.get(key, []), []
        while len(output) < request.max_new_tokens and not (output and output[-1] in request.stop_tokens):
            if len(output) == len(known):
                text = [*request.prompt, *known]
                token = int(draw_tokens(self.logits(text)[None], *rows, torch.tensor([len(text)])))
                known = _DECODED[key] = [*known, token]  # a list of its own, as other threads may read the last
            output.append(known[len(output)])
        return output

    def _contents(self) -> bytes:
        """Tells weights from others."""
        weights = (self.embedding, self.head, *self.qkv, *self.out)
        return sha256(b"".join(weight.numpy().tobytes() for weight in weights)).digest()


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def requests_of(lengths, new_tokens, stop_tokens=(), **params) -> list[Request]:
    return [
        Request(prompt, new_tokens, DrawParams(**params, **({"seed": i + 7} if params else {})), frozenset(stop_tokens))
        for i, prompt in enumerate(prompts(*lengths))
    ]


@contextmanager
def stepping(engine: Engine, requests: Sequence[Request]) -> Iterator[Session]:
    """The engine's session with these requests in it, to be advanced by hand; leaving it drops what is unfinished."""
    with engine.client() as client:
        client.submit(requests)
        yield engine._session


def state_of(engine: Engine) -> State:
    """The engine's state on the device."""
    return engine._session.state


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for _ in engine.run(requests):
        pass
    return [request.output for request in requests]
