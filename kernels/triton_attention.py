"""Launcher of the Triton attention: writes K/V, attends, gives out scores.

Grids follow from shapes and settings alone and nothing is read back, so a call can be captured in a CUDA graph and
replayed with other lengths, modes and pages.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .checks import check_attention
from .ops import STEP_TENSORS
from .triton_attend import attention_kernel
from .triton_scores import score_kernel
from .triton_write import write_kernel

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a launch: BLOCK_M (row, query head) pairs by BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tiling(group: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Tiling:
    """Tiles that hold at least one row of a KV head's query heads and stay within registers and shared memory."""
    token_bytes = (_padded(key_dim) + _padded(value_dim)) * dtype.itemsize
    single = dtype == torch.float32
    block_m = 16 if single or token_bytes > 512 else 64
    return Tiling(
        block_m=max(block_m, _padded(group)),
        block_n=32 if token_bytes <= 1024 else 16,
        num_warps=8 if single or group > 64 else 4,
        num_stages=2,
    )


def dual_mode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    scores: Tensor,
    request_mode: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    cached_length: Tensor,
    page_table: Tensor,
    score_rows: Tensor,
    score_slot: Tensor,
    pillar_count: Tensor,
    recent_start: Tensor,
    pillar_index: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Drafting, verifying and prefilling rows in one call; see ``kernels.ops``. float16, bfloat16 and float32."""
    given = (request_mode, row_start, row_count, cached_length, page_table, score_rows, score_slot, pillar_count)
    step = {name: tensor.contiguous() for name, tensor in zip(STEP_TENSORS, (*given, recent_start), strict=True)}
    check_attention(q, k, v, kv, scores, step, pillar_index, (scale, window, softcap), TRITON_DTYPES)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    if q.shape[0] == 0:
        return out
    arguments = {
        **{"q": q, "k": k, "v": v, "kv": kv, "scores": scores, "pillar_index": pillar_index, "out": out, **step},
        "lse": torch.empty(q.shape[:2], dtype=torch.float32, device=q.device),
        **_sizes(q, k, v, kv, scores, step, pillar_index),
        **_settings(scale, window, softcap, q.dtype),
    }
    tiling = choose_tiling(q.shape[1] // k.shape[1], q.shape[2], v.shape[2], q.dtype)
    with torch.cuda.device_of(q):
        _launch_all(arguments, tiling)
    return out


def _launch_all(arguments: dict[str, Any], tiling: Tiling) -> None:
    rows, q_heads = arguments["lse"].shape
    requests, (_, kv_heads, positions) = arguments["requests"], arguments["scores"].shape
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    arguments = {**arguments, "BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n}
    _launch(write_kernel, (rows, kv_heads), arguments, {})
    # Every request has at most one tile that is not full.
    tiles = rows // (tiling.block_m // (q_heads // kv_heads)) + min(requests, rows)
    _launch(attention_kernel, (tiles, kv_heads), arguments, options)
    if positions and requests:
        _launch(score_kernel, (triton.cdiv(positions, tiling.block_n), kv_heads, requests), arguments, options)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
    """Start a kernel with those of the arguments that it names."""
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **options)


def _sizes(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, scores: Tensor, step: dict[str, Tensor], pillar_index: Tensor
) -> dict[str, int]:
    """Sizes and strides as the kernels name them."""
    requests = step["request_mode"].shape[0]
    group = q.shape[1] // k.shape[1]
    return {
        "requests": requests,
        **_strides("q", q, "row", "head"),
        **_strides("k", k, "row", "head"),
        **_strides("v", v, "row", "head"),
        "stride_page": kv.stride(0),
        "stride_head": kv.stride(1),
        "stride_slot": kv.stride(2),
        "stride_table": step["page_table"].stride(0),
        **_strides("score", scores, "slot", "head"),
        **_strides("pillar", pillar_index, "request", "head"),
        "GROUP": group,
        "KEY_DIM": q.shape[2],
        "VALUE_DIM": v.shape[2],
        "PAGE_SIZE": kv.shape[2],
        "GROUP_PAD": triton.next_power_of_2(group),
        "KEY_PAD": _padded(q.shape[2]),
        "VALUE_PAD": _padded(v.shape[2]),
        "REQUESTS": triton.next_power_of_2(max(requests, 1)),
    }


def _strides(prefix: str, tensor: Tensor, first: str, second: str) -> dict[str, int]:
    return {f"stride_{prefix}_{first}": tensor.stride(0), f"stride_{prefix}_{second}": tensor.stride(1)}


def _settings(scale: float, window: int, softcap: float, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "HAS_WINDOW": window > 0,
        "HAS_SOFTCAP": softcap > 0,
        # Float32 products on tensor cores would be rounded to 10 bits.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _padded(size: int) -> int:
    """The power of two that a tile's dimension of this size takes; a dot takes 16 at least."""
    return max(16, triton.next_power_of_2(size))
