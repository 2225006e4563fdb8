"""The loops over keys and values with a running maximum: blocks of the pool, and the step's own rows.

Pages are looked up one block ahead and pillars two, so that keys can be fetched well before their turn. Addresses take
as many instructions as products, and instructions are what these loops wait for: no masks on loads, see positions_of,
and 32 bits where they do, see pool_pointers.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    load_pillars,
    load_tokens,
    load_two_blocks,
    order_of,
    pages_of,
    pool_pointers,
    positions_of,
    products,
    raise_largest,
    row_pointers,
    scale_of_products,
)


@triton.jit
def places_of(listed, block, pillar, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Positions of a block, and the positions to be read in their place: (position, reached)."""
    position = positions_of(listed, block, pillar, TILE.keys, TILE.listed)
    reached = position
    if LAYER.has_window:
        # A weight of 0 would still spread a NaN from before the window. Some row sees the last of the list.
        reached = tl.where(position > rows[1] - settings[0], position, listed.end - 1)
    return position, reached


@triton.jit
def find_block(source, listed, block, pillar, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """``places_of`` a block and their pages: (position, reached, page)."""
    position, reached = places_of(listed, block, pillar, rows, settings, LAYER, TILE)
    return position, reached, pages_of(source, reached, LAYER.pool)


@triton.jit
def look_up(source, listed, block, pillar, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """What ``find_block`` finds, and pillars of the block behind."""
    position, reached, page = find_block(source, listed, block, pillar, rows, settings, LAYER, TILE)
    if TILE.listed:
        pillar = load_pillars(listed, block + 1, TILE.keys)
    return position, reached, page, pillar


@triton.jit
def first_look_up(source, listed, block, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """``look_up`` where nothing has been loaded ahead. Call it before anything else has to be waited for."""
    pillar, following = 0, 0
    if TILE.listed:
        both = load_two_blocks(listed, block, TILE.keys)
        # ptxas moves nothing over a barrier. Without one it waits for pillars first, and then loads what stands above.
        tl.debug_barrier()
        pillar, following = tl.split(both)
    position, reached, page = find_block(source, listed, block, pillar, rows, settings, LAYER, TILE)
    return position, reached, page, following


@triton.jit
def where_seen(product, position, order, row_position, end, window, KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Products, -inf where a row does not see a key; KEYS is the axis that the keys' positions lack, -2 or -1."""
    seen = tl.expand_dims(order, KEYS)
    row = tl.expand_dims(row_position, -3 - KEYS)
    visible = (seen <= row) & (seen < end)
    if HAS_WINDOW:
        visible = visible & (tl.expand_dims(position, KEYS) > row - window)
    return tl.where(visible, product, float("-inf"))


@triton.jit
def read_block(query, source, listed, block, found, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Products [BLOCK_M, N] of a block, -inf where a row does not see a key, and its values.

    ``rows`` is (position of each pair's row, position of the tile's first, first block that some row does not see all
    of even without a window); ``found`` see look_up.
    """
    HAS_WINDOW: tl.constexpr = LAYER.has_window
    window, logit_scale, cap = settings
    position, reached, page = found[0], found[1], found[2]
    keys = load_tokens(pool_pointers(source, reached, page, 0, LAYER.key_pad, LAYER.pool), LAYER.key_dim, LAYER.key_pad)
    values = load_tokens(
        pool_pointers(source, reached, page, LAYER.key_dim, LAYER.value_pad, LAYER.pool),
        LAYER.value_dim,
        LAYER.value_pad,
    )
    product = products(query, keys, logit_scale, cap, LAYER)
    if HAS_WINDOW or block >= rows[2]:
        order = order_of(listed, block, TILE.keys)
        product = where_seen(product, position, order, rows[0], listed.end, window, -2, HAS_WINDOW)
    return product, values


@triton.jit
def absorb(product, values, factor, largest, total, sums, PRECISION: tl.constexpr):
    """One step of the running softmax."""
    raised, shift = raise_largest(product, largest, factor)
    weight = tl.exp2(product * factor - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weight, -1)
    sums = tl.dot(weight.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
    return raised, total, sums


@triton.jit
def attend_blocks(query, source, listed, first, end, found, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """(Largest base-2 logit, sum of weights, weighted sum of values) of each pair over blocks of the pool."""
    BLOCK_M: tl.constexpr = TILE.pairs
    VALUE_PAD: tl.constexpr = LAYER.value_pad
    factor = scale_of_products(settings[1], LAYER)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, VALUE_PAD), tl.float32)
    for block in tl.range(first, end, num_stages=TILE.ahead + 1):
        following = look_up(source, listed, block + 1, found[3], rows, settings, LAYER, TILE)
        product, values = read_block(query, source, listed, block, found, rows, settings, LAYER, TILE)
        found = following
        largest, total, sums = absorb(product, values, factor, largest, total, sums, LAYER.precision)
    return largest, total, sums


@triton.jit
def attend_own(query, source, place, first, count, state, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Carry the state over the request's own rows of the step, up to the end of the tile, read where they are."""
    KEY_DIM: tl.constexpr = LAYER.key_dim
    VALUE_DIM: tl.constexpr = LAYER.value_dim
    HAS_WINDOW: tl.constexpr = LAYER.has_window
    BLOCK_N: tl.constexpr = TILE.keys
    window, logit_scale, cap = settings
    factor = scale_of_products(logit_scale, LAYER)
    largest, total, sums = state
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
    for low in tl.range(
        begin, tl.minimum(count, first + TILE.pairs // LAYER.group), BLOCK_N, num_stages=TILE.ahead + 1
    ):
        row = low + tl.arange(0, BLOCK_N)
        real = tl.minimum(row, count - 1)
        keys = load_tokens(
            row_pointers(source.own_keys, real, source.stride_key_row, LAYER.key_pad), KEY_DIM, LAYER.key_pad
        )
        values = load_tokens(
            row_pointers(source.own_values, real, source.stride_value_row, LAYER.value_pad), VALUE_DIM, LAYER.value_pad
        )
        product = products(query, keys, logit_scale, cap, LAYER)
        if HAS_WINDOW:
            visible = (row[None, :] <= place[:, None]) & (row[None, :] > place[:, None] - window)
            product = tl.where(visible, product, float("-inf"))
        elif low + BLOCK_N > first:
            product = tl.where(row[None, :] <= place[:, None], product, float("-inf"))
        largest, total, sums = absorb(product, values, factor, largest, total, sums, LAYER.precision)
    return largest, total, sums
