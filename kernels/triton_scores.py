"""Scores of rows that the attention pass cannot give out, in a pass of their own, and of positions behind a window."""

import triton
import triton.language as tl

from .triton_scored import key_pointers, log_sum_of_list
from .triton_tiles import PREFILL, load_queries, load_tokens, pages_of, pairs_of_tile, products, scale_of_products


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

    For prompts, once each, and for verifications with more scored rows than a tile has.
    """
    GROUP: tl.constexpr = LAYER[0]
    KEY_DIM: tl.constexpr = LAYER[1]
    KEY_PAD: tl.constexpr = LAYER[3]
    HAS_WINDOW: tl.constexpr = LAYER[6]
    BLOCK_M: tl.constexpr = TILE[0]
    BLOCK_N: tl.constexpr = TILE[7]
    LIST_TILE: tl.constexpr = (BLOCK_M, TILE[1], BLOCK_N, TILE[8], TILE[4], True)
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
        measure = log_sum_of_list(query, row_position, source, listed, settings, LAYER, LIST_TILE, True)
        for block in tl.range(low // BLOCK_N, (scored_end + BLOCK_N - 1) // BLOCK_N, num_stages=TILE[8] + 1):
            position = block * BLOCK_N + tl.arange(0, BLOCK_N)
            reached = tl.minimum(position, scored_end - 1)
            page = pages_of(source, reached, LAYER[5])
            keys = load_tokens(key_pointers(source, reached, page, KEY_PAD, LAYER[5], True), KEY_DIM, KEY_PAD)
            real = position < scored_end
            if HAS_WINDOW:
                real = real & (position >= seen)
            product = products(keys, query, logit_scale, cap, LAYER)
            visible = real[:, None] & real_pair[None, :]
            if HAS_WINDOW:
                visible = visible & (position[:, None] > row_position[None, :] - window)
            looked = tl.where(visible, tl.minimum(tl.exp2(product * factor - measure), 1.0), 0.0)
            result = tl.sum(looked, 1) / (scored * GROUP)
            inside = position < scored_end
            if first > unscored:
                result += tl.load(scores + position, mask=inside, other=0.0)
            tl.store(scores + position, result, mask=inside)
        # The next tile adds to what other threads may have stored.
        tl.debug_barrier()
