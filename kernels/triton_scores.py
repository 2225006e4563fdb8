"""The score output: what measures a row's attention, and the separate pass for rows the attention pass cannot serve."""

import triton
import triton.language as tl

from .triton_tiles import (
    PREFILL,
    join_splits,
    load_pillars,
    load_queries,
    load_tokens,
    order_of,
    pages_of,
    pairs_of_tile,
    pool_pointers,
    positions_of,
    products,
    raise_largest,
    row_pointers,
    scale_of_products,
)


@triton.jit
def key_pointers(source, position, PAD: tl.constexpr, POOL: tl.constexpr, BESIDE_POOL: tl.constexpr):
    """Addresses [..., PAD] of keys: in the pool, or, BESIDE_POOL, those of the step's own tokens in k."""
    if BESIDE_POOL:
        cached = source[7]
        # Any position of a request's reserved pages serves for those that come from k.
        pooled = tl.minimum(position, tl.maximum(cached - 1, 0))
        pooled = pool_pointers(source, pooled, pages_of(source, pooled, POOL), 0, PAD, POOL)
        own = row_pointers(source[1], tl.maximum(position - cached, 0), source[5], PAD)
        pointers = tl.where(tl.expand_dims(position >= cached, -1), own, pooled)
    else:
        pointers = pool_pointers(source, position, pages_of(source, position, POOL), 0, PAD, POOL)
    return pointers


@triton.jit
def log_sum_of_list(
    query,
    row_position,
    source,
    listed,
    settings,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
    BESIDE_POOL: tl.constexpr,
):
    """Base-2 log-sum-exp [BLOCK_M] of each pair's logits over those positions of a list that its row sees."""
    HAS_WINDOW: tl.constexpr = LAYER[6]
    BLOCK_N: tl.constexpr = TILE[2]
    SPLITS: tl.constexpr = TILE[6]
    STATE: tl.constexpr = (TILE[0],) if SPLITS == 1 else (SPLITS, TILE[0])
    window, logit_scale, cap = settings
    factor = scale_of_products(logit_scale, LAYER)
    largest = tl.full(STATE, float("-inf"), tl.float32)
    total = tl.zeros(STATE, tl.float32)
    entries = listed[1] + listed[3] - listed[2]
    for block in tl.range(0, (entries + BLOCK_N - 1) // BLOCK_N, num_stages=3 * TILE[3] + 1):
        pillar = load_pillars(listed, block, BLOCK_N, SPLITS)
        position = positions_of(listed, block, pillar, BLOCK_N, SPLITS, True)
        keys = load_tokens(key_pointers(source, position, LAYER[3], LAYER[5], BESIDE_POOL), LAYER[1], LAYER[3])
        product = products(query, keys, logit_scale, cap, LAYER)
        order = tl.expand_dims(order_of(listed, block, BLOCK_N, SPLITS), -2)
        visible = (order < listed[3]) & (order <= row_position[:, None])
        if HAS_WINDOW:
            visible = visible & (tl.expand_dims(position, -2) > row_position[:, None] - window)
        product = tl.where(visible, product, float("-inf"))
        raised, shift = raise_largest(product, largest, factor)
        weight = tl.exp2(product * factor - tl.expand_dims(shift, -1))
        total = total * tl.exp2(largest - shift) + tl.sum(weight, -1)
        largest = raised
    if SPLITS > 1:
        largest, _, total = join_splits(largest, total, 0)
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
    TILE: tl.constexpr,
):
    """Scores of one request and KV head in a pass of its own: twice over the keys for each tile of scored rows.

    For prompts, once each, and for verifications of more rows than a tile has.
    """
    GROUP: tl.constexpr = LAYER[0]
    KEY_DIM: tl.constexpr = LAYER[1]
    KEY_PAD: tl.constexpr = LAYER[3]
    HAS_WINDOW: tl.constexpr = LAYER[6]
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[2]
    query_base, stride_q_row, stride_q_head = packed[0], packed[1], packed[2]
    window, logit_scale, cap = settings
    cached = source[7]
    unscored = count - scored
    scored_end = cached + unscored
    everything = kind == PREFILL
    factor = scale_of_products(logit_scale, LAYER)
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
        measure = log_sum_of_list(query, row_position, source, listed, settings, LAYER, TILE, True)
        for block in tl.range(low // BLOCK_N, (scored_end + BLOCK_N - 1) // BLOCK_N, num_stages=2 * TILE[3] + 1):
            position = block * BLOCK_N + tl.arange(0, BLOCK_N)
            key = key_pointers(source, tl.minimum(position, scored_end - 1), KEY_PAD, LAYER[5], True)
            keys = load_tokens(key, KEY_DIM, KEY_PAD)
            real = position < scored_end
            if HAS_WINDOW:
                real = real & (position >= seen)
            product = products(query, keys, logit_scale, cap, LAYER)
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
