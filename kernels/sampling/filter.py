"""Top-k, top-p and min-p on the device: for each row the lowest scaled logit that passes, without sorting.

A program has a row. It keeps the highest logit of each of BLOCK slots (tokens dealt out in turn): the k-th highest of
those is a bound that at least k tokens reach, and hardly more do. These candidates are gathered in one more pass, and
the thresholds are found among them, in registers, bit by bit: the highest bound that k keys reach, or whose keys have
mass p. Where the candidates do not suffice (large k, a flat row under top-p, very many ties) the same search reads the
row once for each bit. The search runs on bits of the logits; dividing by the temperature keeps their order, so the
threshold of the scaled logits is the threshold's scaled logit.

Error of a mass. A probability is exp(x - max(x)) in float32 by ex2: the difference, its product with log2(e) and ex2
are off by at most |x - max| * 3 * 2**-24 + 2**-22 of it. The mean of |x - max| under these probabilities is at most the
entropy, ln V, so a mass is off by at most ln V * 3 * 2**-24 + 2**-22 of the total, 2.4e-6 for V = 151,936. A sum over
n additions in a row and a tree of BLOCK adds (n + log2 BLOCK) * 2**-24, 2.9e-6. Sum and total together: a token at the
edge can be kept or dropped against exact arithmetic only if the mass above it is within 1.1e-5 of p.
"""

import triton
import triton.language as tl

BLOCK = 4096
"""Slots of a row; tokens read at once."""

MOST = 1024
"""Tokens that candidates are gathered for: the largest k found among them, and where top-p alone looks first."""

ROOM = 2048
"""Candidates of a row. Those of 1,024 highest of 4,096 slots are 1,180 on average, if tokens come in no order."""

NUM_WARPS = 16


@triton.jit
def filter_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    candidates,
    lowest,
    vocabulary,
    stride_row,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Write the lowest scaled logit that passes each row's filters, -inf for rows without."""
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    count = tl.load(top_k + row)
    mass = tl.load(top_p + row)
    share = tl.load(min_p + row)
    count = tl.where((count > 0) & (count < vocabulary), count, 0).to(tl.int32)
    ordered = (count > 0) | (mass < 1.0)
    bound = tl.full((), float("-inf"), tl.float32)
    if (heat != 0.0) & (ordered | (share > 0.0)):
        own = logits + row * stride_row
        slots = _highest_of_slots(own, vocabulary, DROPPED, BLOCK)
        highest = tl.div_rn(from_ordered_bits(tl.max(slots, 0), DROPPED), heat)
        bound = highest + tl.log(share)
        if ordered:
            wanted = tl.where((count > 0) & (count <= MOST), count, MOST)
            floor = highest_bound(slots, tl.full((BLOCK,), 1, tl.int32), wanted, 32 - DROPPED)
            gathered = candidates + row * ROOM
            there = _gather(own, gathered, vocabulary, floor, DROPPED, BLOCK, ROOM)
            key = _lowest_key(own, gathered, vocabulary, there, count, mass, heat, highest, DROPPED, BLOCK, MOST, ROOM)
            bound = tl.maximum(bound, tl.div_rn(from_ordered_bits(key, DROPPED), heat))
    tl.store(lowest + row, bound)


@triton.jit
def _lowest_key(
    logits,
    gathered,
    vocabulary,
    there,
    count,
    mass,
    heat,
    highest,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Key of the lowest logit that passes top-k and top-p, from ``there`` candidates if they suffice."""
    bits: tl.constexpr = 32 - DROPPED
    tl.debug_barrier()  # threads read what others gathered
    place = tl.arange(0, ROOM)
    found = tl.load(gathered + place, mask=place < there, other=0).to(tl.uint32, bitcast=True)
    whole = there <= ROOM
    counted = whole & (count <= MOST)
    key = tl.full((), 0, tl.uint32)
    if count > 0:
        if counted:
            key = highest_bound(found, tl.full((ROOM,), 1, tl.int32), count, bits)
        else:
            key = _highest_bound_of_row(logits, vocabulary, heat, highest, count, False, DROPPED, BLOCK)
    if mass < 1.0:
        passed = (found > 0) & (found >= key)
        value = tl.where(passed, from_ordered_bits(found, DROPPED), 0.0)
        probability = tl.where(passed, tl.exp(tl.div_rn(value, heat) - highest), 0.0)
        at_hand = tl.sum(probability, 0)
        total = at_hand
        if (count == 0) | (counted == 0):
            total = _weight_of_row(logits, vocabulary, heat, highest, key, True, DROPPED, BLOCK)
        if whole & (at_hand >= mass * total):
            key = highest_bound(found, probability, mass * total, bits)
        else:
            key = _highest_bound_of_row(logits, vocabulary, heat, highest, mass * total, True, DROPPED, BLOCK)
    return key


@triton.jit
def _highest_of_slots(logits, vocabulary, DROPPED: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key [BLOCK] among tokens that are equal modulo BLOCK; 0 where there is none."""
    slots = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, vocabulary, BLOCK):
        _, key = _load(logits, start, vocabulary, DROPPED, BLOCK)
        slots = tl.maximum(slots, key)
    return slots


@triton.jit
def _gather(logits, gathered, vocabulary, floor, DROPPED: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """Write the keys from ``floor`` on, in the order of their tokens, as far as there is room; count all of them."""
    there = 0
    for start in range(0, vocabulary, BLOCK):
        _, key = _load(logits, start, vocabulary, DROPPED, BLOCK)
        if tl.max(key, 0) >= floor:
            taken = (key > 0) & (key >= floor)
            place = there + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(gathered + place, key.to(tl.int32, bitcast=True), mask=taken & (place < ROOM))
            there += tl.sum(taken.to(tl.int32), 0)
    return there


@triton.jit
def _highest_bound_of_row(
    logits, vocabulary, heat, highest, target, MASS: tl.constexpr, DROPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """``highest_bound`` over a whole row, read once for each bit. Weights are 1, or probabilities for MASS."""
    bound = tl.full((), 0, tl.uint32)
    for bit in range(31 - DROPPED, -1, -1):
        higher = bound | (tl.full((), 1, tl.uint32) << bit)
        enough = _weight_of_row(logits, vocabulary, heat, highest, higher, MASS, DROPPED, BLOCK) >= target
        bound = tl.where(enough, higher, bound)
    return bound


@triton.jit
def _weight_of_row(
    logits, vocabulary, heat, highest, bound, MASS: tl.constexpr, DROPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """How many keys reach ``bound``, or the sum of their probabilities for MASS."""
    weight = tl.zeros((BLOCK,), tl.float32 if MASS else tl.int32)
    for start in range(0, vocabulary, BLOCK):
        logit, key = _load(logits, start, vocabulary, DROPPED, BLOCK)
        reached = (key > 0) & (key >= bound)
        if MASS:
            weight += tl.where(reached, tl.exp(tl.div_rn(logit, heat) - highest), 0.0)
        else:
            weight += reached.to(tl.int32)
    return tl.sum(weight, 0)


@triton.jit
def _load(logits, start, vocabulary, DROPPED: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits as float32, and their keys without the bits that no logit of the dtype has; 0 past the end."""
    token = start + tl.arange(0, BLOCK)
    real = token < vocabulary
    logit = tl.load(logits + token, mask=real, other=0.0).to(tl.float32)
    return logit, tl.where(real, ordered_bits(logit) >> DROPPED, 0)


@triton.jit
def ordered_bits(value):
    """float32 values as uint32 keys of the same order: the sign bit flipped, and all other bits too below zero."""
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 equals 0.0
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def from_ordered_bits(key, DROPPED: tl.constexpr):
    """The float32 values of keys whose lowest DROPPED bits, which were 0 in every value, have been shifted out."""
    full = key << DROPPED
    bits = tl.where((full >> 31) == 1, full & 0x7FFFFFFF, ((full ^ 0xFFFFFFFF) >> DROPPED) << DROPPED)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def highest_bound(key, weight, target, BITS: tl.constexpr):
    """The highest bound of BITS bits with keys of a total weight of ``target`` at or above it; 0 if all weigh less.

    ``weight``, int32 or float32 and never negative, is of the shape of ``key``; keys of 0 stand for nothing. Sums have
    a fixed order, in which rounding never makes them grow with the bound: the search is exact for these sums.
    """
    bound = tl.full((), 0, tl.uint32)
    for bit in range(BITS - 1, -1, -1):
        higher = bound | (tl.full((), 1, tl.uint32) << bit)
        enough = tl.sum(tl.where(key >= higher, weight, 0), 0) >= target
        bound = tl.where(enough, higher, bound)
    return bound
