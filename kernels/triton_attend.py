"""Triton kernel of the dual-mode attention: every tile of rows reads what its request's request_mode lets it read."""

import triton
import triton.language as tl

from .triton_tiles import DRAFT, logits_base_2, owner_of_tile, token_pointers


@triton.jit
def attention_kernel(
    q,
    kv,
    out,
    lse,
    request_mode,
    row_start,
    row_count,
    cached_length,
    page_table,
    pillar_count,
    recent_start,
    pillar_index,
    requests,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    stride_pillar_request,
    stride_pillar_head,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (tile, KV head). ``lse`` [T, Hq] receives the base-2 logarithm of each softmax denominator."""
    BLOCK_ROWS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(1)
    request, first = owner_of_tile(tl.program_id(0), request_mode, row_count, requests, BLOCK_ROWS, REQUESTS)
    if request < 0:
        return
    count = tl.load(row_count + request)
    cached = tl.load(cached_length + request)
    pair = tl.arange(0, BLOCK_M)
    place = first + pair // GROUP
    real_row = (place < count) & (pair < BLOCK_ROWS * GROUP)
    row = (tl.load(row_start + request) + place).to(tl.int64)
    q_head = head * GROUP + pair % GROUP
    key_dim = tl.arange(0, KEY_PAD)[None, :]
    query = tl.load(
        q + (row * stride_q_row + q_head * stride_q_head)[:, None] + key_dim,
        mask=real_row[:, None] & (key_dim < KEY_DIM),
        other=0.0,
    )
    row_position = cached + place
    end = cached + tl.minimum(first + BLOCK_ROWS, count)
    is_draft = tl.load(request_mode + request) == DRAFT
    pillars = tl.where(is_draft, tl.load(pillar_count + request), 0)
    start = tl.where(is_draft, tl.load(recent_start + request), 0)
    if HAS_WINDOW:
        start = tl.maximum(start, cached + first - window + 1)

    request = request.to(tl.int64)
    pillar_index += request * stride_pillar_request + head.to(tl.int64) * stride_pillar_head
    lane = tl.arange(0, BLOCK_N)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, VALUE_PAD), tl.float32)
    sparse_blocks = (pillars + BLOCK_N - 1) // BLOCK_N
    dense_blocks = (tl.maximum(end - start, 0) + BLOCK_N - 1) // BLOCK_N
    for block in range(0, sparse_blocks + dense_blocks):
        entry = block * BLOCK_N + lane
        chosen = entry < pillars
        pillar = tl.load(pillar_index + entry, mask=chosen, other=0)
        dense = start + (block - sparse_blocks) * BLOCK_N + lane
        position = tl.where(block < sparse_blocks, pillar, dense)
        real = tl.where(block < sparse_blocks, chosen, dense < end)
        token = token_pointers(
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
            PAGE_SIZE,
        )
        dim = tl.arange(0, KEY_PAD)[:, None]
        keys = tl.load(token[None, :] + dim, mask=real[None, :] & (dim < KEY_DIM), other=0.0)
        logits = logits_base_2(query, keys, scale, softcap, HAS_SOFTCAP, PRECISION)
        visible = real[None, :] & (position[None, :] <= row_position[:, None])
        if HAS_WINDOW:
            visible = visible & (position[None, :] > row_position[:, None] - window)
        logits = tl.where(visible, logits, float("-inf"))
        raised = tl.maximum(largest, tl.max(logits, 1))
        # A row that has seen nothing yet keeps -inf, from which 0 must be subtracted: -inf - -inf is not a number.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weight = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(largest - shift)
        total = total * fade + tl.sum(weight, 1)
        value_dim = tl.arange(0, VALUE_PAD)[None, :]
        values = tl.load(token[:, None] + KEY_DIM + value_dim, mask=real[:, None] & (value_dim < VALUE_DIM), other=0.0)
        sums = tl.dot(weight.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
        largest = raised
    value_dim = tl.arange(0, VALUE_PAD)[None, :]
    pair_index = row * (tl.num_programs(1) * GROUP) + q_head
    target = out + pair_index[:, None] * VALUE_DIM + value_dim
    result = sums / total[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=real_row[:, None] & (value_dim < VALUE_DIM))
    tl.store(lse + pair_index, largest + tl.log2(total), mask=real_row)
