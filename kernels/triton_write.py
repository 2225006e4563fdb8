"""Triton kernel that writes the new K/V into the page pool and clears the output of rows that belong to no request."""

import triton
import triton.language as tl

from .triton_tiles import owner_of_row, token_pointers


@triton.jit
def write_kernel(
    k,
    v,
    kv,
    out,
    request_mode,
    row_start,
    row_count,
    cached_length,
    page_table,
    requests,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_page,
    stride_head,
    stride_slot,
    stride_table,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """One program per (row, KV head)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_dim = tl.arange(0, KEY_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    request = owner_of_row(row, request_mode, row_start, row_count, requests, REQUESTS)
    if request < 0:
        group = tl.arange(0, GROUP_PAD)[:, None]
        target = out + ((row * tl.num_programs(1) + head) * GROUP + group) * VALUE_DIM + value_dim[None, :]
        zeros = tl.zeros((GROUP_PAD, VALUE_PAD), out.dtype.element_ty)
        tl.store(target, zeros, mask=(group < GROUP) & (value_dim[None, :] < VALUE_DIM))
        return
    position = tl.load(cached_length + request) + (row - tl.load(row_start + request)).to(tl.int32)
    token = token_pointers(
        kv,
        page_table,
        request.to(tl.int64),
        head,
        position,
        True,
        stride_page,
        stride_head,
        stride_slot,
        stride_table,
        PAGE_SIZE,
    )
    in_key, in_value = key_dim < KEY_DIM, value_dim < VALUE_DIM
    new_key = tl.load(k + row * stride_k_row + head * stride_k_head + key_dim, mask=in_key)
    new_value = tl.load(v + row * stride_v_row + head * stride_v_head + value_dim, mask=in_value)
    tl.store(token + key_dim, new_key, mask=in_key)
    tl.store(token + KEY_DIM + value_dim, new_value, mask=in_value)
