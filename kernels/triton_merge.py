"""What ends a unit: its rows are written, or its part goes to the workspace and the last part to arrive joins them all.

A part is (sums, total, largest): the weighted sum of values, the sum of weights and the largest logit that the weights
are measured from, float32. Parts are joined in the order of their programs, whoever comes last, so that equal calls
give equal bits. No program waits for another.

A program leaves at most two parts: in its first place that of a unit which an earlier program began, in its second
that of a unit which it begins and a later one continues. The counter of the program that began a unit counts the parts
that are there; whoever joins them sets it back to 0, so that counters are 0 between launches.
"""

import triton
import triton.language as tl


@triton.jit
def store_rows(target, sums, total, real, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr):
    """Write the softmax average of values of each pair to ``target`` [pairs]."""
    dim = tl.arange(0, VALUE_PAD)[None, :]
    result = (sums / total[:, None]).to(target.dtype.element_ty)
    tl.store(target[:, None] + dim, result, mask=real[:, None] & (dim < VALUE_DIM))


@triton.jit
def _place_of_part(parts, number, pair, PART_M: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Where a part keeps sums [.., VALUE_DIM], totals and largest logits of its pairs."""
    base = parts + number.to(tl.int64) * (PART_M * (VALUE_DIM + 2))
    total = base + PART_M * VALUE_DIM + pair
    return base + pair * VALUE_DIM, total, total + PART_M


@triton.jit
def store_part(
    parts,
    number,
    sums,
    total,
    largest,
    real,
    PART_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Leave a part in the workspace."""
    at_sums, at_total, at_largest = _place_of_part(parts, number, tl.arange(0, BLOCK_M), PART_M, VALUE_DIM)
    dim = tl.arange(0, VALUE_PAD)[None, :]
    tl.store(at_sums[:, None] + dim, sums, mask=real[:, None] & (dim < VALUE_DIM))
    tl.store(at_total, total, mask=real)
    tl.store(at_largest, largest, mask=real)


@triton.jit
def arrive_last(counters, first, last):
    """Report a part of the unit that programs first .. last share; true for the last of them to do so."""
    # All threads have stored before the one that counts releases what they stored.
    tl.debug_barrier()
    is_last = tl.atomic_add(counters + first, 1, sem="acq_rel", scope="gpu") == last - first
    if is_last:
        tl.store(counters + first, 0)
    return is_last


@triton.jit
def join_parts(
    parts,
    first,
    last,
    out,
    pairs,
    stride_row,
    GROUP: tl.constexpr,
    PART_M: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    JOIN: tl.constexpr,
):
    """Write the rows of a unit whose parts are all there, ``out`` pointing to its first pair.

    A program gets here once, with nothing of this code in its caches: few pairs at a time make it short, and loads that
    stand side by side wait for memory once.
    """
    PAIRS: tl.constexpr = JOIN.pairs
    dim = tl.arange(0, VALUE_PAD)[None, :]
    for low in range(0, pairs, PAIRS):
        pair = low + tl.arange(0, PAIRS)
        real = pair < pairs
        sums = tl.zeros((PAIRS, VALUE_PAD), tl.float32)
        total = tl.zeros((PAIRS,), tl.float32)
        largest = tl.full((PAIRS,), float("-inf"), tl.float32)
        for program in tl.range(first, last + 1, num_stages=1, loop_unroll_factor=JOIN.parts):
            number = 2 * program + tl.where(program == first, 1, 0)
            at_sums, at_total, at_largest = _place_of_part(parts, number, pair, PART_M, VALUE_DIM)
            # Past the L1 cache, which other processors' stores do not reach.
            part_largest = tl.load(at_largest, mask=real, other=float("-inf"), cache_modifier=".cg")
            part_total = tl.load(at_total, mask=real, other=0.0, cache_modifier=".cg")
            part_sums = tl.load(
                at_sums[:, None] + dim, mask=real[:, None] & (dim < VALUE_DIM), other=0.0, cache_modifier=".cg"
            )
            raised = tl.maximum(largest, part_largest)
            # A row that has seen nothing yet keeps -inf, from which 0 must be subtracted: -inf - -inf is not a number.
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            fade, part_fade = tl.exp2(largest - shift), tl.exp2(part_largest - shift)
            sums = sums * fade[:, None] + part_sums * part_fade[:, None]
            total = total * fade + part_total * part_fade
            largest = raised
        target = out + (pair // GROUP).to(tl.int64) * stride_row + pair % GROUP * VALUE_DIM
        store_rows(target, sums, total, real, VALUE_DIM, VALUE_PAD)
