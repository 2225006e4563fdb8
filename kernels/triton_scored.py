"""Attention that gives out scores: weights are measured from a number known before the loop, the other way round.

Scores are measured by a few positions that hold most of a softmax's sum, see ``log_sum_of_list``. Against a fixed
measure a softmax needs no largest logit and rescales nothing, so nothing of a block has to meet across keys. These
loops therefore compute K Q^T and V^T P^T where the others compute Q K^T and P V: the pairs of a key, which a score sums
over, stay within a few threads. A block of 64 keys takes 4 exchanges between threads instead of some 50, and none
between warps.

A weight can leave the range of numbers, if a row looks at something far more than at all that measures it. Whoever
calls finds out from the sums, and attends again with a running maximum.
"""

import triton
import triton.language as tl

from .triton_blocks import find_block, first_look_up, look_up, places_of, where_seen
from .triton_tiles import LOG2_E, load_tokens, order_of, pool_pointers, products, row_pointers, scale_of_products

FAR_BELOW = tl.constexpr(-1e30)
"""A base-2 logit below all others; unlike -inf, it can be subtracted from itself."""


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
    query, row_position, source, listed, settings, LAYER: tl.constexpr, TILE: tl.constexpr, BESIDE_POOL: tl.constexpr
):
    """Base-2 log-sum-exp [BLOCK_M] of each pair's logits over those positions of a list that its row sees.

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
            product = where_seen(product, position, order, row_position, listed.end, window, -1, LAYER.has_window)
        logit = _per_thread(product * factor, BLOCK_N, BLOCK_M)
        raised = tl.maximum(largest, tl.max(logit, 1))
        total = total * tl.exp2(largest - raised) + tl.sum(tl.exp2(logit - raised[:, None, :, :]), 1)
        largest = raised
    top = tl.max(tl.max(largest, 0), 0)
    return top + _quick_log2(_over_keys(total * tl.exp2(largest - top)))


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
            product = where_seen(product, position, order, rows[0], listed.end, settings[0], -1, LAYER.has_window)
        weight = tl.exp2(product * factor - measure)
        looked = tl.sum(tl.minimum(weight, 1.0), 1) * share
        tl.store(scores + order, looked, mask=order < scored_end)
        total += tl.sum(_per_thread(weight, BLOCK_N, BLOCK_M), 1)
        sums = tl.dot(tl.trans(values), weight.to(values.dtype), sums, input_precision=LAYER.precision)
    return _over_keys(total), tl.trans(sums)
