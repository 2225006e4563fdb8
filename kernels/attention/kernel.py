"""Triton kernel of the dual-mode attention: writes K/V, attends rows of every mode, gives out scores of verifications.

For other scores see ``scores``.
"""

import triton
import triton.language as tl

from .plan import (
    cost_of_unit,
    emits_scores,
    locate,
    measuring_pillars,
    plan_requests,
    reading_of,
    rows_of_tile,
    share_of_line,
    tiles_of,
)
from .segment import attend_segment, attend_segment_apart
from .tiles import (
    ANY_ADDRESS,
    ANY_VALUE,
    DRAFT,
    IDLE,
    JoinShape,
    LayerShape,
    Listed,
    PoolShape,
    Source,
    TileShape,
    last_hidden,
)


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ADDRESS)
def attention_kernel(
    q,
    k,
    v,
    kv,
    scores,
    out,
    parts,
    counters,
    request_mode,
    row_start,
    row_count,
    cached_length,
    page_table,
    score_rows,
    score_slot,
    pillar_count,
    recent_start,
    pillar_index,
    sinks,
    requests,
    rows,
    kv_heads,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_head,
    page_units,
    stride_table,
    stride_score_slot,
    stride_score_head,
    stride_pillar_request,
    stride_pillar_head,
    window,
    logit_scale,
    cap,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    TOKEN_UNITS: tl.constexpr,
    WIDE_UNITS: tl.constexpr,
    REQUESTS: tl.constexpr,
    SMALL_M: tl.constexpr,
    BIG_M: tl.constexpr,
    SMALL_ROWS_PAD: tl.constexpr,
    BIG_ROWS_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIG_N: tl.constexpr,
    SMALL_AHEAD: tl.constexpr,
    BIG_AHEAD: tl.constexpr,
    SCORED_AHEAD: tl.constexpr,
    SMALL_JOIN_M: tl.constexpr,
    SMALL_JOIN_PARTS: tl.constexpr,
    BIG_JOIN_M: tl.constexpr,
    BIG_JOIN_PARTS: tl.constexpr,
    UNIT_OVERHEAD: tl.constexpr,
    SCORED_OVERHEAD: tl.constexpr,
    PART_COST: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """Persistent: any number of programs shares the work of a step, each taking its part of the plan.

    ``parts`` [programs, 2, max(SMALL_M, BIG_M) * (VALUE_DIM + 2)] float32 needs no initial value, ``counters``
    [programs] int32 must be 0 and is 0 again afterwards.
    """
    step = (request_mode, row_start, row_count, cached_length, score_rows, pillar_count, recent_start)
    settings = (window, logit_scale, cap)
    PART_M: tl.constexpr = max(SMALL_M, BIG_M)
    JOIN: tl.constexpr = JoinShape(SMALL_JOIN_M, SMALL_JOIN_PARTS)
    BIG_JOIN: tl.constexpr = JoinShape(BIG_JOIN_M, BIG_JOIN_PARTS)
    DRAFT_TILE: tl.constexpr = TileShape(
        SMALL_M, SMALL_ROWS_PAD, BLOCK_N, SMALL_AHEAD, True, PART_M, False, BLOCK_N, 0, JOIN
    )
    SMALL_TILE: tl.constexpr = TileShape(
        SMALL_M, SMALL_ROWS_PAD, BLOCK_N, SMALL_AHEAD, False, PART_M, False, BLOCK_N, 0, JOIN
    )
    BIG_TILE: tl.constexpr = TileShape(
        BIG_M, BIG_ROWS_PAD, BIG_N, BIG_AHEAD, False, PART_M, True, BLOCK_N, SCORED_AHEAD, BIG_JOIN
    )
    EMITS: tl.constexpr = SCORED_AHEAD > 0
    OVERHEADS: tl.constexpr = (UNIT_OVERHEAD, SCORED_OVERHEAD)
    POOL: tl.constexpr = PoolShape(PAGE_SIZE, UNIT, TOKEN_UNITS, WIDE_UNITS)
    LAYER: tl.constexpr = LayerShape(
        GROUP, KEY_DIM, VALUE_DIM, KEY_PAD, VALUE_PAD, POOL, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HAS_SINKS, CHUNKED
    )
    line, whole, sums = plan_requests(
        step,
        requests,
        kv_heads,
        window,
        GROUP,
        SMALL_M,
        BIG_M,
        BLOCK_N,
        HAS_WINDOW,
        CHUNKED,
        OVERHEADS,
        EMITS,
        REQUESTS,
    )
    total, longest, whole_units, real_rows, row_end = sums
    width = kv_heads * (GROUP * VALUE_DIM)
    clear_rows(out, row_end, rows, width)
    line_ends = tl.cumsum(line, 0)
    stretch, at, line_end = share_of_line(total, longest, PART_COST, UNIT_OVERHEAD)
    # Whole units are dealt out from the last program on, to which a short line gives nothing.
    dealt = tl.num_programs(0) - 1 - tl.program_id(0)
    again = False
    while (at < line_end) | (dealt < whole_units):
        in_line = at < line_end
        if in_line:
            request, begin = locate(line_ends, at)
            unit = at - begin
        else:
            request, first_unit = locate(tl.cumsum(whole, 0), dealt)
            unit = dealt - first_unit
            begin = at
            dealt += tl.num_programs(0)

        kind = tl.load(request_mode + request)
        first_row = tl.load(row_start + request).to(tl.int64)
        count = tl.load(row_count + request)
        cached = tl.load(cached_length + request)
        scored = tl.load(score_rows + request)
        pillars = tl.load(pillar_count + request)
        recent = tl.load(recent_start + request)
        small, tile_rows, tiles = tiles_of(kind, count, scored, GROUP, SMALL_M, BIG_M)
        emits = emits_scores(kind, scored, tile_rows, EMITS)
        end = cached + count
        # In the line, every tile of a request reads the same blocks.
        read, start = reading_of(kind, cached, pillars, recent, window, BLOCK_N, HAS_WINDOW, CHUNKED)
        all_blocks = (read + end - start + BLOCK_N - 1) // BLOCK_N
        first_block, end_block = 0, all_blocks
        first_program, last_program = 0, 0
        next_at, finished = at, True
        if in_line:
            lead = cost_of_unit(emits, pillars, recent, end, BLOCK_N, OVERHEADS)
            cost = lead + all_blocks
            within = unit % cost
            unit = unit // cost
            unit_begin = at - within
            stop = tl.minimum(line_end, unit_begin + cost)
            first_block = tl.maximum(within - lead, 0)
            end_block = tl.maximum(stop - unit_begin - lead, 0)
            first_program = (unit_begin + lead) // stretch
            last_program = (unit_begin + cost - 1) // stretch
            next_at = stop
        head = unit % kv_heads
        tile = unit // kv_heads
        first, end_row = rows_of_tile(tile, tiles, tile_rows, count)
        emits = emits & (end_row == count)
        # A tile writes the step's tokens that it reads.
        end = cached + end_row
        own_first, beside_pool = 0, False
        if not in_line:
            # The last tiles of a prompt read most and go first.
            tile = tiles - 1 - tile
            first = tile * tile_rows
            end_row = tl.minimum(count, first + tile_rows)
            beside_pool = kind != DRAFT
            own_first = tl.where(beside_pool, first, 0)
            end = tl.where(beside_pool, cached, cached + end_row)
            read, start = reading_of(kind, cached + first, pillars, recent, window, BLOCK_N, HAS_WINDOW, CHUNKED)
            if HAS_WINDOW:
                # Nothing of the pool where the window begins behind it.
                hidden = last_hidden(first, cached, window, CHUNKED) >= -1
                end = tl.where(beside_pool & hidden, start, end)
            all_blocks = tl.maximum(read + end - start + BLOCK_N - 1, 0) // BLOCK_N
            end_block = all_blocks
            # Looked up ahead of a loop that may have nothing to do.
            end = tl.maximum(end, start + 1)

        wide_request, wide_head = request.to(tl.int64), head.to(tl.int64)
        q_base = q + first_row * stride_q_row + wide_head * (GROUP * stride_q_head)
        stride_out_row = kv_heads * (GROUP * VALUE_DIM)
        out_base = out + first_row * stride_out_row + wide_head * (GROUP * VALUE_DIM)
        packed = (q_base, stride_q_row, stride_q_head, out_base, stride_out_row)
        source = Source(
            kv + wide_head * stride_head,
            k + first_row * stride_k_row + wide_head * stride_k_head,
            v + first_row * stride_v_row + wide_head * stride_v_head,
            page_table + wide_request * stride_table,
            page_units,
            stride_k_row,
            stride_v_row,
            cached,
        )
        index_base = pillar_index + wide_request * stride_pillar_request + wide_head * stride_pillar_head
        slot = tl.load(score_slot + request, mask=scored > 0, other=0).to(tl.int64)
        score_base = scores + slot * stride_score_slot + wide_head * stride_score_head
        if (end_block > first_block) | (not in_line):
            listed = Listed(index_base, read, start, end)
            measured_from = recent
            if HAS_WINDOW:
                measured_from = tl.maximum(recent, last_hidden(cached, 0, window, CHUNKED) + 1)
            measured = Listed(index_base, measuring_pillars(pillars, recent, end), measured_from, end)
            blocks = (first_block, end_block, all_blocks)
            own = (own_first, end_row, beside_pool)
            score = (emits & (not again), score_base, scored)
            workspace = (parts, counters, first_program, last_program)
            heads = (sinks, wide_head * GROUP)
            work = (packed, source, listed, measured, heads, blocks, (first, end_row), own, score, workspace)
            if kind == DRAFT:
                attend_segment_apart(work, settings, LAYER, DRAFT_TILE)
            elif small:
                attend_segment_apart(work, settings, LAYER, SMALL_TILE)
            else:
                finished = attend_segment(work, settings, LAYER, BIG_TILE)
        again = not finished
        at = tl.where(finished, next_at, at)
    # Rare, and behind the loop: in front of it, ptxas would keep more of the loop's constants in memory.
    if row_end > real_rows:
        clear_gaps(out, row_end, width, request_mode, row_start, row_count, requests, REQUESTS)


@triton.jit
def clear_row(out, row, width):
    """Zero a row of ``out`` [rows, width]."""
    target = out + tl.cast(row, tl.int64) * width
    for low in range(0, width, 1024):
        element = low + tl.arange(0, 1024)
        tl.store(target + element, tl.zeros((1024,), out.dtype.element_ty), mask=element < width)


@triton.jit
def clear_rows(out, first, end, width):
    """Zero rows first .. end - 1 of ``out``, every program its share."""
    for row in range(first + tl.program_id(0), end, tl.num_programs(0)):
        clear_row(out, row, width)


@triton.jit
def clear_gaps(out, end, width, request_mode, row_start, row_count, requests, REQUESTS: tl.constexpr):
    """Zero those of the rows before ``end`` that belong to no request, every program its share."""
    slot = tl.arange(0, REQUESTS)
    inside = slot < requests
    kind = tl.load(request_mode + slot, mask=inside, other=IDLE)
    count = tl.load(row_count + slot, mask=inside & (kind != IDLE), other=0)
    start = tl.load(row_start + slot, mask=inside, other=0)
    for row in range(tl.program_id(0), end, tl.num_programs(0)):
        owned = tl.sum(((start <= row) & (row < start + count)).to(tl.int32), 0)
        if owned == 0:
            clear_row(out, row, width)
