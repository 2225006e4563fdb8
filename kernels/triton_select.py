"""Selection of the pillars on the device: the exact k-th highest score by its bits, then one pass in order.

A row of scores that fits is read once and kept in registers, where the k-th highest is found bit by bit: does the next
bit still leave k scores at or above? Counting is a comparison and a sum. A longer row is found byte by byte, with four
histograms over the scores that agree with the bytes found so far. No sorting, no atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_select
from .device import device_limits
from .triton_bits import ordered_bits
from .triton_plan import locate

BLOCK = 8192
"""Scores that a program holds in registers: 32 a thread."""

NUM_WARPS = 8
PROGRAMS_PER_SM = 3
REGISTERS = 80
"""Of a thread, with which three programs of 8 warps share a multiprocessor."""


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
    block = min(BLOCK, max(128, triton.next_power_of_2(positions)))
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
            REQUESTS=triton.next_power_of_2(requests),
            BLOCK=block,
            num_warps=NUM_WARPS if block == BLOCK else 4,
            maxnreg=REGISTERS,
        )


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
    BLOCK: tl.constexpr,
):
    """Persistent: the heads of the requests with something to select, one after the other, dealt out in turn."""
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
            if length <= BLOCK:
                _select_short(row_scores, row_index, length, count, BLOCK)
            else:
                _select_long(row_scores, row_index, length, count, BLOCK)
        for start in range(count, capacity, BLOCK):
            position = start + tl.arange(0, BLOCK)
            tl.store(row_index + position, tl.full((BLOCK,), -1, tl.int32), mask=position < capacity)


@triton.jit
def _select_short(scores, pillar_index, length, count, BLOCK: tl.constexpr):
    """Select from a row of at most BLOCK scores."""
    position = tl.arange(0, BLOCK)
    real = position < length
    # Keys of lanes past the end are 0, and no bound that keys are compared with is.
    key = tl.where(real, _ordered_bits(scores, position, real), 0)
    bound = tl.full((), 0, tl.uint32)
    at_least = length
    bit = tl.full((), 1, tl.uint32) << 31
    # Done as soon as exactly count scores reach the bound, or when it is the count-th highest and has ties.
    while (bit != 0) & (at_least != count):
        reached = tl.sum((key >= (bound | bit)).to(tl.int32), 0)
        enough = reached >= count
        bound = tl.where(enough, bound | bit, bound)
        at_least = tl.where(enough, reached, at_least)
        bit = bit >> 1
    taken = real & (key >= bound)
    if at_least > count:
        equal = (real & (key == bound)).to(tl.int32)
        room = count - at_least + tl.sum(equal, 0)
        taken = taken & ((key > bound) | (tl.cumsum(equal, 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(pillar_index + place, position, mask=taken & (place < count))


@triton.jit
def _select_long(scores, pillar_index, length, count, BLOCK: tl.constexpr):
    """Select from a row of any length, reading it once for each byte of a key and once more."""
    last, room = _kth_highest(scores, length, count, BLOCK)
    kept = 0
    equal_seen = 0
    for start in range(0, length, BLOCK):
        position = start + tl.arange(0, BLOCK)
        real = position < length
        key = _ordered_bits(scores, position, real)
        equal = (real & (key == last)).to(tl.int32)
        rank = equal_seen + tl.cumsum(equal, 0)
        taken = real & ((key > last) | ((equal == 1) & (rank <= room)))
        place = kept + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(pillar_index + place, position, mask=taken & (place < count))
        kept += tl.sum(taken.to(tl.int32), 0)
        equal_seen += tl.sum(equal, 0)


@triton.jit
def _kth_highest(scores, length, count, BLOCK: tl.constexpr):
    """Key of the count-th highest score, and how many scores equal to it are among the count highest."""
    digit = tl.arange(0, 256)
    found = tl.full((), 0, tl.uint32)
    known = tl.full((), 0, tl.uint32)
    room = count
    for shift in tl.static_range(24, -8, -8):
        bins = tl.zeros((256,), tl.int32)
        for start in range(0, length, BLOCK):
            position = start + tl.arange(0, BLOCK)
            real = position < length
            key = _ordered_bits(scores, position, real)
            bins += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), 256, mask=real & ((key & known) == found))
        at_least = tl.sum(bins, 0) - tl.cumsum(bins, 0) + bins
        chosen = tl.max(tl.where(at_least >= room, digit, 0), 0)
        room -= tl.sum(tl.where(digit > chosen, bins, 0), 0)
        found = found | (chosen.to(tl.uint32) << shift)
        known = known | (tl.full((), 0xFF, tl.uint32) << shift)
    return found, room


@triton.jit
def _ordered_bits(scores, position, real):
    """Keys of the scores at these positions."""
    return ordered_bits(tl.load(scores + position, mask=real, other=0.0))
