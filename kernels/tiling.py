"""Tile sizes of the attention kernel: what they mean, and a choice for any layer and device that works untuned."""

from dataclasses import dataclass

import torch
import triton

from .device import DeviceLimits
from .ops import SCORED_PAIRS

LARGE_STEP_PAIRS = 16384
LARGE_STEP_ROWS = 16
"""Packed (row, query head) pairs, and rows for each request slot, from which on a step is taken for one that prefills:
computing bounds it, not memory. A step in which all slots verify has fewer rows for each."""

_REGISTERS = 65536
"""Of a multiprocessor, on all NVIDIA GPUs from Ampere on."""

_RESERVED = 1024
"""Bytes of shared memory that a program takes besides its tiles; the compiler's exchanges take about as many."""


@dataclass(frozen=True)
class Layer:
    """What of an attention layer decides on its tiles."""

    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    page_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes that key and value of a token take in shared memory."""
        return (padded(self.key_dim) + padded(self.value_dim)) * self.dtype.itemsize


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut up.

    Attributes:
        big_m: (row, query head) pairs of a tile of verifying or prefilling rows, a power of two; what fits one takes a
            tile of 16 pairs, or of a group if that is larger.
        block_n: keys of a block of small tiles, a power of two; work is shared out in such blocks.
        big_n: keys that a large tile takes at a time, a power of two up to block_n.
        num_warps: warps of a program.
        small_ahead: blocks of keys and values that are on their way at a time, for tiles of drafts and plain decoding.
        big_ahead: the same for large tiles.
        scored_ahead: the same for large tiles that give out scores, which take block_n keys at a time.
        programs_per_sm: programs that share a multiprocessor.
        unit_overhead: what starting a tile with a KV head costs, in blocks of keys.
        scored_overhead: what it costs besides where scores are given out.
        min_blocks: fewest blocks of keys for which one more program is worth it.
    """

    big_m: int
    block_n: int
    big_n: int
    num_warps: int
    small_ahead: int
    big_ahead: int
    scored_ahead: int
    programs_per_sm: int
    unit_overhead: int = 4
    scored_overhead: int = 7
    min_blocks: int = 8

    @property
    def registers(self) -> int | None:
        """Most registers of a thread with which so many programs fit a multiprocessor; None if any number does."""
        share = _REGISTERS // (32 * self.num_warps * self.programs_per_sm)
        return share // 8 * 8 if share < 255 else None


def is_large_step(rows: int, q_heads: int, requests: int) -> bool:
    """Whether a step prefills, as far as its shapes tell, which are all that a captured step may go by."""
    return rows * q_heads >= LARGE_STEP_PAIRS and rows >= LARGE_STEP_ROWS * requests


def small_tile(group: int) -> int:
    """Pairs of a draft's tile: a row's query heads of a KV head, or what a product on tensor cores takes at least."""
    return padded(group)


def default_tiling(layer: Layer, large_step: bool, limits: DeviceLimits) -> Tiling:
    """Tiles within the registers of a program and the shared memory of a multiprocessor."""
    single = layer.dtype == torch.float32
    wide = layer.token_bytes > 512
    big_m = 16 if single else 128 if large_step and not wide else SCORED_PAIRS
    big_m = max(big_m, small_tile(layer.group))
    block_n = 16 if layer.token_bytes > 1024 else 32 if wide else 64
    num_warps = 8 if big_m > 64 or wide else 4
    per_sm = 1 if num_warps == 8 else 2
    queries = padded(layer.key_dim) * layer.dtype.itemsize
    room = limits.shared_bytes // per_sm - 2 * _RESERVED
    # Fewer keys at a time, and more of them on their way, suit what waits for memory.
    big_n = block_n if large_step else min(block_n, 32)
    # Products of 64 rows and more on Hopper keep one more block in shared memory while they run.
    kept = 1 if limits.capability >= 90 and big_m >= 64 and not single else 0
    big_ahead = (room - big_m * queries) // (big_n * layer.token_bytes) - kept
    small_ahead = (room - small_tile(layer.group) * queries) // (block_n * layer.token_bytes)
    # With scores only values are kept there, and weights are handed over through shared memory.
    kept_values = kept * block_n * padded(layer.value_dim) * layer.dtype.itemsize
    weights = big_m * block_n * layer.dtype.itemsize
    scored_ahead = (room - big_m * queries - weights - kept_values) // (block_n * layer.token_bytes)
    ahead = (_clamped(small_ahead, 2), _clamped(big_ahead, 4), _clamped(scored_ahead, 4))
    return Tiling(big_m, block_n, big_n, num_warps, *ahead, per_sm)


def _clamped(ahead: int, most: int) -> int:
    """Blocks on their way: one hides nothing, and each takes registers for what it has looked up."""
    return max(2, min(most, ahead))


def padded(size: int) -> int:
    """The power of two that a tile's dimension of this size takes; a dot takes 16 at least."""
    return max(16, triton.next_power_of_2(size))
