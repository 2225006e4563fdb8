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
    """The pillars among the entries of a block of a list, 0 in place of other entries.

    ``listed`` is (pillars, pillar_count, start, end): pillar_count positions at ``pillars``, then start .. end - 1.
    """
    pillars, pillar_count = listed[0], listed[1]
    entry = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(pillars + entry, mask=entry < pillar_count, other=0)


@triton.jit
def dense_positions(listed, block, BLOCK_N: tl.constexpr):
    """Positions [BLOCK_N] of a block of a list as if it had no pillars: these come out below start."""
    return listed[2] - listed[1] + block * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def listed_positions(listed, block, pillar, BLOCK_N: tl.constexpr):
    """Positions [BLOCK_N] of a block of a list whose pillars have been loaded; past its end, positions from end on."""
    dense = dense_positions(listed, block, BLOCK_N)
    return tl.where(dense < listed[2], pillar, dense)


@triton.jit
def pages_of(source, position, PAGE_SIZE: tl.constexpr):
    """Physical pages of positions that were in the pool before the step, 0 for others."""
    table, cached = source[3], source[8]
    return tl.load(table + position // PAGE_SIZE, mask=position < cached, other=0)


@triton.jit
def pool_pointers(source, position, page, PAGE_SIZE: tl.constexpr):
    """Addresses of tokens in the pool: of the key, which the value follows."""
    return source[0] + page.to(tl.int64) * source[4] + (position % PAGE_SIZE) * source[5]


@triton.jit
def token_pointers(source, position, page, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr):
    """Addresses of the keys and of the values at ``position``: in the pool, or in k and v for the step's own tokens.

    ``source`` is (pool, keys, values, table, stride_page, stride_slot, stride_key_row, stride_value_row, cached): the
    pool at a KV head, k and v at that head and at the request's first row, the request's row of the page table. As
    nothing is read that the step itself writes into the pool, reads and writes need no order.
    """
    keys, values, stride_key_row, stride_value_row, cached = source[1], source[2], source[6], source[7], source[8]
    token = pool_pointers(source, position, page, PAGE_SIZE)
    row = (position - cached).to(tl.int64)
    is_new = position >= cached
    key = tl.where(is_new, keys + row * stride_key_row, token)
    return key, tl.where(is_new, values + row * stride_value_row, token + KEY_DIM)


@triton.jit
def load_tokens(pointer, real, DIM: tl.constexpr, PAD: tl.constexpr):
    """Keys or values [BLOCK_N, PAD]; zeros where there is none, as a stray NaN would spread."""
    dim = tl.arange(0, PAD)[None, :]
    return tl.load(pointer[:, None] + dim, mask=real[:, None] & (dim < DIM), other=0.0)


@triton.jit
def products(q, k, logit_scale, cap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """What, times ``scale_of_products``, are the logits of q [BLOCK_M, D] with keys k [BLOCK_N, D] times log2(e).

    ``logit_scale`` is scale * log2(e) > 0 and ``cap`` 0; with a soft-cap c they are 2 * scale * log2(e) / c, the factor
    of exp2's argument, and c * log2(e).
    """
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both ends, where exp overflows or vanishes.
        product = cap - 2.0 * cap / (tl.exp2(product * logit_scale) + 1.0)
    return product


@triton.jit
def scale_of_products(logit_scale, HAS_SOFTCAP: tl.constexpr):
    """The factor that ``products`` leaves to be multiplied where the largest one is subtracted, in one operation."""
    factor = logit_scale
    if HAS_SOFTCAP:
        factor = 1.0
    return factor


@triton.jit
def raise_largest(product, largest, factor):
    """The largest logits so far with those of a block, and what to subtract from logits.

    A row that has seen nothing yet keeps -inf, from which 0 must be subtracted: -inf - -inf is not a number.
    """
    raised = tl.maximum(largest, tl.max(product, 1) * factor)
    return raised, tl.where(raised == float("-inf"), 0.0, raised)
