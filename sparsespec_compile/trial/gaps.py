"""How far each token of a text is from the model's favourite, beside how uncertain the model's own logits are.

In low precision two right programs round differently, and part where two tokens are about equally likely. So a token is
judged by HuggingFace's own logits over the text up to it, computed again in batches of other shapes and in float32.
What the runs differ by is noise of rounding. A right program's token can trail the favourite by twice that, once for
each program; a wrong program's token trails it by what separates likely tokens from others.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sparsespec_compile.kernels.reference.sampling import gumbel_noise

Logits = Callable[[Tensor, int], Iterator[Tensor]]
"""`logits(text, first)` gives float32 [n, V], piece by piece: the rows of a text int64 [tokens] from `first` on."""

_WIDENED = (torch.bfloat16, torch.float16, torch.float32)

_PROMPT_ROWS = 256
"""Rows in a pass over a prompt: their logits have to fit the memory."""


@dataclass(frozen=True)
class Gaps:
    """Of each generated token of a text; all float32 [tokens], on the CPU.

    Attributes:
        gap: by which the token trails the favourite. For a sampled text the favourite is that of its logits with the
            temperature times the noise that the text was drawn with; gaps are in units of logits.
        margin: between the two best tokens, likewise.
        noise: by which the computations are apart at most in the difference of the two best tokens' logits.
        own_noise: the same, of the favourite's and the token's, where that is more.
        ulp: distance to the next number of the model's dtype at the largest of these logits. Noise is at least that.
    """

    gap: Tensor
    margin: Tensor
    noise: Tensor
    own_noise: Tensor
    ulp: Tensor


@torch.no_grad()
def token_gaps(
    first: Logits,
    others: Sequence[Logits],
    text: Tensor,
    prompt_length: int,
    dtype: torch.dtype,
    temperature: float = 0.0,
    seed: int = 0,
) -> Gaps:
    """Measure the tokens of a text behind its prompt.

    Args:
        first: the logits that judge.
        others: the same, each computed otherwise; one at least.
        text: int64 [tokens], without padding.
        prompt_length: tokens that were given.
        dtype: that the model computes in.
        temperature: 0.0 = the text is greedy.
        seed: of the text, where it is sampled.
    """
    at, judged = prompt_length - 1, list[tuple[Tensor, ...]]()
    for logits in first(text[:-1], prompt_length - 1):
        following = text[at + 1 : at + 1 + len(logits)]
        score = _with_noise(logits, at + 1, temperature, seed)
        best = score.topk(2, dim=1)
        tokens = torch.cat([best.indices, following[:, None]], dim=1)
        own = score.gather(1, following[:, None])[:, 0]
        judged.append((tokens, logits.gather(1, tokens), best.values[:, 0] - own, best.values.diff(dim=1)[:, 0].neg()))
        at += len(logits)
    tokens, values, gap, margin = (torch.cat(parts) for parts in zip(*judged, strict=True))
    noise = of_token = torch.zeros(len(tokens), device=tokens.device)
    for other in others:
        again, row = list[Tensor](), 0
        for logits in other(text[:-1], prompt_length - 1):
            again.append(logits.gather(1, tokens[row : row + len(logits)]))
            row += len(logits)
        apart = values - torch.cat(again)
        noise = torch.maximum(noise, (apart[:, 0] - apart[:, 1]).abs())
        of_token = torch.maximum(of_token, (apart[:, 0] - apart[:, 2]).abs())
    ulp = values.abs().amax(dim=1) * torch.finfo(dtype).eps
    return Gaps(*(part.float().cpu() for part in (gap, margin, noise, torch.maximum(noise, of_token), ulp)))


def in_large_batches(model: PreTrainedModel) -> Logits:
    """The model's logits, a text by itself, many rows in a pass."""
    return lambda text, first: _passes(model, text, first, copies=1, rows=_PROMPT_ROWS)


def in_small_batches(model: PreTrainedModel) -> Logits:
    """The model's logits, two copies of a text side by side, a few rows in a pass, nearly as when it decodes."""
    return lambda text, first: _passes(model, text, first, copies=2, rows=8)


def in_float32(model: PreTrainedModel) -> Logits | None:
    """The model's logits in float32, a text by itself. None where they are that already, or cannot be had.

    A module's own weights are in float32 while it runs, so that little memory is needed. The model's are not touched.
    They cannot be had of quantised weights, nor where a module computes with the weights of another.
    """
    weights = list(model.parameters())
    if not all(type(one) is nn.Parameter and one.dtype in _WIDENED for one in weights):
        return None
    if all(one.dtype == torch.float32 for one in weights):
        return None

    def logits(text: Tensor, first: int) -> Iterator[Tensor]:
        with _computing_in_float32(model):
            yield from _passes(model, text, first, copies=1, rows=_PROMPT_ROWS)

    try:
        list(logits(torch.zeros(1, dtype=torch.int64, device=model.device), 0))
    except RuntimeError:  # of types that do not go together
        return None
    return logits


@contextmanager
def _computing_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a module with weights has float32 ones from before its `forward` to after it."""
    held = dict[nn.Module, list[tuple[dict[str, Any], str, Tensor]]]()

    def widen(module: nn.Module, *_: object) -> None:
        held[module] = own = []
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    own.append((tensors, name, tensor))
                    wide = tensor.detach().float()
                    tensors[name] = nn.Parameter(wide, False) if tensors is module._parameters else wide

    def restore(module: nn.Module, *_: object) -> None:
        for tensors, name, tensor in held.pop(module, ()):
            tensors[name] = tensor

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield


def _passes(model: PreTrainedModel, text: Tensor, first: int, copies: int, rows: int) -> Iterator[Tensor]:
    # transformers renames the argument: past_key_values, which some versions warn of, becomes cache.
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    cache, at = {name: DynamicCache(config=model.config)}, 0
    given = text[None].expand(copies, -1)
    while at < len(text):
        end = min(at + _PROMPT_ROWS, first) if at < first else at + rows
        logits = model(given[:, at:end], use_cache=True, **cache).logits[0]
        if at >= first:
            yield logits.float()
        at = end


def _with_noise(logits: Tensor, position: int, temperature: float, seed: int) -> Tensor:
    """What the drawn token has most of, times the temperature, for rows that draw from `position` on."""
    if not temperature:
        return logits
    positions = torch.arange(position, position + len(logits), device=logits.device)
    return logits + temperature * gumbel_noise(torch.full_like(positions, seed), positions, logits.shape[1])


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts differ, or at which one of them ends; None = they are equal."""
    for place, (token, others) in enumerate(zip(one, other, strict=False)):
        if token != others:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))
