"""The loops over keys and values: blocks of the pool, without and with scores, and the step's own rows.

Loads are written where their results are used. The compiler's software pipeline turns each into asynchronous copies
some blocks ahead, pillars before pages before keys and values: a plain load among them would return behind them, in
order, and hold everything up.

A tile of few rows has one product on tensor cores to share out, whatever it reads, so there is nothing to share
between warps but keys. With SPLITS each warp runs a softmax of its own over its part of every block, and they meet
once, behind the last: tensors get a leading dimension [SPLITS]. Below, [...] stands for it.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    load_tokens,
    order_of,
    pool_pointers,
    positions_of,
    products,
    raise_largest,
    row_pointers,
    scale_of_products,
)


@triton.jit
def read_block(query, source, listed, block, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Products [..., BLOCK_M, N] of a block, -inf where a row does not see a key, its values, and their order."""
    KEY_DIM: tl.constexpr = LAYER[1]
    VALUE_DIM: tl.constexpr = LAYER[2]
    HAS_WINDOW: tl.constexpr = LAYER[6]
    BLOCK_N: tl.constexpr = TILE[2]
    LISTED: tl.constexpr = TILE[5]
    SPLITS: tl.constexpr = TILE[6]
    row_position, first_position, ragged_block = rows
    window, logit_scale, cap = settings
    position = positions_of(listed, block, BLOCK_N, SPLITS, LISTED)
    reached = position
    if HAS_WINDOW:
        # A weight of 0 would still spread a NaN from before the window. Some row sees the last of the list.
        reached = tl.where(position > first_position - window, position, listed[3] - 1)
    keys = load_tokens(pool_pointers(source, reached, 0, LAYER[3], LAYER[5]), KEY_DIM, LAYER[3])
    values = load_tokens(pool_pointers(source, reached, KEY_DIM, LAYER[4], LAYER[5]), VALUE_DIM, LAYER[4])
    product = products(query, keys, logit_scale, cap, LAYER)
    order = order_of(listed, block, BLOCK_N, SPLITS)
    if HAS_WINDOW or block >= ragged_block:
        seen = tl.expand_dims(order, -2)
        visible = (seen <= row_position[:, None]) & (seen < listed[3])
        if HAS_WINDOW:
            visible = visible & (tl.expand_dims(position, -2) > row_position[:, None] - window)
        product = tl.where(visible, product, float("-inf"))
    return product, values, order


@triton.jit
def absorb(product, values, factor, largest, total, sums, PRECISION: tl.constexpr):
    """One step of the running softmax."""
    raised, shift = raise_largest(product, largest, factor)
    weight = tl.exp2(product * factor - tl.expand_dims(shift, -1))
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weight, -1)
    sums = tl.dot(weight.to(values.dtype), values, sums * tl.expand_dims(fade, -1), input_precision=PRECISION)
    return raised, total, sums


@triton.jit
def attend_blocks(
    query, source, listed, first, end, rows, state, settings, LAYER: tl.constexpr, TILE: tl.constexpr
):
    """Carry (largest base-2 logit, sum of weights, weighted sum of values) of each pair over blocks of the pool."""
    factor = scale_of_products(settings[1], LAYER)
    largest, total, sums = state
    for block in tl.range(first, end, num_stages=TILE[3] * (3 if TILE[5] else 2) + 1):
        product, values, _ = read_block(query, source, listed, block, rows, settings, LAYER, TILE)
        largest, total, sums = absorb(product, values, factor, largest, total, sums, LAYER[8])
    return largest, total, sums


@triton.jit
def attend_scored(
    query, source, listed, first, end, rows, looks, total, sums, settings, LAYER: tl.constexpr, TILE: tl.constexpr
):
    """Sums of weights and weighted sums of values over blocks of the pool, giving out the scores of their positions.

    ``looks`` is (scores, end of scored positions, measure, bound, share). Weights are measured from ``measure``, the
    log-sum-exp of what the drafts could see, and never rescaled. Whoever calls finds out whether that was in range.
    """
    factor = scale_of_products(settings[1], LAYER)
    scores, scored_end, measure, bound, share = looks
    for block in tl.range(first, end, num_stages=TILE[3] * 2 + 1):
        product, values, order = read_block(query, source, listed, block, rows, settings, LAYER, TILE)
        weight = tl.exp2(product * factor - measure[:, None])
        looked = tl.sum(tl.minimum(weight, bound[:, None]), -2) * share
        tl.store(scores + order, looked, mask=order < scored_end)
        total += tl.sum(weight, -1)
        sums = tl.dot(weight.to(values.dtype), values, sums, input_precision=LAYER[8])
    return total, sums


@triton.jit
def attend_own(query, source, place, first, count, state, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Carry the state over the request's own rows of the step, up to the end of the tile, read where they are."""
    KEY_DIM: tl.constexpr = LAYER[1]
    VALUE_DIM: tl.constexpr = LAYER[2]
    HAS_WINDOW: tl.constexpr = LAYER[6]
    BLOCK_N: tl.constexpr = TILE[2]
    window, logit_scale, cap = settings
    factor = scale_of_products(logit_scale, LAYER)
    largest, total, sums = state
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    for low in tl.range(begin, tl.minimum(count, first + TILE[0] // LAYER[0]), BLOCK_N, num_stages=TILE[3] + 1):
        row = low + tl.arange(0, BLOCK_N)
        real = tl.minimum(row, count - 1)
        keys = load_tokens(row_pointers(source[1], real, source[5], LAYER[3]), KEY_DIM, LAYER[3])
        values = load_tokens(row_pointers(source[2], real, source[6], LAYER[4]), VALUE_DIM, LAYER[4])
        product = products(query, keys, logit_scale, cap, LAYER)
        if HAS_WINDOW:
            visible = (row[None, :] <= place[:, None]) & (row[None, :] > place[:, None] - window)
            product = tl.where(visible, product, float("-inf"))
        elif low + BLOCK_N > first:
            product = tl.where(row[None, :] <= place[:, None], product, float("-inf"))
        largest, total, sums = absorb(product, values, factor, largest, total, sums, LAYER[8])
    return largest, total, sums
