"""One segment: a tile of rows of one request attends, with one KV head, to consecutive blocks of what it reads."""

import triton
import triton.language as tl

from .triton_merge import arrive_last, join_parts, store_part, store_rows
from .triton_scores import clear_scores, log_sum_of_list
from .triton_tiles import (
    dense_positions,
    listed_positions,
    load_pillars,
    load_queries,
    load_tokens,
    pages_of,
    pairs_of_tile,
    pool_pointers,
    products,
    raise_largest,
    scale_of_products,
    token_pointers,
)
from .triton_write import write_tokens


@triton.jit
def absorb_block(product, factor, values, position, looks, largest, total, sums, PRECISION: tl.constexpr):
    """One step of the running softmax; gives out the scores of the block's positions if ``looks`` asks for them."""
    emits, scores, scored_end, measure, counted, share = looks
    raised, shift = raise_largest(product, largest, factor)
    weight = tl.exp2(product * factor - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weight, 1)
    if emits:
        # Weights are measured from the largest logit so far, scores from what the drafts could see. The bound keeps
        # the factor finite where weights are 0.
        turned = tl.where(counted, tl.exp2(tl.minimum(shift - measure, 126.0)) * share, 0.0)
        looked = tl.sum(tl.minimum(weight * turned[:, None], share), 0)
        tl.store(scores + position, looked, mask=position < scored_end)
    sums = tl.dot(weight.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
    return raised, total, sums


@triton.jit
def attend_segment(
    packed,
    source,
    listed,
    measured,
    blocks,
    rows,
    score,
    settings,
    workspace,
    LAYER: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_M: tl.constexpr,
    STAGES: tl.constexpr,
    LIST_STAGES: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Attend, and finish the unit if this is its only or its last part.

    ``packed`` is (q, its strides of a row and a head, out, its stride of a row), at the request and KV head;
    ``listed`` what the tile reads (see listed_positions) and ``measured`` what measures its scores; ``blocks``
    (first, end, all) which blocks of it; ``rows`` (first, count) of the tile and the request; ``score``
    (emits, scores, scored) with scores at the request's slot and head; ``workspace`` (parts, counters, first program,
    last program). LISTED tiles look positions up, others read consecutive ones from a multiple of BLOCK_N on.
    """
    GROUP: tl.constexpr = LAYER[0]
    KEY_DIM: tl.constexpr = LAYER[1]
    VALUE_DIM: tl.constexpr = LAYER[2]
    KEY_PAD: tl.constexpr = LAYER[3]
    VALUE_PAD: tl.constexpr = LAYER[4]
    PAGE_SIZE: tl.constexpr = LAYER[5]
    HAS_WINDOW: tl.constexpr = LAYER[6]
    HAS_SOFTCAP: tl.constexpr = LAYER[7]
    PRECISION: tl.constexpr = LAYER[8]
    query_base, stride_q_row, stride_q_head, out_base, stride_out_row = packed
    window, logit_scale, cap = settings
    first_block, end_block, all_blocks = blocks
    first, count = rows
    emits, scores, scored = score
    parts, counters, first_program, last_program = workspace
    cached = source[8]
    start, end = listed[2], listed[3]

    place, member, real_pair = pairs_of_tile(first, count, GROUP, BLOCK_M)
    query = load_queries(query_base, stride_q_row, stride_q_head, place, member, real_pair, KEY_DIM, KEY_PAD)
    row_position = cached + place
    scored_end = cached + count - scored
    measure = tl.zeros((BLOCK_M,), tl.float32)
    if emits:
        measure = log_sum_of_list(
            query,
            row_position,
            source,
            measured,
            settings,
            KEY_DIM,
            KEY_PAD,
            PAGE_SIZE,
            BLOCK_M,
            BLOCK_N,
            LIST_STAGES,
            HAS_WINDOW,
            HAS_SOFTCAP,
            PRECISION,
        )
        if HAS_WINDOW:
            clear_scores(scores, tl.where(first_block == 0, tl.minimum(start, scored_end), 0), BLOCK_N)
    counted = real_pair & (place >= count - scored)
    share = 1.0 / tl.maximum(scored * GROUP, 1).to(tl.float32)
    looks = (emits, scores, scored_end, measure, counted, share)
    factor = scale_of_products(logit_scale, HAS_SOFTCAP)

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, VALUE_PAD), tl.float32)
    next_block = first_block
    if not LISTED:
        # Blocks that lie in the pool and that every row sees need neither masks nor a choice of source.
        next_block = tl.maximum(tl.minimum(end_block, (cached - start) // BLOCK_N), first_block)
        page = pages_of(source, dense_positions(listed, first_block, BLOCK_N), PAGE_SIZE)
        for block in tl.range(first_block, next_block, num_stages=STAGES):
            position = dense_positions(listed, block, BLOCK_N)
            key = pool_pointers(source, position, page, PAGE_SIZE)
            real = position >= 0
            if HAS_WINDOW:
                real = position > cached + first - window
            keys = load_tokens(key, real, KEY_DIM, KEY_PAD)
            values = load_tokens(key + KEY_DIM, real, VALUE_DIM, VALUE_PAD)
            page = pages_of(source, position + BLOCK_N, PAGE_SIZE)
            product = products(query, keys, logit_scale, cap, HAS_SOFTCAP, PRECISION)
            if HAS_WINDOW:
                visible = position[None, :] > row_position[:, None] - window
                product = tl.where(visible, product, float("-inf"))
            largest, total, sums = absorb_block(
                product, factor, values, position, looks, largest, total, sums, PRECISION
            )

    # Pages are looked up one block ahead, and pillars two, so that keys can be fetched well before their turn.
    position = dense_positions(listed, next_block, BLOCK_N)
    if LISTED:
        position = listed_positions(listed, next_block, load_pillars(listed, next_block, BLOCK_N), BLOCK_N)
        pillar = load_pillars(listed, next_block + 1, BLOCK_N)
    page = pages_of(source, position, PAGE_SIZE)
    for block in tl.range(next_block, end_block, num_stages=LIST_STAGES if LISTED else STAGES):
        dense = dense_positions(listed, block, BLOCK_N)
        real = dense < end
        if HAS_WINDOW and not LISTED:
            real = real & (dense > cached + first - window)
        if not LISTED:
            position = dense
        key, value = token_pointers(source, position, page, PAGE_SIZE, KEY_DIM)
        keys = load_tokens(key, real, KEY_DIM, KEY_PAD)
        values = load_tokens(value, real, VALUE_DIM, VALUE_PAD)
        product = products(query, keys, logit_scale, cap, HAS_SOFTCAP, PRECISION)
        visible = real[None, :] & (dense[None, :] <= row_position[:, None])
        if HAS_WINDOW:
            visible = visible & (position[None, :] > row_position[:, None] - window)
        product = tl.where(visible, product, float("-inf"))
        if LISTED:
            position = listed_positions(listed, block + 1, pillar, BLOCK_N)
            page = pages_of(source, position, PAGE_SIZE)
            pillar = load_pillars(listed, block + 2, BLOCK_N)
        else:
            page = pages_of(source, dense + BLOCK_N, PAGE_SIZE)
        largest, total, sums = absorb_block(product, factor, values, dense, looks, largest, total, sums, PRECISION)

    target = out_base + (place.to(tl.int64) * stride_out_row) + member * VALUE_DIM
    if end_block - first_block == all_blocks:
        store_rows(target, sums, total, real_pair, VALUE_DIM, VALUE_PAD)
    else:
        number = 2 * tl.program_id(0) + tl.where(first_block == 0, 1, 0)
        store_part(parts, number, sums, total, largest, real_pair, PART_M, BLOCK_M, VALUE_DIM, VALUE_PAD)
        if arrive_last(counters, first_program, last_program):
            sums, total = join_parts(
                parts, first_program, last_program, real_pair, PART_M, BLOCK_M, VALUE_DIM, VALUE_PAD
            )
            store_rows(target, sums, total, real_pair, VALUE_DIM, VALUE_PAD)
    if end_block == all_blocks:
        write_tokens(
            source,
            first,
            count,
            BLOCK_M // GROUP,
            ROWS_PAD,
            PAGE_SIZE,
            KEY_DIM,
            VALUE_DIM,
            KEY_PAD,
            VALUE_PAD,
        )
