"""What the attention kernel writes besides its results: new tokens into the pool, zeros into rows of no request."""

import triton
import triton.language as tl

from .triton_tiles import IDLE, pages_of, pool_pointers, row_pointers


@triton.jit
def load_rows(source, first, end, ROWS: tl.constexpr, LAYER: tl.constexpr):
    """Rows of k and v for ``store_tokens``, at most ROWS from ``first`` on and before ``end``, and where they go."""
    row = first + tl.arange(0, ROWS)
    mine = (row < end)[:, None]
    row = tl.minimum(row, end - 1)
    position = source.cached + row
    page = pages_of(source, position, LAYER.pool)
    key_mask = mine & (tl.arange(0, LAYER.key_pad) < LAYER.key_dim)[None, :]
    value_mask = mine & (tl.arange(0, LAYER.value_pad) < LAYER.value_dim)[None, :]
    keys = tl.load(row_pointers(source.own_keys, row, source.stride_key_row, LAYER.key_pad), mask=key_mask)
    values = tl.load(row_pointers(source.own_values, row, source.stride_value_row, LAYER.value_pad), mask=value_mask)
    return position, page, keys, values, key_mask, value_mask


@triton.jit
def store_tokens(source, loaded, LAYER: tl.constexpr):
    """Write keys and values of tokens to their positions in the pool; ``loaded`` is what ``load_rows`` gave."""
    position, page, keys, values, key_mask, value_mask = loaded
    tl.store(pool_pointers(source, position, page, 0, LAYER.key_pad, LAYER.pool), keys, mask=key_mask)
    tl.store(pool_pointers(source, position, page, LAYER.key_dim, LAYER.value_pad, LAYER.pool), values, mask=value_mask)


@triton.jit
def clear_row(out, row, width):
    """Zero a row of ``out`` [rows, width]."""
    target = out + tl.cast(row, tl.int64) * width
    for low in range(0, width, 1024):
        element = low + tl.arange(0, 1024)
        tl.store(target + element, tl.zeros((1024,), out.dtype.element_ty), mask=element < width)


@triton.jit
def clear_rows(out, first, end, width):
    """Zero rows first .. end - 1 of ``out``, every program its share."""
    for row in range(first + tl.program_id(0), end, tl.num_programs(0)):
        clear_row(out, row, width)


@triton.jit
def clear_gaps(out, end, width, request_mode, row_start, row_count, requests, REQUESTS: tl.constexpr):
    """Zero those of the rows before ``end`` that belong to no request, every program its share."""
    slot = tl.arange(0, REQUESTS)
    inside = slot < requests
    kind = tl.load(request_mode + slot, mask=inside, other=IDLE)
    count = tl.load(row_count + slot, mask=inside & (kind != IDLE), other=0)
    start = tl.load(row_start + slot, mask=inside, other=0)
    for row in range(tl.program_id(0), end, tl.num_programs(0)):
        owned = tl.sum(((start <= row) & (row < start + count)).to(tl.int32), 0)
        if owned == 0:
            clear_row(out, row, width)
