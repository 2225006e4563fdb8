"""Device functions that the attention kernels share: which request a row or tile belongs to, keys by position, logits.

A tile holds BLOCK_M (row, query head) pairs of one request and one KV head, row by row: pair m is row m // GROUP and
query head m % GROUP of the KV head. Pages, rows and requests are widened to 64 bits before they are multiplied by a
stride: a pool or a score buffer may hold more than 2**31 elements.
"""

import triton
import triton.language as tl

IDLE = tl.constexpr(0)
DRAFT = tl.constexpr(1)
VERIFY = tl.constexpr(2)
"""Values of ``kernels.ops.Mode``; a test holds them equal."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_row_counts(request_mode, row_count, requests, REQUESTS: tl.constexpr):
    """Slot numbers [REQUESTS] and the rows of each slot; 0 for idle ones and past ``requests``."""
    slot = tl.arange(0, REQUESTS)
    real = slot < requests
    kind = tl.load(request_mode + slot, mask=real, other=IDLE)
    counts = tl.load(row_count + slot, mask=real & (kind != IDLE), other=0)
    return slot, counts


@triton.jit
def owner_of_row(row, request_mode, row_start, row_count, requests, REQUESTS: tl.constexpr):
    """The request of a packed row, -1 for none."""
    slot, counts = load_row_counts(request_mode, row_count, requests, REQUESTS)
    start = tl.load(row_start + slot, mask=slot < requests, other=0)
    mine = (start <= row) & (row < start + counts)
    return tl.max(tl.where(mine, slot, -1), 0)


@triton.jit
def owner_of_tile(tile, request_mode, row_count, requests, BLOCK_ROWS: tl.constexpr, REQUESTS: tl.constexpr):
    """The request of a tile and the tile's first row within it; -1 past the last tile."""
    slot, counts = load_row_counts(request_mode, row_count, requests, REQUESTS)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.cumsum(tiles, 0)
    mine = (ends - tiles <= tile) & (tile < ends)
    request = tl.max(tl.where(mine, slot, -1), 0)
    first = tl.sum(tl.where(mine, tile - (ends - tiles), 0), 0) * BLOCK_ROWS
    return request, first


@triton.jit
def token_pointers(
    kv,
    page_table,
    request,
    head,
    position,
    real,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    PAGE_SIZE: tl.constexpr,
):
    """Address of the first element of the token at each position; in page 0 where ``real`` is false."""
    page = tl.load(page_table + request * stride_table + position // PAGE_SIZE, mask=real, other=0).to(tl.int64)
    return kv + page * stride_page + head * stride_head + (position % PAGE_SIZE) * stride_slot


@triton.jit
def logits_base_2(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits of a tile q [BLOCK_M, D] with keys k [D, BLOCK_N], times log2(e), so that exp2 undoes them."""
    logits = tl.dot(q, k, input_precision=PRECISION) * scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both ends, where exp overflows or vanishes.
        logits = softcap - 2.0 * softcap / (tl.exp2(logits * (2.0 * LOG2_E / softcap)) + 1.0)
    return logits * LOG2_E
