"""What the attention kernel writes besides its results: new tokens into the pool, zeros into rows of no request."""

import triton
import triton.language as tl

from .triton_tiles import IDLE


@triton.jit
def write_tokens(
    source,
    first,
    count,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Copy the tile's rows of k and v, ROWS of ``count`` from ``first`` on, to their positions in the pool."""
    pool, keys, values, table, stride_page, stride_slot, stride_key_row, stride_value_row, cached = source
    in_tile = tl.arange(0, ROWS_PAD)
    row = (first + in_tile).to(tl.int64)
    mine = (in_tile < ROWS) & (row < count)
    position = cached + first + in_tile
    page = tl.load(table + position // PAGE_SIZE, mask=mine, other=0).to(tl.int64)
    token = (pool + page * stride_page + (position % PAGE_SIZE) * stride_slot)[:, None]
    dim = tl.arange(0, KEY_PAD)[None, :]
    mask = mine[:, None] & (dim < KEY_DIM)
    tl.store(token + dim, tl.load(keys + (row * stride_key_row)[:, None] + dim, mask=mask), mask=mask)
    dim = tl.arange(0, VALUE_PAD)[None, :]
    mask = mine[:, None] & (dim < VALUE_DIM)
    tl.store(token + KEY_DIM + dim, tl.load(values + (row * stride_value_row)[:, None] + dim, mask=mask), mask=mask)


@triton.jit
def clear_rows(out, rows, width, request_mode, row_start, row_count, requests, REQUESTS: tl.constexpr):
    """Zero the rows of ``out`` [rows, width] that belong to no request, every program its share."""
    slot = tl.arange(0, REQUESTS)
    inside = slot < requests
    kind = tl.load(request_mode + slot, mask=inside, other=IDLE)
    count = tl.load(row_count + slot, mask=inside & (kind != IDLE), other=0)
    # Requests do not share rows.
    if tl.sum(count, 0) < rows:
        start = tl.load(row_start + slot, mask=inside, other=0)
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            owned = tl.sum(((start <= row) & (row < start + count)).to(tl.int32), 0)
            if owned == 0:
                target = out + tl.cast(row, tl.int64) * width
                for low in range(0, width, 1024):
                    element = low + tl.arange(0, 1024)
                    tl.store(target + element, tl.zeros((1024,), out.dtype.element_ty), mask=element < width)
