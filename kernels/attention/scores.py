"""Scores that the attention pass cannot give out: a kernel of its own, and zeros for positions behind a window.

Prompts have theirs from here, and verifications with more scored rows than a tile. It is launched wherever such scores
may be asked for (``launch.Promise``), behind the attention: inside of that kernel its code would cost every step
registers.
"""

import triton
import triton.language as tl

from .loops import key_pointers, log_sum_of_list
from .plan import emits_scores, locate, measuring_pillars, tiles_of
from .tiles import (
    ANY_ADDRESS,
    ANY_VALUE,
    DRAFT,
    IDLE,
    PREFILL,
    LayerShape,
    Listed,
    LoopShape,
    PoolShape,
    Source,
    last_hidden,
    load_queries,
    load_sinks,
    load_tokens,
    pages_of,
    pairs_of_tile,
    products,
    scale_of_products,
)


@triton.jit
def clear_scores(scores, end, BLOCK: tl.constexpr):
    """Zero the scores of positions 0 .. end - 1: the window hides them from every scored row."""
    for low in range(0, end, BLOCK):
        position = low + tl.arange(0, BLOCK)
        tl.store(scores + position, tl.zeros((BLOCK,), scores.dtype.element_ty), mask=position < end)


@triton.jit
def score_rows_of(
    query_base,
    source,
    pillar_index,
    scores,
    request,
    sinks,
    settings,
    stride_q_row,
    stride_q_head,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores of one request and KV head: twice over the keys for each tile of scored rows.

    ``request`` is (mode, rows, scored rows, pillars that measure, first recent position); for ``sinks`` and the others
    see ``segment``. TILE is a `LoopShape`.
    """
    kind, count, scored, pillars, recent = request
    GROUP: tl.constexpr = LAYER.group
    KEY_DIM: tl.constexpr = LAYER.key_dim
    KEY_PAD: tl.constexpr = LAYER.key_pad
    HAS_WINDOW: tl.constexpr = LAYER.has_window
    BLOCK_M: tl.constexpr = TILE.pairs
    BLOCK_N: tl.constexpr = TILE.keys
    LIST_TILE: tl.constexpr = LoopShape(BLOCK_M, BLOCK_N, TILE.ahead, True)
    window, logit_scale, cap = settings
    cached = source.cached
    unscored = count - scored
    scored_end = cached + unscored
    everything = kind == PREFILL
    factor = scale_of_products(logit_scale, LAYER)
    seen, low = 0, 0
    if HAS_WINDOW:
        seen = tl.maximum(last_hidden(scored_end, 0, window, LAYER.chunked) + 1, 0)
        low = seen // BLOCK_N * BLOCK_N
        clear_scores(scores, tl.minimum(low, scored_end), BLOCK_N)
    listed = Listed(
        pillar_index,
        tl.where(everything, 0, pillars),
        tl.where(everything, seen, tl.maximum(recent, seen)),
        cached + count,
    )
    for first in range(unscored, count, BLOCK_M // GROUP):
        place, member, real_pair = pairs_of_tile(first, count, GROUP, BLOCK_M)
        query = load_queries(query_base, stride_q_row, stride_q_head, place, member, real_pair, KEY_DIM, KEY_PAD)
        row_position = cached + place
        sink = None
        if LAYER.has_sinks:
            sink = load_sinks(sinks[0], sinks[1], member)
        measure = log_sum_of_list(query, row_position, source, listed, sink, settings, LAYER, LIST_TILE, True)
        for block in tl.range(low // BLOCK_N, (scored_end + BLOCK_N - 1) // BLOCK_N, num_stages=TILE.ahead + 1):
            position = block * BLOCK_N + tl.arange(0, BLOCK_N)
            reached = tl.minimum(position, scored_end - 1)
            page = pages_of(source, reached, LAYER.pool)
            keys = load_tokens(key_pointers(source, reached, page, KEY_PAD, LAYER.pool, True), KEY_DIM, KEY_PAD)
            real = position < scored_end
            if HAS_WINDOW:
                real = real & (position >= seen)
            product = products(keys, query, logit_scale, cap, LAYER)
            visible = real[:, None] & real_pair[None, :]
            if HAS_WINDOW:
                hidden = last_hidden(row_position, 0, window, LAYER.chunked)
                visible = visible & (position[:, None] > hidden[None, :])
            looked = tl.where(visible, tl.minimum(tl.exp2(product * factor - measure), 1.0), 0.0)
            result = tl.sum(looked, 1) / (scored * GROUP)
            inside = position < scored_end
            if first > unscored:
                result += tl.load(scores + position, mask=inside, other=0.0)
            tl.store(scores + position, result, mask=inside)
        # The next tile adds to what other threads may have stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=ANY_VALUE, do_not_specialize_on_alignment=ANY_ADDRESS)
def score_kernel(
    q,
    k,
    kv,
    scores,
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
    kv_heads,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
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
    BLOCK_N: tl.constexpr,
    SCORED_AHEAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """Persistent: any number of programs deals out the heads of requests whose scores the attention kernel leaves."""
    settings = (window, logit_scale, cap)
    POOL: tl.constexpr = PoolShape(PAGE_SIZE, UNIT, TOKEN_UNITS, WIDE_UNITS)
    LAYER: tl.constexpr = LayerShape(
        GROUP, KEY_DIM, VALUE_DIM, KEY_PAD, VALUE_PAD, POOL, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HAS_SINKS, CHUNKED
    )
    TILE: tl.constexpr = LoopShape(BIG_M, BLOCK_N, SCORED_AHEAD, False)
    slot = tl.arange(0, REQUESTS)
    inside = slot < requests
    kind = tl.load(request_mode + slot, mask=inside, other=IDLE)
    count = tl.load(row_count + slot, mask=inside & (kind != IDLE), other=0)
    scored = tl.load(score_rows + slot, mask=inside, other=0)
    _, tile_rows, _ = tiles_of(kind, count, scored, GROUP, SMALL_M, BIG_M)
    left = (count > 0) & (scored > 0) & (kind != DRAFT)
    left = left & (emits_scores(kind, scored, tile_rows, SCORED_AHEAD > 0) == 0)
    ends = tl.cumsum(tl.where(left, kv_heads, 0), 0)
    for unit in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        request, first_unit = locate(ends, unit)
        wide_request, head = request.to(tl.int64), (unit - first_unit).to(tl.int64)
        first_row = tl.load(row_start + request).to(tl.int64)
        cached = tl.load(cached_length + request)
        count_here = tl.load(row_count + request)
        recent = tl.load(recent_start + request)
        pillars = measuring_pillars(tl.load(pillar_count + request), recent, cached + count_here)
        own_keys = k + first_row * stride_k_row + head * stride_k_head
        # Nobody reads values here.
        source = Source(
            kv + head * stride_head,
            own_keys,
            own_keys,
            page_table + wide_request * stride_table,
            page_units,
            stride_k_row,
            stride_k_row,
            cached,
        )
        asked = (tl.load(request_mode + request), count_here, tl.load(score_rows + request), pillars, recent)
        score_rows_of(
            q + first_row * stride_q_row + head * (GROUP * stride_q_head),
            source,
            pillar_index + wide_request * stride_pillar_request + head * stride_pillar_head,
            scores + tl.load(score_slot + request).to(tl.int64) * stride_score_slot + head * stride_score_head,
            asked,
            (sinks, head * GROUP),
            settings,
            stride_q_row,
            stride_q_head,
            LAYER,
            TILE,
        )
