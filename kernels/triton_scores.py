"""The score output: what measures a row's attention, and the separate pass for rows the attention pass cannot serve."""

import triton
import triton.language as tl

from .triton_tiles import (
    PREFILL,
    dense_positions,
    listed_positions,
    load_pillars,
    load_queries,
    load_tokens,
    pages_of,
    pairs_of_tile,
    products,
    raise_largest,
    scale_of_products,
    token_pointers,
)


@triton.jit
def log_sum_of_list(
    query,
    row_position,
    source,
    listed,
    settings,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 log-sum-exp [BLOCK_M] of each pair's logits over those positions of a list that its row sees."""
    window, logit_scale, cap = settings
    pillars, start, end = listed[1], listed[2], listed[3]
    factor = scale_of_products(logit_scale, HAS_SOFTCAP)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Pages are looked up one block ahead, and pillars two, so that keys can be fetched well before their turn.
    position = listed_positions(listed, 0, load_pillars(listed, 0, BLOCK_N), BLOCK_N)
    page = pages_of(source, position, PAGE_SIZE)
    pillar = load_pillars(listed, 1, BLOCK_N)
    for block in tl.range(0, (pillars + end - start + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
        dense = dense_positions(listed, block, BLOCK_N)
        key = token_pointers(source, position, page, PAGE_SIZE, KEY_DIM)[0]
        keys = load_tokens(key, dense < end, KEY_DIM, KEY_PAD)
        product = products(query, keys, logit_scale, cap, HAS_SOFTCAP, PRECISION)
        visible = (dense < end)[None, :] & (dense[None, :] <= row_position[:, None])
        if HAS_WINDOW:
            visible = visible & (position[None, :] > row_position[:, None] - window)
        position = listed_positions(listed, block + 1, pillar, BLOCK_N)
        page = pages_of(source, position, PAGE_SIZE)
        pillar = load_pillars(listed, block + 2, BLOCK_N)
        product = tl.where(visible, product, float("-inf"))
        raised, shift = raise_largest(product, largest, factor)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(product * factor - shift[:, None]), 1)
        largest = raised
    return largest + tl.log2(total)


@triton.jit
def clear_scores(scores, end, BLOCK: tl.constexpr):
    """Zero the scores of positions 0 .. end - 1: the window hides them from every scored row."""
    for low in range(0, end, BLOCK):
        position = low + tl.arange(0, BLOCK)
        tl.store(scores + position, tl.zeros((BLOCK,), scores.dtype.element_ty), mask=position < end)


@triton.jit
def score_separately(
    packed,
    source,
    pillar_index,
    scores,
    kind,
    count,
    scored,
    pillars,
    recent,
    settings,
    LAYER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of one request and KV head in a pass of its own: twice over the keys for each tile of scored rows.

    For prompts, once each, and for verifications of more rows than a tile has.
    """
    GROUP: tl.constexpr = LAYER[0]
    KEY_DIM: tl.constexpr = LAYER[1]
    KEY_PAD: tl.constexpr = LAYER[3]
    PAGE_SIZE: tl.constexpr = LAYER[5]
    HAS_WINDOW: tl.constexpr = LAYER[6]
    HAS_SOFTCAP: tl.constexpr = LAYER[7]
    PRECISION: tl.constexpr = LAYER[8]
    query_base, stride_q_row, stride_q_head = packed[0], packed[1], packed[2]
    window, logit_scale, cap = settings
    cached = source[8]
    unscored = count - scored
    scored_end = cached + unscored
    everything = kind == PREFILL
    factor = scale_of_products(logit_scale, HAS_SOFTCAP)
    seen, low = 0, 0
    if HAS_WINDOW:
        seen = tl.maximum(scored_end - window + 1, 0)
        low = seen // BLOCK_N * BLOCK_N
        clear_scores(scores, tl.minimum(low, scored_end), BLOCK_N)
    listed = (
        pillar_index,
        tl.where(everything, 0, pillars),
        tl.where(everything, seen, tl.maximum(recent, seen)),
        cached + count,
    )
    for first in range(unscored, count, BLOCK_M // GROUP):
        place, member, real_pair = pairs_of_tile(first, count, GROUP, BLOCK_M)
        query = load_queries(query_base, stride_q_row, stride_q_head, place, member, real_pair, KEY_DIM, KEY_PAD)
        row_position = cached + place
        measure = log_sum_of_list(
            query,
            row_position,
            source,
            listed,
            settings,
            KEY_DIM,
            KEY_PAD,
            PAGE_SIZE,
            BLOCK_M,
            BLOCK_N,
            STAGES,
            HAS_WINDOW,
            HAS_SOFTCAP,
            PRECISION,
        )
        lane = tl.arange(0, BLOCK_N)
        page = pages_of(source, low + lane, PAGE_SIZE)
        for block in tl.range(low // BLOCK_N, (scored_end + BLOCK_N - 1) // BLOCK_N, num_stages=STAGES):
            position = block * BLOCK_N + lane
            real = position < scored_end
            if HAS_WINDOW:
                real = real & (position >= seen)
            key = token_pointers(source, position, page, PAGE_SIZE, KEY_DIM)[0]
            keys = load_tokens(key, real, KEY_DIM, KEY_PAD)
            page = pages_of(source, position + BLOCK_N, PAGE_SIZE)
            product = products(query, keys, logit_scale, cap, HAS_SOFTCAP, PRECISION)
            visible = real_pair[:, None] & real[None, :]
            if HAS_WINDOW:
                visible = visible & (position[None, :] > row_position[:, None] - window)
            looked = tl.where(visible, tl.minimum(tl.exp2(product * factor - measure[:, None]), 1.0), 0.0)
            result = tl.sum(looked, 0) / (scored * GROUP)
            inside = position < scored_end
            if first > unscored:
                result += tl.load(scores + position, mask=inside, other=0.0)
            tl.store(scores + position, result, mask=inside)
        # The next tile adds to what other threads may have stored.
        tl.debug_barrier()
