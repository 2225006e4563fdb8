"""What kernels hand to their parts by name: sizes known as they are compiled, and where a request's data lie."""

from typing import Any, NamedTuple


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
        precision: of products, as `tl.dot` names it.
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
