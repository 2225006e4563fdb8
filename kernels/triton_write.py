"""What the attention kernel writes besides its results: new tokens into the pool, zeros into rows of no request."""

import triton
import triton.language as tl

from .triton_tiles import IDLE, pages_of, pool_pointers, row_pointers


@triton.jit
def write_tokens(source, first, end, ROWS: tl.constexpr, LAYER: tl.constexpr):
    """Copy rows of k and v, at most ROWS from ``first`` on and before ``end``, to their positions in the pool."""
    KEY_DIM: tl.constexpr = LAYER[1]
    VALUE_DIM: tl.constexpr = LAYER[2]
    KEY_PAD: tl.constexpr = LAYER[3]
    VALUE_PAD: tl.constexpr = LAYER[4]
    POOL: tl.constexpr = LAYER[5]
    row = first + tl.arange(0, ROWS)
    mine = (row < end)[:, None]
    row = tl.minimum(row, end - 1)
    position = source[7] + row
    page = pages_of(source, position, POOL)
    key_mask = mine & (tl.arange(0, KEY_PAD) < KEY_DIM)[None, :]
    value_mask = mine & (tl.arange(0, VALUE_PAD) < VALUE_DIM)[None, :]
    keys = tl.load(row_pointers(source[1], row, source[5], KEY_PAD), mask=key_mask)
    values = tl.load(row_pointers(source[2], row, source[6], VALUE_PAD), mask=value_mask)
    tl.store(pool_pointers(source, position, page, 0, KEY_PAD, POOL), keys, mask=key_mask)
    tl.store(pool_pointers(source, position, page, KEY_DIM, VALUE_PAD, POOL), values, mask=value_mask)


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
