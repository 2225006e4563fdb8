"""Steps to measure kernels on, and their timing.

A step is random tensors of any shape, made on the device, on shuffled pages of one pool. Calls are timed as a captured
step makes them: in a CUDA graph, each on its own inputs, medians of its replays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..launch import Promise
from ..ops import STEP_TENSORS, AttentionCall, AttentionSettings, Mode, StepTensors

Call = Callable[[], object]


@dataclass(frozen=True)
class Heads:
    """An attention layer as a step sees it."""

    q_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16

    @property
    def token_bytes(self) -> int:
        """Bytes that the key and the value of a token take over all KV heads."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True)
class Work:
    """What a request does: ``rows`` rows behind ``cached`` tokens; a draft reads ``pillars`` of them and its own row.

    With ``scored`` a request gives out scores, which a verification measures by ``pillars`` and its own rows.
    """

    mode: Mode
    cached: int
    rows: int = 1
    pillars: int = 0
    scored: bool = False

    def tokens_read(self) -> int:
        """Cached tokens that the request needs for each KV head."""
        return self.pillars if self.mode == Mode.DRAFT else self.cached


@dataclass
class Step:
    """One call of the attention op."""

    heads: Heads
    work: list[Work]
    tensors: dict[str, Tensor]

    def arguments(self) -> tuple[object, ...]:
        """The op's arguments, in order."""
        given = self.tensors
        step = StepTensors(*(given[name] for name in STEP_TENSORS))
        settings = AttentionSettings(scale=self.heads.key_dim**-0.5, window=0, softcap=0.0)
        tensors = {name: given[name] for name in ("q", "k", "v", "kv", "scores", "pillar_index")}
        return AttentionCall(**tensors, step=step, settings=settings).arguments()

    def promise(self) -> Promise:
        """The promise that an engine would make for such a step."""
        scored = {item.mode for item in self.work if item.scored}
        if scored:
            return Promise.NOTHING if Mode.PREFILL in scored else Promise.ONLY_VERIFICATIONS_SCORED
        small = all(item.rows == 1 or item.mode == Mode.DRAFT for item in self.work)
        return Promise.SMALL_TILES if small else Promise.NO_SCORES

    def fewest_bytes(self) -> int:
        """Bytes that any kernel must move: each key and value read once, the step's own rows in and out."""
        rows = sum(work.rows for work in self.work)
        queries = rows * self.heads.q_heads * (self.heads.key_dim + self.heads.value_dim) * self.heads.dtype.itemsize
        read = sum(work.tokens_read() for work in self.work)
        scores = sum(4 * self.heads.kv_heads * work.cached for work in self.work if work.scored)
        return (read + 2 * rows) * self.heads.token_bytes + queries + scores


def make_step(heads: Heads, work: list[Work], device: torch.device, seed: int = 0) -> Step:
    """A step of ``work`` in slot order, with random values, pages and pillars (ascending, each KV head its own)."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = sum(item.rows for item in work)
    pages = [-(-(item.cached + item.rows) // heads.page_size) for item in work]
    counts = {
        "request_mode": [int(item.mode) for item in work],
        "row_start": [sum(item.rows for item in work[:b]) for b in range(len(work))],
        "row_count": [item.rows for item in work],
        "cached_length": [item.cached for item in work],
        "score_rows": [item.rows if item.scored else 0 for item in work],
        "score_slot": list(range(len(work))),
        "pillar_count": [item.pillars for item in work],
        "recent_start": [item.cached for item in work],
    }
    tensors = {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in counts.items()}
    # Without pillars, the denominator of a verification's scores covers all positions.
    whole = (tensors["pillar_count"] == 0) & (tensors["request_mode"] != Mode.DRAFT)
    tensors["recent_start"].masked_fill_(whole, 0)
    tensors["page_table"] = _shuffled_pages(pages, generator)
    longest = max(item.cached + item.rows for item in work)
    tensors["scores"] = torch.empty(len(work), heads.kv_heads, longest, dtype=torch.float32, device=device)
    tensors["pillar_index"] = _pillars(work, heads.kv_heads, generator)
    width = heads.key_dim + heads.value_dim
    tensors["kv"] = _normal((sum(pages), heads.kv_heads, heads.page_size, width), heads.dtype, generator)
    tensors["q"] = _normal((rows, heads.q_heads, heads.key_dim), heads.dtype, generator)
    tensors["k"] = _normal((rows, heads.kv_heads, heads.key_dim), heads.dtype, generator)
    tensors["v"] = _normal((rows, heads.kv_heads, heads.value_dim), heads.dtype, generator)
    return Step(heads, work, tensors)


def _normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(size, dtype=dtype, device=generator.device).normal_(generator=generator)


def _shuffled_pages(pages: list[int], generator: torch.Generator) -> Tensor:
    shuffled = torch.randperm(sum(pages), generator=generator, device=generator.device).int()
    table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32, device=generator.device)
    for b, part in enumerate(shuffled.split(pages)):
        table[b, : len(part)] = part
    return table


def _pillars(work: list[Work], kv_heads: int, generator: torch.Generator) -> Tensor:
    most = max(1, max(item.pillars for item in work))
    index = torch.full((len(work), kv_heads, most), -1, dtype=torch.int32, device=generator.device)
    for b, item in enumerate(work):
        if item.pillars:
            rank = torch.rand(kv_heads, item.cached, generator=generator, device=generator.device)
            index[b, :, : item.pillars] = rank.topk(item.pillars).indices.sort().values.int()
    return index


def replay_ms(calls: Sequence[Call], repeats: int = 30, warm_up: int = 3) -> float:
    """Median milliseconds of one of ``calls``, which run one after the other in one graph.

    Give calls that do the same work on inputs of their own, together larger than the L2 cache, so that each finds
    nothing of its inputs there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(_timed(graph.replay, repeats, warm_up)) / len(calls)


def _timed(run: Callable[[], None], repeats: int, warm_up: int) -> list[float]:
    """Milliseconds of each run, by device events."""
    for _ in range(warm_up):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in marks]
