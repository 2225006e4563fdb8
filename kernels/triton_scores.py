"""Triton kernel of the score output: the probability of each cached token, averaged over a request's last rows."""

import triton
import triton.language as tl

from .triton_tiles import DRAFT, IDLE, VERIFY, logits_base_2, token_pointers


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
    score_slot,
    pillar_count,
    recent_start,
    pillar_index,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    stride_score_slot,
    stride_score_head,
    stride_pillar_request,
    stride_pillar_head,
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
        if kind == VERIFY:
            row_position = scored_end + place
            pillars = tl.load(pillar_count + request)
            recent = tl.load(recent_start + request)
            entries = pillars + scored_end + scored - recent
            largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            sums = tl.zeros((BLOCK_M,), tl.float32)
            index = pillar_index + wide_request * stride_pillar_request + head.to(tl.int64) * stride_pillar_head
            for low in range(0, entries, BLOCK_N):
                entry = low + tl.arange(0, BLOCK_N)
                pillar = tl.load(index + entry, mask=entry < pillars, other=0)
                draft = tl.where(entry < pillars, pillar, recent + entry - pillars)
                drafted = (entry < entries)[None, :] & (draft[None, :] <= row_position[:, None])
                if HAS_WINDOW:
                    drafted = drafted & (draft[None, :] > row_position[:, None] - window)
                token_d = token_pointers(
                    kv,
                    page_table,
                    wide_request,
                    head,
                    draft,
                    entry < entries,
                    stride_page,
                    stride_head,
                    stride_slot,
                    stride_table,
                    PAGE_SIZE,
                )
                inside = (entry < entries)[None, :] & (dim[:, None] < KEY_DIM)
                keys_d = tl.load(token_d[None, :] + dim[:, None], mask=inside, other=0.0)
                drafted_logits = logits_base_2(query, keys_d, scale, softcap, HAS_SOFTCAP, PRECISION)
                drafted_logits = tl.where(drafted, drafted_logits, float("-inf"))
                raised = tl.maximum(largest, tl.max(drafted_logits, 1))
                shift = tl.where(raised == float("-inf"), 0.0, raised)
                sums = sums * tl.exp2(largest - shift) + tl.sum(tl.exp2(drafted_logits - shift[:, None]), 1)
                largest = raised
            denominator = tl.where(real_row, largest + tl.log2(sums), 0.0)
        else:
            denominator = tl.load(lse + row * (tl.num_programs(1) * GROUP) + q_head, mask=real_row, other=0.0)
        logits = logits_base_2(query, keys, scale, softcap, HAS_SOFTCAP, PRECISION)
        visible = real_row[:, None] & real[None, :]
        if HAS_WINDOW:
            visible = visible & (position[None, :] > (scored_end + place - window)[:, None])
        total += tl.sum(tl.where(visible, tl.minimum(tl.exp2(logits - denominator[:, None]), 1.0), 0.0), 0)
    slot = tl.load(score_slot + request).to(tl.int64)
    target = scores + slot * stride_score_slot + head.to(tl.int64) * stride_score_head + position
    tl.store(target, total / (scored * GROUP), mask=real)
