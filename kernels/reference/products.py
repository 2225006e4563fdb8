"""Products with 8-bit weights and experts in plain torch: the oracle of the Triton kernels, and the CPU's own.

Values of experts are rounded where transformers' own experts (`grouped_mm`) round them, in the same order of sums, so
that texts in float32 are the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_experts, check_fp8_product, check_quantise, check_quantised_product
from ..ops import LARGEST, SMALLEST, ExpertsCall, ExpertsSettings, unpaired

_CHUNK_ELEMENTS = 2**22
"""Weights that are widened at a time."""


@torch.no_grad()
def quantised_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x @ (weight * scale[:, None]).T`` in float32, rounded to x's dtype; see ``kernels.ops``."""
    check_quantised_product(x, weight, scale)
    columns, inner = weight.shape
    out = x.new_empty(*x.shape[:-1], columns)
    wide = x.float()
    step = max(1, _CHUNK_ELEMENTS // max(inner, 1))
    for start in range(0, columns, step):
        part = slice(start, start + step)
        out[..., part] = functional.linear(wide, unpaired(weight[part]).float()) * scale[part]
    return out


@torch.no_grad()
def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32, rounded to bfloat16; see ``kernels.ops``."""
    check_fp8_product(x, weight)
    return functional.linear(x.float(), weight.float()).bfloat16()


@torch.no_grad()
def quantise_rows(weight: Tensor, out_weight: Tensor, out_scale: Tensor, paired: bool = True) -> None:
    """Write a weight's 8-bit form; see ``kernels.ops``."""
    check_quantise(weight, out_weight, out_scale)
    columns, inner = weight.shape
    if not weight.numel():
        out_scale.zero_()
        return
    largest = LARGEST[out_weight.dtype]
    step = max(1, _CHUNK_ELEMENTS // inner)
    for start in range(0, columns, step):
        part = slice(start, start + step)
        wide = weight[part].float()
        wide = torch.where(wide.isfinite(), wide, 0.0)
        magnitude = wide.abs().amax(dim=1)
        kept = magnitude >= SMALLEST
        out_scale[part] = torch.where(kept, magnitude / largest, 0.0)
        units = wide * torch.where(kept, largest / magnitude, 0.0)[:, None]
        if not out_weight.is_floating_point():
            units = units.round()
        units.clamp_(-largest, largest)
        if paired:
            units = units.view(-1, 2, inner // 2).transpose(1, 2).reshape(-1, inner)
        out_weight[part] = units.to(out_weight.dtype)


@torch.no_grad()
def experts_site(*arguments: Any) -> Tensor:
    """What a layer of experts computes; see ``kernels.ops``."""
    *given, transposed = arguments
    call = ExpertsCall.of(given)
    if transposed:
        call = call._replace(up=call.up.transpose(1, 2), down=call.down.transpose(1, 2))
    return experts(*call.arguments())


@torch.no_grad()
def experts(*arguments: Any) -> Tensor:
    """Each row by the experts that it chose; see ``kernels.ops``."""
    call = ExpertsCall.of(arguments)
    check_experts(call)
    rows, chosen = call.choice.shape
    count, columns, width = call.up.shape
    index = call.choice.reshape(-1)
    # Rows that choose no expert stand behind all others, and are zeros.
    index = torch.where((index >= 0) & (index < count), index, count)
    order = index.argsort(stable=True)
    sorted_index = index[order]
    ends = torch.searchsorted(sorted_index, torch.arange(count, device=index.device), right=True).tolist()
    taken = ends[-1] if ends else 0
    experts_of_rows = sorted_index[:taken]
    projected = _by_expert(call.x[order[:taken] // chosen], call.up, ends)
    if call.up_bias is not None:
        projected.add_(call.up_bias[experts_of_rows])
    hidden = (
        gated(projected, call.settings) if columns == 2 * call.down.shape[2] else activated(projected, call.settings)
    )
    made = _by_expert(hidden, call.down, ends)
    if call.down_bias is not None:
        made.add_(call.down_bias[experts_of_rows])
    weighted = made * call.weight.reshape(-1)[order[:taken], None]
    placed = weighted.new_zeros(rows * chosen, width)
    placed[order[:taken]] = weighted
    return placed.view(rows, chosen, width).sum(dim=1).to(call.x.dtype)


def _by_expert(rows: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
    """The rows of each expert, which lie together and end at `ends`, by its matrix [columns, inner]."""
    out = rows.new_empty(len(rows), matrices.shape[1])
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            torch.mm(rows[start:end], matrices[expert].t(), out=out[start:end])
        start = end
    return out


def gated(projected: Tensor, settings: ExpertsSettings) -> Tensor:
    """Gate and up [.., 2 I], in halves or in turn, to [.., I]."""
    if settings.interleaved:
        gate, up = projected[..., ::2], projected[..., 1::2]
    else:
        gate, up = projected.chunk(2, dim=-1)
    if settings.limit:
        gate, up = gate.clamp(max=settings.limit), up.clamp(min=-settings.limit, max=settings.limit)
    return activated(gate, settings) * (up + settings.shift if settings.shift else up)


def activated(x: Tensor, settings: ExpertsSettings) -> Tensor:
    """The activation of each element."""
    match settings.activation:
        case "silu":
            return functional.silu(x)
        case "swish":
            return x * torch.sigmoid(x * settings.alpha)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case _:
            return functional.relu(x).square()
