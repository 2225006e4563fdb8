"""Launcher of the Triton attention: a kernel that writes K/V, attends and gives out scores of verifications, and one
for other scores, which follows where a step may ask for them.

The grid follows from the device and the tile sizes alone and nothing is read back, so a call can be captured in a CUDA
graph and replayed with other lengths, modes and pages.

Programs of a launch meet in a workspace: parts of split units, and counters of them.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..checks import check_attention
from ..launch import Promise, counters, device_limits, kind_of_step, present_promise
from ..ops import AttentionCall, AttentionSettings, StepTensors, scored_rows_at_most
from ..tuning.tiling import BIG_JOIN_M, SMALL_JOIN_M, Layer, Tiling, padded, parts_together, small_tile, tiling_for
from .kernel import attention_kernel
from .scores import score_kernel
from .tiles import LOG2_E

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dual_mode_attention(*arguments: Any, tiling: Tiling | None = None) -> Tensor:
    """Drafting, verifying and prefilling rows in one call; see ``kernels.ops``. float16, bfloat16 and float32.

    ``tiling`` None chooses tiles by shapes and device. Equal calls give equal bits. How units of work are split depends
    on all of a step, so the last bits of a request's rows may depend on its company.
    """
    call = AttentionCall.of(arguments)
    call = call._replace(step=StepTensors(*(tensor.contiguous() for tensor in call.step)))
    check_attention(call, TRITON_DTYPES)
    q, scale = call.q, call.settings.scale
    if scale <= 0:
        # The kernel takes the largest product for the largest logit.
        q, scale = q * math.copysign(1.0, scale) if scale else torch.zeros_like(q), abs(scale) or 1.0
    call = call._replace(q=q, settings=call.settings._replace(scale=scale))
    out = q.new_empty(q.shape[0], q.shape[1], call.v.shape[2])
    if q.shape[0] == 0:
        return out
    tensors = {"k": call.k, "v": call.v, "kv": call.kv, "scores": call.scores, "pillar_index": call.pillar_index}
    of_heads = {"sinks": call.sinks, "HAS_SINKS": call.sinks is not None}
    settings = _settings(call.settings, q.dtype)
    given = {"q": q, "out": out, **tensors, **of_heads, **call.step._asdict(), **_sizes(call), **settings}
    layer = Layer(q.shape[1] // call.k.shape[1], q.shape[2], call.v.shape[2], q.dtype, call.kv.shape[2])
    kind = kind_of_step(q.shape[0], q.shape[1], call.step.request_mode.shape[0])
    with torch.cuda.device_of(q):
        tiling = tiling or tiling_for(layer, kind, device_limits(q.device))
        if present_promise() >= Promise.NO_SCORES:
            tiling = replace(tiling, scored_ahead=0)
        _launch(given, layer, tiling)
    return out


def _launch(arguments: dict[str, Any], layer: Layer, tiling: Tiling) -> None:
    device = arguments["q"].device
    limits = device_limits(device)
    programs = limits.multiprocessors * tiling.programs_per_sm
    small_m = small_tile(layer.group)
    arguments |= {
        "counters": counters(device, programs),
        "parts": parts(device, programs, max(small_m, tiling.big_m) * (layer.value_dim + 2)),
        "SMALL_M": small_m,
        "BIG_M": tiling.big_m,
        "SMALL_ROWS_PAD": triton.next_power_of_2(small_m // layer.group),
        # A tile attends to these rows as it has loaded them; products sum over 16 at least.
        "BIG_ROWS_PAD": max(16, triton.next_power_of_2(tiling.big_m // layer.group)),
        "BLOCK_N": tiling.block_n,
        "BIG_N": tiling.big_n,
        "SMALL_AHEAD": tiling.small_ahead,
        "BIG_AHEAD": tiling.big_ahead,
        "SCORED_AHEAD": tiling.scored_ahead,
        "SMALL_JOIN_M": SMALL_JOIN_M,
        "SMALL_JOIN_PARTS": parts_together(SMALL_JOIN_M, layer, tiling.num_warps),
        "BIG_JOIN_M": BIG_JOIN_M,
        "BIG_JOIN_PARTS": parts_together(BIG_JOIN_M, layer, tiling.num_warps),
        "UNIT_OVERHEAD": tiling.unit_overhead,
        "SCORED_OVERHEAD": tiling.scored_overhead,
        "PART_COST": tiling.part_cost,
    }
    options = {"num_warps": tiling.num_warps, "maxnreg": tiling.registers}
    for kernel in (attention_kernel, score_kernel) if _leaves_scores(layer, tiling) else (attention_kernel,):
        kernel[(programs,)](**{name: arguments[name] for name in kernel.arg_names}, **options)


def _leaves_scores(layer: Layer, tiling: Tiling) -> bool:
    """Whether a step may ask for scores that the attention kernel does not give out."""
    if present_promise() is Promise.ONLY_VERIFICATIONS_SCORED:
        return tiling.scored_ahead == 0 or tiling.big_m // layer.group < scored_rows_at_most(layer.group)
    return present_promise() is Promise.NOTHING


def _sizes(call: AttentionCall) -> dict[str, int]:
    """Sizes and strides as the kernel names them."""
    q, k, v, kv = call.q, call.k, call.v, call.kv
    requests = call.step.request_mode.shape[0]
    return {
        "requests": requests,
        "rows": q.shape[0],
        "kv_heads": k.shape[1],
        **_strides("q", q, "row", "head"),
        **_strides("k", k, "row", "head"),
        **_strides("v", v, "row", "head"),
        "stride_head": kv.stride(1),
        **pool_units(kv),
        "stride_table": call.step.page_table.stride(0),
        **_strides("score", call.scores, "slot", "head"),
        **_strides("pillar", call.pillar_index, "request", "head"),
        "GROUP": q.shape[1] // k.shape[1],
        "KEY_DIM": q.shape[2],
        "VALUE_DIM": v.shape[2],
        "KEY_PAD": padded(q.shape[2]),
        "VALUE_PAD": padded(v.shape[2]),
        "PAGE_SIZE": kv.shape[2],
        # Few numbers of slots deserve a kernel of their own.
        "REQUESTS": max(64, triton.next_power_of_2(max(requests, 1))),
    }


def pool_units(kv: Tensor) -> dict[str, int]:
    """What pages and tokens are counted in; see ``tiles.pool_pointers``."""
    unit = math.gcd(kv.stride(0), kv.stride(2))
    page_units = kv.stride(0) // unit
    return {
        "page_units": page_units,
        "UNIT": unit,
        "TOKEN_UNITS": kv.stride(2) // unit,
        "WIDE_UNITS": kv.shape[0] * page_units >= 2**31,
    }


def _strides(prefix: str, tensor: Tensor, first: str, second: str) -> dict[str, int]:
    return {f"stride_{prefix}_{first}": tensor.stride(0), f"stride_{prefix}_{second}": tensor.stride(1)}


def _settings(settings: AttentionSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Scale and soft-cap as ``tiles.products`` takes them."""
    scale, window, softcap, chunked = settings
    log2_e = LOG2_E.value
    return {
        "window": window,
        "logit_scale": 2.0 * scale * log2_e / softcap if softcap else scale * log2_e,
        "cap": softcap * log2_e,
        "HAS_WINDOW": window > 0,
        "CHUNKED": chunked,
        "HAS_SOFTCAP": softcap > 0,
        # Float32 products on tensor cores would be rounded to 10 bits.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def parts(device: torch.device, programs: int, part_elements: int) -> Tensor:
    """float32 [programs, 2, part_elements], uninitialised; belongs to the call."""
    return torch.empty(programs, 2, part_elements, dtype=torch.float32, device=device)
