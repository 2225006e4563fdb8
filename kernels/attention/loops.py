"""The loops over keys and values: with a running maximum, and those that give out scores.

Pages are looked up one block ahead and pillars two, so that keys can be fetched well before their turn. Addresses take
as many instructions as products, and instructions are what these loops wait for: no masks on loads, see positions_of,
and 32 bits where they do, see pool_pointers.

With scores, weights are measured from a number known before the loop: the log-sum-exp over a few positions that hold
most of a softmax's sum, see ``log_sum_of_list``. Against a fixed measure a softmax needs no largest logit and rescales
nothing, so nothing of a block has to meet across keys. These loops therefore compute K Q^T and V^T P^T where the others
compute Q K^T and P V: the pairs of a key, which a score sums over, stay within a few threads. A block of 64 keys takes
4 exchanges between threads instead of some 50, and none between warps.

A weight can leave the range of numbers, if a row looks at something far more than at all that measures it. Whoever
calls finds out from the sums, and attends again with a running maximum.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2_E,
    as_kept,
    last_hidden,
    load_pillars,
    load_rows,
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

FAR_BELOW = tl.constexpr(-1e30)
"""A base-2 logit below all others; unlike -inf, it can be subtracted from itself."""

EDGE = tl.constexpr(16)
"""Keys that are taken at a time at the edge of a window, where few stand: the fewest that products can sum over."""


@triton.jit
def places_of(listed, block, pillar, rows, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Positions of a block, and the positions to be read in their place: (position, reached)."""
    position = positions_of(listed, block, pillar, TILE.keys, TILE.listed)
    reached = position
    if LAYER.has_window:
        # A weight of 0 would still spread a NaN from before the window. Some row sees the last of the list.
        hidden = last_hidden(rows[1], 0, settings[0], LAYER.chunked)
        reached = tl.where(position > hidden, position, listed.end - 1)
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
def where_seen(product, position, order, row_position, end, window, KEYS: tl.constexpr, LAYER: tl.constexpr):
    """Products, -inf where a row does not see a key; KEYS is the axis that the keys' positions lack, -2 or -1."""
    seen = tl.expand_dims(order, KEYS)
    row = tl.expand_dims(row_position, -3 - KEYS)
    visible = (seen <= row) & (seen < end)
    if LAYER.has_window:
        visible = visible & (tl.expand_dims(position, KEYS) > last_hidden(row, 0, window, LAYER.chunked))
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
        product = where_seen(product, position, order, rows[0], listed.end, window, -2, LAYER)
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
def absorb_sinks(sink, largest, total, sums):
    """One step of the running softmax, by a logit of each pair that has no value."""
    raised = tl.maximum(largest, sink)
    # A pair may have seen nothing and have no sink: -inf - -inf is not a number.
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    fade = tl.exp2(largest - shift)
    return raised, total * fade + tl.exp2(sink - shift), sums * fade[:, None]


@triton.jit
def nothing_seen(LAYER: tl.constexpr, TILE: tl.constexpr):
    """The state (largest base-2 logit, sum of weights, weighted sum of values) of each pair before any key."""
    largest = tl.full((TILE.pairs,), float("-inf"), tl.float32)
    return largest, tl.zeros((TILE.pairs,), tl.float32), tl.zeros((TILE.pairs, LAYER.value_pad), tl.float32)


@triton.jit
def attend_blocks(
    query, source, listed, first, end, found, rows, state, settings, LAYER: tl.constexpr, TILE: tl.constexpr
):
    """Carry the state over blocks of the pool."""
    factor = scale_of_products(settings[1], LAYER)
    largest, total, sums = state
    for block in tl.range(first, end, num_stages=TILE.ahead + 1):
        following = look_up(source, listed, block + 1, found[3], rows, settings, LAYER, TILE)
        product, values = read_block(query, source, listed, block, found, rows, settings, LAYER, TILE)
        found = following
        largest, total, sums = absorb(product, values, factor, largest, total, sums, LAYER.precision)
    return largest, total, sums


@triton.jit
def attend_to_tile(query, source, written, place, first, count, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """The state after the tile's own rows first .. count - 1, of which each pair sees those up to its own.

    ``written`` are the keys and values [ROWS, PAD] of these rows as they went to the pool.
    """
    window, logit_scale, cap = settings
    row = first + tl.arange(0, TILE.rows_pad)
    if LAYER.has_window:
        # Other code for windows leaves no registers to keep them in until here.
        keys, values, _, _ = load_rows(source, first, count, TILE.rows_pad, LAYER)
        keys, values = as_kept(keys, values, LAYER)
    else:
        # Written operands of a product as they are would go through shared memory in tiles that have no product, too.
        real = (row < count)[:, None]
        keys, values = tl.where(real, written[0], 0.0), tl.where(real, written[1], 0.0)
    product = products(query, keys, logit_scale, cap, LAYER)
    visible = row[None, :] <= place[:, None]
    if LAYER.has_window:
        visible = visible & (row[None, :] > last_hidden(place, source.cached, window, LAYER.chunked)[:, None])
    product = tl.where(visible, product, float("-inf"))
    largest, total, sums = nothing_seen(LAYER, TILE)
    return absorb(product, values, scale_of_products(logit_scale, LAYER), largest, total, sums, LAYER.precision)


@triton.jit
def attend_own(query, source, place, first, count, state, settings, LAYER: tl.constexpr, TILE: tl.constexpr):
    """Carry the state over the request's rows of the step before ``first``, read where they are.

    Rows first .. count - 1 are the tile's. Without a window each of them sees all of those before.
    """
    begin = 0
    if LAYER.has_window:
        hidden_from_all = last_hidden(first, source.cached, settings[0], LAYER.chunked)
        hidden = last_hidden(count - 1, source.cached, settings[0], LAYER.chunked)
        edge = tl.maximum(hidden_from_all + 1, 0)
        hidden_from_some = tl.minimum(tl.maximum(hidden + 1, 0), first)
        begin = edge + (hidden_from_some - edge + EDGE - 1) // EDGE * EDGE
        state = _attend_own(query, source, place, first, edge, begin, state, settings, LAYER, TILE, True)
    return _attend_own(query, source, place, first, begin, first, state, settings, LAYER, TILE, False)


@triton.jit
def _attend_own(
    query,
    source,
    place,
    first,
    begin,
    end,
    state,
    settings,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
    AT_EDGE: tl.constexpr,
):
    """``attend_own`` over blocks from ``begin`` to ``end``; AT_EDGE if the window hides some rows from some pairs."""
    KEY_DIM: tl.constexpr = LAYER.key_dim
    VALUE_DIM: tl.constexpr = LAYER.value_dim
    BLOCK_N: tl.constexpr = EDGE if AT_EDGE else TILE.keys
    AHEAD: tl.constexpr = 0 if AT_EDGE else TILE.ahead
    window, logit_scale, cap = settings
    factor = scale_of_products(logit_scale, LAYER)
    largest, total, sums = state
    for low in tl.range(begin, end, BLOCK_N, num_stages=AHEAD + 1):
        row = low + tl.arange(0, BLOCK_N)
        real = tl.minimum(row, first - 1)
        keys = load_tokens(
            row_pointers(source.own_keys, real, source.stride_key_row, LAYER.key_pad), KEY_DIM, LAYER.key_pad
        )
        values = load_tokens(
            row_pointers(source.own_values, real, source.stride_value_row, LAYER.value_pad), VALUE_DIM, LAYER.value_pad
        )
        if AT_EDGE:
            keys, values = as_kept(keys, values, LAYER)
        product = products(query, keys, logit_scale, cap, LAYER)
        if AT_EDGE:
            hidden = last_hidden(place, source.cached, window, LAYER.chunked)
            visible = (row < first)[None, :] & (row[None, :] > hidden[:, None])
            product = tl.where(visible, product, float("-inf"))
        elif low + BLOCK_N > first:
            product = tl.where((row < first)[None, :], product, float("-inf"))
        largest, total, sums = absorb(product, values, factor, largest, total, sums, LAYER.precision)
    return largest, total, sums


@triton.jit
def _per_thread(weight, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """[BLOCK_N, BLOCK_M] as [BLOCK_N // 16, 2, 8, BLOCK_M]: products leave the two of axis 1 in the same thread."""
    return tl.reshape(weight, (BLOCK_N // 16, 2, 8, BLOCK_M))


@triton.jit
def _over_keys(state):
    """Sums [BLOCK_M] of [BLOCK_N // 16, 8, BLOCK_M]."""
    return tl.sum(tl.sum(state, 0), 0)


@triton.jit
def _quick_log2(x):
    """log2 of normal numbers to 4e-6: the bits' own estimate, within 0.09, and two Newton steps of exp2.

    Every thread takes the logarithms of all pairs that it holds keys of; tl.log2 would be 40 instructions for each.
    """
    y = (x.to(tl.int32, bitcast=True) - 0x3F800000).to(tl.float32) * 2.0**-23
    y += (x * tl.exp2(-y) - 1.0) * LOG2_E
    return y + (x * tl.exp2(-y) - 1.0) * LOG2_E


@triton.jit
def key_pointers(source, position, page, PAD: tl.constexpr, POOL: tl.constexpr, BESIDE_POOL: tl.constexpr):
    """Addresses [N, PAD] of keys: in the pool, or, BESIDE_POOL, those of the step's own tokens in k."""
    pointers = pool_pointers(source, position, page, 0, PAD, POOL)
    if BESIDE_POOL:
        cached = source.cached
        own = row_pointers(source.own_keys, tl.maximum(position - cached, 0), source.stride_key_row, PAD)
        pointers = tl.where((position >= cached)[:, None], own, pointers)
    return pointers


@triton.jit
def log_sum_of_list(
    query,
    row_position,
    source,
    listed,
    sink,
    settings,
    LAYER: tl.constexpr,
    TILE: tl.constexpr,
    BESIDE_POOL: tl.constexpr,
):
    """Base-2 log-sum-exp [BLOCK_M] of each pair's sink and its logits over those positions of a list that its row sees.

    Every thread carries a running softmax of its own over its keys; they meet once, behind the last block.
    """
    BLOCK_M: tl.constexpr = TILE.pairs
    BLOCK_N: tl.constexpr = TILE.keys
    window, logit_scale, cap = settings
    factor = scale_of_products(logit_scale, LAYER)
    largest = tl.full((BLOCK_N // 16, 8, BLOCK_M), FAR_BELOW, tl.float32)
    total = tl.zeros((BLOCK_N // 16, 8, BLOCK_M), tl.float32)
    rows = (row_position, tl.min(row_position, 0), 0)
    blocks = (listed.pillar_count + listed.end - listed.start + BLOCK_N - 1) // BLOCK_N
    found = first_look_up(source, listed, 0, rows, settings, LAYER, TILE)
    for block in tl.range(0, blocks, num_stages=TILE.ahead + 1):
        following = look_up(source, listed, block + 1, found[3], rows, settings, LAYER, TILE)
        position, reached, page = found[0], found[1], found[2]
        found = following
        keys = load_tokens(
            key_pointers(source, reached, page, LAYER.key_pad, LAYER.pool, BESIDE_POOL), LAYER.key_dim, LAYER.key_pad
        )
        product = products(keys, query, logit_scale, cap, LAYER)
        order = order_of(listed, block, BLOCK_N)
        if LAYER.has_window or (block + 1) * BLOCK_N > listed.pillar_count:
            product = where_seen(product, position, order, row_position, listed.end, window, -1, LAYER)
        logit = _per_thread(product * factor, BLOCK_N, BLOCK_M)
        raised = tl.maximum(largest, tl.max(logit, 1))
        total = total * tl.exp2(largest - raised) + tl.sum(tl.exp2(logit - raised[:, None, :, :]), 1)
        largest = raised
    top = tl.max(tl.max(largest, 0), 0)
    if LAYER.has_sinks:
        top = tl.maximum(top, sink)
    result = _over_keys(total * tl.exp2(largest - top))
    if LAYER.has_sinks:
        result += tl.exp2(sink - top)
    return top + _quick_log2(result)


@triton.jit
def attend_scored(
    query, source, listed, first, end, found, rows, looks, settings, LAYER: tl.constexpr, TILE: tl.constexpr
):
    """Sums of weights [BLOCK_M] and weighted sums of values [BLOCK_M, VALUE_PAD] over blocks of the pool.

    ``found`` are the pages of the first. Gives out the scores of their positions: ``looks`` is (scores, end of scored
    positions, measure, share), with the base-2 logits [BLOCK_M] that weights are measured from, infinite for what is no
    pair.
    """
    BLOCK_M: tl.constexpr = TILE.pairs
    BLOCK_N: tl.constexpr = TILE.keys
    factor = scale_of_products(settings[1], LAYER)
    scores, scored_end, measure, share = looks
    total = tl.zeros((BLOCK_N // 16, 8, BLOCK_M), tl.float32)
    sums = tl.zeros((LAYER.value_pad, BLOCK_M), tl.float32)
    for block in tl.range(first, end, num_stages=TILE.ahead + 1):
        following = find_block(source, listed, block + 1, 0, rows, settings, LAYER, TILE)[2]
        # Counted again rather than kept: a thread has no register to spare here.
        position, reached = places_of(listed, block, 0, rows, settings, LAYER, TILE)
        page = found
        found = following
        values = load_tokens(
            pool_pointers(source, reached, page, LAYER.key_dim, LAYER.value_pad, LAYER.pool),
            LAYER.value_dim,
            LAYER.value_pad,
        )
        keys = pool_pointers(source, reached, page, 0, LAYER.key_pad, LAYER.pool)
        if query.dtype.primitive_bitwidth == 16:
            # The compiler hands loaded keys to tensor cores in shared memory, and then keeps one more block of them
            # there than fits. What it has to convert, even to the same bits, it hands over in registers.
            keys = load_tokens(keys.to(tl.pointer_type(tl.int16)), LAYER.key_dim, LAYER.key_pad).to(
                query.dtype, bitcast=True
            )
        else:
            keys = load_tokens(keys, LAYER.key_dim, LAYER.key_pad)
        product = products(keys, query, settings[1], settings[2], LAYER)
        order = order_of(listed, block, BLOCK_N)
        if LAYER.has_window or block >= rows[2]:
            product = where_seen(product, position, order, rows[0], listed.end, settings[0], -1, LAYER)
        weight = tl.exp2(product * factor - measure)
        looked = tl.sum(tl.minimum(weight, 1.0), 1) * share
        tl.store(scores + order, looked, mask=order < scored_end)
        total += tl.sum(_per_thread(weight, BLOCK_N, BLOCK_M), 1)
        sums = tl.dot(tl.trans(values), weight.to(values.dtype), sums, input_precision=LAYER.precision)
    return _over_keys(total), tl.trans(sums)
