"""One segment: a tile of rows of one request attends, with one KV head, to consecutive blocks of what it reads.

Keys and values come from the pool, tokens of the step itself too: the segment writes them there first, as every
segment of their request does with the same bits, so nobody waits for anybody. Only long prompts, whose tiles would all
write everything, read the step's tokens where they are, after the pool.

At its end the rows of a unit are written, or its part goes to the workspace and the last part to arrive joins them all.
A part is (sums, total, largest): the weighted sum of values, the sum of weights and the largest logit that the weights
are measured from, float32. Parts are joined in the order of their programs, whoever comes last, so that equal calls
give equal bits. No program waits for another.

A program leaves at most two parts: in its first place that of a unit which an earlier program began, in its second
that of a unit which it begins and a later one continues. The counter of the program that began a unit counts the parts
that are there; whoever joins them sets it back to 0, so that counters are 0 between launches.
"""

import triton
import triton.language as tl

from .loops import (
    absorb_sinks,
    attend_blocks,
    attend_own,
    attend_scored,
    attend_to_tile,
    first_look_up,
    log_sum_of_list,
    nothing_seen,
)
from .scores import clear_scores
from .tiles import LoopShape, as_kept, load_queries, load_rows, load_sinks, pages_of, pairs_of_tile, pool_pointers


@triton.jit
def attend_segment(unit, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Attend, and finish the unit if this is its only or its last part.

    Returns False if nothing was finished: with scores, weights are measured from a few positions, and those missed what
    a row looks at most by more than the range of numbers. The scores are right; attend again without.

    ``unit`` is (packed, source, listed, measured, sinks, blocks, rows, own, score, workspace): ``packed`` (q, its
    strides of a row and a head, out, its stride of a row), at the request and KV head; ``source`` a `Source`;
    ``listed`` and ``measured`` `Listed`, what of the pool the tile reads and what measures its scores; ``sinks`` where
    those of all query heads lie, or None, and the first query head of the KV head; ``blocks`` (first, end, all) which
    blocks of what it reads; ``rows`` (first, count): the tile's first row, and how many the request has up to the
    tile's last, which are all of them where scores are given out; ``own`` (first, end) of the request's rows to be
    written, and whether the tile reads them beside the pool; ``score`` (emits, scores, scored) with scores at the
    request's slot and head; ``workspace`` (parts, counters, first program, last program).
    """
    packed, source, listed, measured, sinks, blocks, rows, own, score, workspace = unit
    VALUE_DIM: tl.constexpr = LAYER.value_dim
    KEY_PAD: tl.constexpr = LAYER.key_pad
    VALUE_PAD: tl.constexpr = LAYER.value_pad
    HAS_WINDOW: tl.constexpr = LAYER.has_window
    BLOCK_M: tl.constexpr = TILE.pairs
    BLOCK_N: tl.constexpr = TILE.keys
    PART_M: tl.constexpr = TILE.part_pairs
    JOIN: tl.constexpr = TILE.join
    query_base, stride_q_row, stride_q_head, out_base, stride_out_row = packed
    first_block, end_block, all_blocks = blocks
    first, count = rows
    emits, scores, scored = score
    parts, counters, first_program, last_program = workspace
    cached = source.cached

    place, member, real_pair = pairs_of_tile(first, count, LAYER.group, BLOCK_M)
    # Earlier keys hold nothing that a row must not see, unless there is a window.
    ragged_key = listed.pillar_count + tl.minimum(cached, listed.end) - listed.start
    STEPS: tl.constexpr = TILE.block // BLOCK_N
    unscored_rows = (cached + place, cached + first, ragged_key // BLOCK_N)
    begin, stop = first_block * STEPS, end_block * STEPS
    # Four loads wait for each other from here to the first key; everything else is asked for beside the first of them.
    loaded = load_new(source, own[0], own[1], TILE.rows_pad, LAYER)
    query = load_queries(query_base, stride_q_row, stride_q_head, place, member, real_pair, LAYER.key_dim, KEY_PAD)
    found = first_look_up(source, listed, begin, unscored_rows, settings, LAYER, TILE)
    written = store_new(source, loaded, LAYER)
    for low in range(own[0] + TILE.rows_pad, own[1], TILE.rows_pad):
        store_new(source, load_new(source, low, own[1], TILE.rows_pad, LAYER), LAYER)
    # Other threads read what one has written.
    tl.debug_barrier()

    sink = None
    if LAYER.has_sinks:
        sink = load_sinks(sinks[0], sinks[1], member)
    in_range = True
    # One or the other: in turn, ptxas would serialise all products of the kernel on tensor cores (its note C7515).
    if TILE.scored_ahead > 0 and emits:
        SCORED_TILE: tl.constexpr = LoopShape(BLOCK_M, TILE.block, TILE.scored_ahead, False)
        LIST_TILE: tl.constexpr = LoopShape(BLOCK_M, TILE.block, TILE.scored_ahead, True)
        scored_end = cached + count - scored
        if HAS_WINDOW:
            clear_scores(scores, tl.where(first_block == 0, tl.minimum(listed.start, scored_end), 0), TILE.block)
        seen_by = (cached + place, cached + first, ragged_key // TILE.block)
        ahead = first_look_up(source, listed, first_block, seen_by, settings, LAYER, SCORED_TILE)[2]
        largest = log_sum_of_list(query, cached + place, source, measured, sink, settings, LAYER, LIST_TILE, False)
        # Padding rows attend to nothing.
        largest = tl.where(real_pair, largest, float("inf"))
        looks = (scores, scored_end, largest, 1.0 / (scored * LAYER.group))
        total, sums = attend_scored(
            query, source, listed, first_block, end_block, ahead, seen_by, looks, settings, LAYER, SCORED_TILE
        )
        LIMIT: tl.constexpr = 2.0**15 if query.dtype == tl.float16 else 2.0**100
        in_range = tl.max(tl.where(real_pair, total, 0.0)) <= LIMIT
    else:
        largest, total, sums = nothing_seen(LAYER, TILE)
        # Of two conditions in turn, the first is known to the compiler and the second is not.
        if TILE.beside_pool:  # noqa: SIM102
            if own[2]:
                largest, total, sums = attend_to_tile(
                    query, source, written, place, first, count, settings, LAYER, TILE
                )
        state = (largest, total, sums)
        largest, total, sums = attend_blocks(
            query, source, listed, begin, stop, found, unscored_rows, state, settings, LAYER, TILE
        )
        if TILE.beside_pool:  # noqa: SIM102
            if own[2]:
                state = (largest, total, sums)
                largest, total, sums = attend_own(query, source, place, first, count, state, settings, LAYER, TILE)

    if LAYER.has_sinks:
        # Of the parts of a unit, the first counts them.
        sink = tl.where(first_block == 0, sink, float("-inf"))
        largest, total, sums = absorb_sinks(sink, largest, total, sums)
    target = out_base + (place.to(tl.int64) * stride_out_row) + member * VALUE_DIM
    if in_range & (end_block - first_block == all_blocks):
        store_rows(target, sums, total, real_pair, VALUE_DIM, VALUE_PAD)
    elif in_range:
        number = 2 * tl.program_id(0) + tl.where(first_block == 0, 1, 0)
        store_part(parts, number, sums, total, largest, real_pair, PART_M, BLOCK_M, VALUE_DIM, VALUE_PAD)
        if arrive_last(counters, first_program, last_program):
            pairs = tl.minimum(count - first, BLOCK_M // LAYER.group) * LAYER.group
            out = out_base + first.to(tl.int64) * stride_out_row
            join_parts(
                parts,
                first_program,
                last_program,
                out,
                pairs,
                stride_out_row,
                LAYER.group,
                PART_M,
                VALUE_DIM,
                VALUE_PAD,
                JOIN,
            )
    return in_range


@triton.jit(noinline=True)
def attend_segment_apart(unit, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """``attend_segment`` as a function with registers of its own, for tiles that spill beside others.

    Not for tiles whose products are asynchronous: with a call around them ptxas would wait for each.
    """
    return attend_segment(unit, settings, LAYER, TILE)


@triton.jit
def load_new(source, first, end, ROWS: tl.constexpr, LAYER: tl.constexpr):
    """What ``store_new`` takes: at most ROWS rows of k and v from ``first`` on before ``end``, and where they go."""
    row = tl.minimum(first + tl.arange(0, ROWS), end - 1)
    position = source.cached + row
    return position, pages_of(source, position, LAYER.pool), load_rows(source, first, end, ROWS, LAYER)


@triton.jit
def store_new(source, loaded, LAYER: tl.constexpr):
    """Write keys and values of new tokens to their positions in the pool; returns them as they are written."""
    position, page, rows = loaded
    keys, values, key_mask, value_mask = rows
    keys, values = as_kept(keys, values, LAYER)
    tl.store(pool_pointers(source, position, page, 0, LAYER.key_pad, LAYER.pool), keys, mask=key_mask)
    tl.store(pool_pointers(source, position, page, LAYER.key_dim, LAYER.value_pad, LAYER.pool), values, mask=value_mask)
    return keys, values


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
