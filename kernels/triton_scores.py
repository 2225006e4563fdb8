"""Triton kernel of the score output: the probability of each cached token, averaged over a request's last rows."""

import triton
import triton.language as tl

from .triton_tiles import DRAFT, IDLE, logits_base_2, token_pointers


@triton.jit
def score_kernel(
    q,
    kv,
    lse,
    scores,
    request_mode,
    row_start,
    row_count,
    cached_length,
    page_table,
    score_rows,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    stride_score_request,
    stride_score_head,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (block of positions, KV head, request); ``lse`` is what the attention kernel left.

    Each program adds up all scored rows in one order, so equal inputs give equal bits.
    """
    BLOCK_ROWS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(1)
    request = tl.program_id(2)
    scored = tl.load(score_rows + request)
    kind = tl.load(request_mode + request)
    count = tl.load(row_count + request)
    first_row = count - scored
    scored_end = tl.load(cached_length + request) + first_row
    start = tl.program_id(0) * BLOCK_N
    if (kind == IDLE) | (kind == DRAFT) | (scored <= 0) | (start >= scored_end):
        return
    position = start + tl.arange(0, BLOCK_N)
    real = position < scored_end
    wide_request = request.to(tl.int64)
    token = token_pointers(
        kv,
        page_table,
        wide_request,
        head,
        position,
        real,
        stride_page,
        stride_head,
        stride_slot,
        stride_table,
        PAGE_SIZE,
    )
    dim = tl.arange(0, KEY_PAD)
    keys = tl.load(token[None, :] + dim[:, None], mask=real[None, :] & (dim[:, None] < KEY_DIM), other=0.0)
    pair = tl.arange(0, BLOCK_M)
    q_head = head * GROUP + pair % GROUP
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, scored, BLOCK_ROWS):
        place = first + pair // GROUP
        real_row = (place < scored) & (pair < BLOCK_ROWS * GROUP)
        row = (tl.load(row_start + request) + first_row + place).to(tl.int64)
        query = tl.load(
            q + (row * stride_q_row + q_head * stride_q_head)[:, None] + dim[None, :],
            mask=real_row[:, None] & (dim[None, :] < KEY_DIM),
            other=0.0,
        )
        denominator = tl.load(lse + row * (tl.num_programs(1) * GROUP) + q_head, mask=real_row, other=0.0)
        logits = logits_base_2(query, keys, scale, softcap, HAS_SOFTCAP, PRECISION)
        visible = real_row[:, None] & real[None, :]
        if HAS_WINDOW:
            visible = visible & (position[None, :] > (scored_end + place - window)[:, None])
        total += tl.sum(tl.where(visible, tl.exp2(logits - denominator[:, None]), 0.0), 0)
    target = scores + wide_request * stride_score_request + head.to(tl.int64) * stride_score_head + position
    tl.store(target, total / (scored * GROUP), mask=real)
