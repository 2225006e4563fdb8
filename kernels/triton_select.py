"""Selection of the pillars on the device: the exact k-th highest score by its bits, then one pass in order.

Each program finds the k-th highest of a head's scores digit by digit (radix selection: four histograms of 256 bins,
each over the scores that agree with the digits found so far), then walks the positions in ascending order and keeps
those above it, and as many equal to it as there is room for. No sorting, no atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_select

_BLOCK = 1024


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
    with torch.cuda.device_of(scores):
        select_kernel[(heads, requests)](
            scores,
            score_slot,
            scored_length,
            budget,
            pillar_index,
            pillar_count,
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
            BLOCK=_BLOCK,
            num_warps=4,
        )


@triton.jit
def select_kernel(
    scores,
    score_slot,
    scored_length,
    budget,
    pillar_index,
    pillar_count,
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
    BLOCK: tl.constexpr,
):
    """One program per (head, request)."""
    head = tl.program_id(0).to(tl.int64)
    request = tl.program_id(1).to(tl.int64)
    length = tl.load(scored_length + request * stride_length)
    if length < 0:
        return
    length = tl.minimum(length, positions)
    wanted = tl.maximum(tl.load(budget + request * stride_budget), 0)
    count = tl.minimum(tl.minimum(wanted, length), capacity)
    if head == 0:
        tl.store(pillar_count + request * stride_count, count)
    slot = tl.load(score_slot + request * stride_slot).to(tl.int64)
    scores += slot * stride_score_slot + head * stride_score_head
    pillar_index += request * stride_pillar_request + head * stride_pillar_head
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
    for start in range(count, capacity, BLOCK):
        position = start + tl.arange(0, BLOCK)
        tl.store(pillar_index + position, tl.full((BLOCK,), -1, tl.int32), mask=position < capacity)


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
    """Scores as uint32 keys of the same order: the sign bit flipped, and all other bits too below zero."""
    score = tl.load(scores + position, mask=real, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
