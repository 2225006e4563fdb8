"""Device functions that the attention kernel's parts share: rows of a tile, addresses of tokens, logits.

A tile holds BLOCK_M (row, query head) pairs of one request and one KV head, row by row: pair m is row m // GROUP and
query head m % GROUP of the KV head. Pages, rows and requests are widened to 64 bits before they are multiplied by a
stride: a pool or a score buffer may hold more than 2**31 elements.
"""

import triton
import triton.language as tl

IDLE = tl.constexpr(0)
DRAFT = tl.constexpr(1)
VERIFY = tl.constexpr(2)
PREFILL = tl.constexpr(3)
"""Values of ``kernels.ops.Mode``; a test holds them equal."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def pairs_of_tile(first, count, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row, query head and existence of each pair of a tile that begins with row ``first`` of ``count``."""
    BLOCK_ROWS: tl.constexpr = BLOCK_M // GROUP
    pair = tl.arange(0, BLOCK_M)
    place = first + pair // GROUP
    return place, pair % GROUP, (place < count) & (pair < BLOCK_ROWS * GROUP)


@triton.jit
def load_queries(query, stride_row, stride_head, place, member, real, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr):
    """Queries [BLOCK_M, KEY_PAD]; ``query`` points to the first query head of the tile's group in the first row."""
    dim = tl.arange(0, KEY_PAD)[None, :]
    pointer = query + place.to(tl.int64) * stride_row + member * stride_head
    return tl.load(pointer[:, None] + dim, mask=real[:, None] & (dim < KEY_DIM), other=0.0)


@triton.jit
def load_pillars(listed, block, BLOCK_N: tl.constexpr):
    """The pillars among the entries of a block of a list, anything in place of others. Reads one even of none."""
    entry = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N), tl.maximum(listed.pillar_count - 1, 0))
    return tl.load(listed.pillars + entry.to(tl.uint32))


@triton.jit
def load_two_blocks(listed, block, BLOCK_N: tl.constexpr):
    """``load_pillars`` of a block and of the one behind it [BLOCK_N, 2], each entry loaded by one thread only."""
    entry = tl.minimum(block * BLOCK_N + tl.arange(0, 2 * BLOCK_N), tl.maximum(listed.pillar_count - 1, 0))
    pillars = tl.load(listed.pillars + entry.to(tl.uint32))
    return tl.permute(tl.reshape(pillars, (2, BLOCK_N)), (1, 0))


@triton.jit
def positions_of(listed, block, pillar, BLOCK_N: tl.constexpr, LISTED: tl.constexpr):
    """Positions of a block of a list; past its end the last one again, so that a load always finds a token.

    Without LISTED there are no pillars.
    """
    pillar_count, start, end = listed.pillar_count, listed.start, listed.end
    position = tl.minimum(block * BLOCK_N + tl.arange(0, BLOCK_N) + (start - pillar_count), end - 1)
    if LISTED:
        position = tl.where(position < start, pillar, position)
    return position


@triton.jit
def pages_of(source, position, POOL: tl.constexpr):
    """Physical pages of positions."""
    return tl.load(source.table + position.to(tl.uint32) // POOL.page_size)


@triton.jit
def order_of(listed, block, BLOCK_N: tl.constexpr):
    """What to compare rows' positions with: the positions of a block of a list, pillars below start."""
    return listed.start - listed.pillar_count + block * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def pool_pointers(source, position, page, first_dim, PAD: tl.constexpr, POOL: tl.constexpr):
    """Addresses [N, PAD] in the pool of what tokens keep from ``first_dim`` on: their keys, then their values.

    Counting in units takes one multiplication of 32 bits where offsets in elements need one of 64. A loop spends as
    many instructions on addresses as on products, so this counts.
    """
    pool, page_units = source.pool, source.page_units
    slot = (position.to(tl.uint32) % POOL.page_size).to(tl.int32)
    if POOL.wide:
        unit = page.to(tl.int64) * page_units + slot * POOL.token_units
    else:
        unit = (page * page_units + slot * POOL.token_units).to(tl.int64)
    return (pool + first_dim + tl.arange(0, PAD)) + (unit * POOL.unit)[:, None]


@triton.jit
def row_pointers(rows, row, stride, PAD: tl.constexpr):
    """Addresses [N, PAD] of the step's own keys or values, ``rows`` pointing to the request's first."""
    return (rows + tl.arange(0, PAD))[None, :] + (row.to(tl.int64) * stride)[:, None]


@triton.jit
def load_tokens(pointer, DIM: tl.constexpr, PAD: tl.constexpr):
    """Keys or values [N, PAD]. Whole rows need no mask, which would cost a loop several instructions for each."""
    return tl.load(pointer) if DIM == PAD else tl.load(pointer, mask=(tl.arange(0, PAD) < DIM)[None, :], other=0.0)


@triton.jit
def products(q, k, logit_scale, cap, LAYER: tl.constexpr):
    """What, times ``scale_of_products``, are the logits of q [M, D] with keys k [N, D] times log2(e).

    ``logit_scale`` is scale * log2(e) > 0 and ``cap`` 0; with a soft-cap c they are 2 * scale * log2(e) / c, the factor
    of exp2's argument, and c * log2(e).
    """
    product = tl.dot(q, tl.trans(k), input_precision=LAYER.precision)
    if LAYER.has_softcap:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both ends, where exp overflows or vanishes.
        product = cap - 2.0 * cap / (tl.exp2(product * logit_scale) + 1.0)
    return product


@triton.jit
def scale_of_products(logit_scale, LAYER: tl.constexpr):
    """The factor that ``products`` leaves to be multiplied where the largest one is subtracted, in one operation."""
    factor = logit_scale
    if LAYER.has_softcap:
        factor = 1.0
    return factor


@triton.jit
def raise_largest(product, largest, factor):
    """The largest logits so far with those of a block, and what to subtract from logits.

    A row that has seen nothing yet keeps -inf, from which 0 must be subtracted: -inf - -inf is not a number.
    """
    raised = tl.maximum(largest, tl.max(product, -1) * factor)
    return raised, tl.where(raised == float("-inf"), 0.0, raised)
