"""One segment: a tile of rows of one request attends, with one KV head, to consecutive blocks of what it reads.

Keys and values come from the pool, tokens of the step itself too: the segment writes them there first, as every
segment of their request does with the same bits, so nobody waits for anybody. Only long prompts, whose tiles would all
write everything, read the step's tokens where they are, after the pool.
"""

import triton
import triton.language as tl

from .triton_blocks import attend_blocks, attend_own, first_look_up
from .triton_merge import arrive_last, join_parts, store_part, store_rows
from .triton_scored import attend_scored, log_sum_of_list
from .triton_scores import clear_scores
from .triton_shapes import LoopShape
from .triton_tiles import load_queries, pairs_of_tile
from .triton_write import load_rows, store_tokens


@triton.jit
def attend_segment(unit, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Attend, and finish the unit if this is its only or its last part.

    Returns False if nothing was finished: with scores, weights are measured from a few positions, and those missed what
    a row looks at most by more than the range of numbers. The scores are right; attend again without.

    ``unit`` is (packed, source, listed, measured, blocks, rows, own, score, workspace): ``packed`` (q, its strides of a
    row and a head, out, its stride of a row), at the request and KV head; ``source`` a `Source`; ``listed`` and
    ``measured`` `Listed`, what of the pool the tile reads and what measures its scores; ``blocks``
    (first, end, all) which blocks of it; ``rows`` (first, count): the tile's first row, and how many the request has up
    to the tile's last, which are all of them where scores are given out; ``own`` (first, end) of the request's rows to
    be written, and whether the tile reads them beside the pool; ``score`` (emits, scores, scored) with scores at the
    request's slot and head; ``workspace`` (parts, counters, first program, last program).
    """
    packed, source, listed, measured, blocks, rows, own, score, workspace = unit
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
    loaded = load_rows(source, own[0], own[1], TILE.rows_pad, LAYER)
    query = load_queries(query_base, stride_q_row, stride_q_head, place, member, real_pair, LAYER.key_dim, KEY_PAD)
    found = first_look_up(source, listed, begin, unscored_rows, settings, LAYER, TILE)
    store_tokens(source, loaded, LAYER)
    for low in range(own[0] + TILE.rows_pad, own[1], TILE.rows_pad):
        store_tokens(source, load_rows(source, low, own[1], TILE.rows_pad, LAYER), LAYER)
    # Other threads read what one has written.
    tl.debug_barrier()

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
        largest = log_sum_of_list(query, cached + place, source, measured, settings, LAYER, LIST_TILE, False)
        # What is no row looks at nothing.
        largest = tl.where(real_pair, largest, float("inf"))
        looks = (scores, scored_end, largest, 1.0 / (scored * LAYER.group))
        total, sums = attend_scored(
            query, source, listed, first_block, end_block, ahead, seen_by, looks, settings, LAYER, SCORED_TILE
        )
        LIMIT: tl.constexpr = 2.0**15 if query.dtype == tl.float16 else 2.0**100
        in_range = tl.max(tl.where(real_pair, total, 0.0)) <= LIMIT
    else:
        largest, total, sums = attend_blocks(
            query, source, listed, begin, stop, found, unscored_rows, settings, LAYER, TILE
        )
        if TILE.beside_pool:  # noqa: SIM102 (the first is known to the compiler, the second is not)
            if own[2]:
                state = (largest, total, sums)
                largest, total, sums = attend_own(query, source, place, first, count, state, settings, LAYER, TILE)

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
