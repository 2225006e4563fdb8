"""What the parts of the attention kernels share: shapes, where a request's data lie, addresses of tokens, logits.

A tile holds BLOCK_M (row, query head) pairs of one request and one KV head, row by row: pair m is row m // GROUP and
query head m % GROUP of the KV head. Pages, rows and requests are widened to 64 bits before they are multiplied by a
stride: a pool or a score buffer may hold more than 2**31 elements.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

IDLE = tl.constexpr(0)
DRAFT = tl.constexpr(1)
VERIFY = tl.constexpr(2)
PREFILL = tl.constexpr(3)
"""Values of ``kernels.ops.Mode``; a test holds them equal."""

LOG2_E = tl.constexpr(1.4426950408889634)

ANY_VALUE = (
    "requests",
    "rows",
    "kv_heads",
    "page_units",
    "stride_table",
    "stride_score_slot",
    "stride_score_head",
    "stride_pillar_request",
    "stride_pillar_head",
    "window",
)
ANY_ADDRESS = (
    "scores",
    "counters",
    "request_mode",
    "row_start",
    "row_count",
    "cached_length",
    "page_table",
    "score_rows",
    "score_slot",
    "pillar_count",
    "recent_start",
    "pillar_index",
    "sinks",
)
"""Arguments that kernels are not compiled anew for.

A kernel is compiled for each pattern of divisible sizes and addresses, which takes seconds. Those of q, k, v and kv
decide how wide loads are; the others change with every step or layer, and nothing hangs on them. Names that a kernel
does not have are ignored."""


class PoolShape(NamedTuple):
    """How the pool counts: every page and token begins at a multiple of a unit.

    Attributes:
        page_size: tokens of a page.
        unit: elements of a unit.
        token_units: units from a token to the next.
        wide: whether numbers of units need 64 bits.
    """

    page_size: Any
    unit: Any
    token_units: Any
    wide: Any


class LayerShape(NamedTuple):
    """An attention layer.

    Attributes:
        group: query heads of a KV head.
        key_dim, value_dim: dimensions of keys and values; key_pad, value_pad: the same as tiles have them.
        pool: `PoolShape`.
        has_window, has_softcap: whether there is one.
        chunked: whether the window is a chunk.
        precision: of products, as `tl.dot` names it.
        has_sinks: whether query heads have one.
    """

    group: Any
    key_dim: Any
    value_dim: Any
    key_pad: Any
    value_pad: Any
    pool: Any
    has_window: Any
    has_softcap: Any
    precision: Any
    has_sinks: Any
    chunked: Any


class LoopShape(NamedTuple):
    """A loop over blocks of keys.

    Attributes:
        pairs: (row, query head) pairs of the tile.
        keys: taken at a time.
        ahead: blocks that are on their way at a time.
        listed: whether there may be pillars among what is read.
    """

    pairs: Any
    keys: Any
    ahead: Any
    listed: Any


class JoinShape(NamedTuple):
    """Joining the parts of a unit: pairs taken at a time, parts asked for at a time."""

    pairs: Any
    parts: Any


class TileShape(NamedTuple):
    """A tile of rows of a request. Stands for a `LoopShape` too, whose attributes it has.

    Attributes:
        rows_pad: rows, padded.
        part_pairs: pairs that a part has room for.
        beside_pool: whether rows may be read beside the pool.
        block: keys of a block as work is shared out, and of the loop with scores.
        scored_ahead: blocks on their way in that loop; 0 = the tile never gives out scores.
        join: `JoinShape`.
    """

    pairs: Any
    rows_pad: Any
    keys: Any
    ahead: Any
    listed: Any
    part_pairs: Any
    beside_pool: Any
    block: Any
    scored_ahead: Any
    join: Any


class Source(NamedTuple):
    """Where a request's keys and values lie.

    Attributes:
        pool: at the KV head.
        own_keys, own_values: the step's, at that head and at the request's first row.
        table: the request's row of the page table.
        page_units: units of a page.
        stride_key_row, stride_value_row: elements from a row of keys or values to the next.
        cached: tokens that were in the pool before the step.
    """

    pool: Any
    own_keys: Any
    own_values: Any
    table: Any
    page_units: Any
    stride_key_row: Any
    stride_value_row: Any
    cached: Any


class Listed(NamedTuple):
    """Positions that a tile reads: pillar_count of them at ``pillars``, then start .. end - 1."""

    pillars: Any
    pillar_count: Any
    start: Any
    end: Any


@triton.jit
def last_hidden(row, before, window, CHUNKED: tl.constexpr):
    """The last row that the window hides from ``row``, negative for none. Rows are counted from position ``before``."""
    if CHUNKED:
        return (before + row) // window * window - before - 1
    return row - window


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
def load_sinks(sinks, first_head, member):
    """The sinks [BLOCK_M] of pairs, in base 2; ``first_head`` is the first query head of the tile's KV head."""
    return tl.load(sinks + first_head + member).to(tl.float32) * LOG2_E


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
def load_rows(source, first, end, ROWS: tl.constexpr, LAYER: tl.constexpr):
    """Rows of k and v, at most ROWS from ``first`` on and before ``end``, zeros in place of others: (keys, values,
    which elements of keys there are, which of values)."""
    row = first + tl.arange(0, ROWS)
    mine = (row < end)[:, None]
    row = tl.minimum(row, end - 1)
    key_mask = mine & (tl.arange(0, LAYER.key_pad) < LAYER.key_dim)[None, :]
    value_mask = mine & (tl.arange(0, LAYER.value_pad) < LAYER.value_dim)[None, :]
    keys = tl.load(row_pointers(source.own_keys, row, source.stride_key_row, LAYER.key_pad), mask=key_mask, other=0.0)
    values = tl.load(
        row_pointers(source.own_values, row, source.stride_value_row, LAYER.value_pad), mask=value_mask, other=0.0
    )
    return keys, values, key_mask, value_mask


@triton.jit
def as_kept(keys, values, LAYER: tl.constexpr):
    """Keys and values [N, PAD] as the pool keeps them.

    A value that is not finite would reach rows that give it a weight of 0. It becomes 0, and its key a NaN, which rows
    that see the token take on and others mask.
    """
    finite = tl.abs(values.to(tl.float32)) < float("inf")
    if LAYER.key_pad == LAYER.value_pad:
        # One NaN in a key is enough: that needs no exchange between threads.
        keys = tl.where(finite, keys, float("nan"))
    else:
        keys = tl.where(tl.min(finite.to(tl.int32), 1)[:, None] > 0, keys, float("nan"))
    return keys, tl.where(finite, values, 0.0)


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
