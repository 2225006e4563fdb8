"""Selection of the pillars on the device: the exact k-th highest score by its bits, then one pass in order.

The k-th highest score is found two bits at a time: how many scores reach each of three bounds, and which is the highest
that k of them reach? Counting is a comparison and a sum, and a row that is read again for each two bits comes out of
the L1 cache. The search ends as soon as a bound leaves exactly k. No sorting, no atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.plan import locate
from ..checks import check_select
from ..launch import device_limits

CHUNK = 1024
"""Scores that a program reads at a time: 8 a thread."""

NUM_WARPS = 4
PROGRAMS_PER_SM = 8
REGISTERS = 64
"""Of a thread, with which eight programs share a multiprocessor: while some wait for a sum, others read."""

MOST_CHUNKS = 1023
"""Of a row: a lane counts in 10 bits."""

MOST_PACKED = 2**21 - 1
"""Scores of a row of which three counts share a number of 64 bits."""

_LOWEST = tl.constexpr(-(2**31))
"""Below the keys of all numbers."""


def select_pillars(
    scores: Tensor,
    score_slot: Tensor,
    scored_length: Tensor,
    budget: Tensor,
    pillar_index: Tensor,
    pillar_count: Tensor,
) -> None:
    """Keep the positions with the highest scores of each request and head; see ``kernels.ops``."""
    check_select(scores, score_slot, scored_length, budget, pillar_index, pillar_count)
    requests, (_, heads, positions) = scored_length.shape[0], scores.shape
    if requests == 0 or heads == 0:
        return
    programs = min(device_limits(scores.device).multiprocessors * PROGRAMS_PER_SM, requests * heads)
    with torch.cuda.device_of(scores):
        select_kernel[(programs,)](
            scores,
            score_slot,
            scored_length,
            budget,
            pillar_index,
            pillar_count,
            requests,
            heads,
            positions,
            pillar_index.shape[2],
            scores.stride(0),
            scores.stride(1),
            score_slot.stride(0),
            scored_length.stride(0),
            budget.stride(0),
            pillar_index.stride(0),
            pillar_index.stride(1),
            pillar_count.stride(0),
            # Specialise on few numbers of slots only.
            REQUESTS=max(64, triton.next_power_of_2(requests)),
            CHUNK=chunk_of(positions),
            PACKED=positions <= MOST_PACKED,
            num_warps=NUM_WARPS,
            maxnreg=REGISTERS,
        )


def chunk_of(positions: int) -> int:
    """Scores that are read at a time, a power of two: longer rows take longer chunks, which bounds their number."""
    return max(CHUNK, triton.next_power_of_2(triton.cdiv(positions, MOST_CHUNKS)))


# A kernel is compiled anew for each pattern of divisible sizes and addresses; only those of scores make loads wider.
_ANY_VALUE = (
    "requests",
    "heads",
    "positions",
    "capacity",
    "stride_slot",
    "stride_length",
    "stride_budget",
    "stride_pillar_request",
    "stride_pillar_head",
    "stride_count",
)
_ANY_ADDRESS = ("score_slot", "scored_length", "budget", "pillar_index", "pillar_count")


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def select_kernel(
    scores,
    score_slot,
    scored_length,
    budget,
    pillar_index,
    pillar_count,
    requests,
    heads,
    positions,
    capacity,
    stride_score_slot,
    stride_score_head,
    stride_slot,
    stride_length,
    stride_budget,
    stride_pillar_request,
    stride_pillar_head,
    stride_count,
    REQUESTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Persistent: programs take the heads of requests with something to select in round-robin order."""
    slot = tl.arange(0, REQUESTS)
    lengths = tl.load(scored_length + slot * stride_length, mask=slot < requests, other=-1)
    ends = tl.cumsum(tl.where(lengths >= 0, heads, 0), 0)
    for row in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        request, first = locate(ends, row)
        head = tl.cast(row - first, tl.int64)
        request = request.to(tl.int64)
        length = tl.minimum(tl.load(scored_length + request * stride_length), positions)
        wanted = tl.maximum(tl.load(budget + request * stride_budget), 0)
        count = tl.minimum(tl.minimum(wanted, length), capacity)
        if head == 0:
            tl.store(pillar_count + request * stride_count, count)
        source = tl.load(score_slot + request * stride_slot).to(tl.int64)
        row_scores = scores + source * stride_score_slot + head * stride_score_head
        row_index = pillar_index + request * stride_pillar_request + head * stride_pillar_head
        if count > 0:
            _select(row_scores, row_index, length, count, CHUNK, PACKED)


@triton.jit
def _select(scores, pillar_index, length, count, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Write the positions of the ``count`` highest of ``length`` scores, in order."""
    last, room, ties = _kth_highest(scores, length, count, CHUNK, PACKED)
    kept = 0
    equal_seen = 0
    for start in range(0, length, CHUNK):
        key, position = _keys_of_chunk(scores, start, length, CHUNK)
        taken = (key >= last).to(tl.int32)
        if ties:
            equal = (key == last).to(tl.int32)
            rank, equal_seen = _count_on(equal, equal_seen)
            taken = taken & ((key > last) | (rank <= room)).to(tl.int32)
        place, kept = _count_on(taken, kept)
        tl.store(pillar_index + place - 1, position, mask=taken > 0)


@triton.jit
def _count_on(flag, before):
    """Inclusive prefix counts of flags [n, 4], starting from ``before``, and the total."""
    of_four = tl.sum(flag, 1)
    up_to = tl.cumsum(of_four, 0)
    return (before + up_to - of_four)[:, None] + tl.cumsum(flag, 1), before + tl.sum(of_four, 0)


@triton.jit
def _kth_highest(scores, length, count, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """A key that the ``count`` highest scores reach, and no others if it has no ties: (key, room, ties).

    With ties it is that of the count-th highest, and ``room`` is how many scores equal to it are among the highest.
    """
    bound = tl.full((), _LOWEST, tl.int32)
    at_least, above = length, 0
    # Two bits at a time, from the highest on. The sign counts downwards, hence the exclusive or.
    step = tl.full((), 1 << 30, tl.int32)
    while (step > 0) & (at_least != count):
        low, middle, high = bound ^ step, bound ^ (step << 1), bound ^ (step * 3)
        low_count, middle_count, high_count = _reaching(scores, length, low, middle, high, CHUNK, PACKED)
        # Bounds ascend, so those that enough scores reach come first.
        if high_count >= count:
            bound, at_least = high, high_count
        elif middle_count >= count:
            bound, at_least, above = middle, middle_count, high_count
        elif low_count >= count:
            bound, at_least, above = low, low_count, middle_count
        else:
            above = low_count
        step = step >> 2
    # All scores reach the lowest bound, but what is past the end must not.
    return tl.maximum(bound, _LOWEST + 1), count - above, at_least > count


@triton.jit
def _reaching(scores, length, low, middle, high, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Number of scores at or above each of three ascending keys, all above _LOWEST."""
    # Each lane counts in 10 bits for each key: a choice and one sum instead of three.
    tally = tl.zeros((CHUNK // 4, 4), tl.int32)
    for start in range(0, length, CHUNK):
        key = _keys_of_chunk(scores, start, length, CHUNK)[0]
        tally += tl.where(key >= high, 0x100401, tl.where(key >= middle, 0x401, tl.where(key >= low, 1, 0)))
    if PACKED:
        wide = tally.to(tl.int64)
        sums = tl.sum(tl.sum((wide & 0x3FF) | ((wide & 0xFFC00) << 11) | ((wide >> 20) << 42), 1), 0)
        return (sums & 0x1FFFFF).to(tl.int32), ((sums >> 21) & 0x1FFFFF).to(tl.int32), (sums >> 42).to(tl.int32)
    return _sum(tally & 0x3FF), _sum((tally >> 10) & 0x3FF), _sum(tally >> 20)


@triton.jit
def _sum(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _keys_of_chunk(scores, start, length, CHUNK: tl.constexpr):
    """Keys of the scores from ``start`` on, _LOWEST past the end, and their positions."""
    place = 4 * tl.arange(0, CHUNK // 4)[:, None] + tl.arange(0, 4)[None, :]
    real = start + place < length
    if start + CHUNK <= length:
        # Without a mask, whose end may be anywhere, a thread loads four at a time.
        key = _signed_key(tl.load(scores + start + place))
    else:
        key = tl.where(real, _signed_key(tl.load(scores + start + place, mask=real, other=0.0)), _LOWEST)
    return key, start + place


@triton.jit
def _signed_key(value):
    """float32 values as int32 of the same order, -0.0 like 0.0."""
    bits = value.to(tl.int32, bitcast=True)
    negative = bits >> 31
    return ((bits & 0x7FFFFFFF) ^ negative) - negative
