"""Addresses in a pool of more than 2**31 elements, computed without allocating one."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is published for Linux only")

import triton.language as tl  # noqa: E402

from sparsespec_compile.kernels.triton_tiles import pages_of, pool_pointers  # noqa: E402

PAGE_SIZE, STRIDE_PAGE, STRIDE_HEAD, STRIDE_SLOT = 4, 1 << 26, 1 << 24, 1 << 20


@triton.jit
def _offset_kernel(kv, table, offsets, stride_page, stride_head, stride_slot, PAGE_SIZE: tl.constexpr):
    position = tl.arange(0, 16)
    head = tl.program_id(0)
    source = (kv + head.to(tl.int64) * stride_head, kv, kv, table, stride_page, stride_slot, 0, 0, 16)
    page = pages_of(source, position, PAGE_SIZE)
    token = pool_pointers(source, position, page, PAGE_SIZE)
    tl.store(offsets + head * 16 + position, token.to(tl.int64) - kv.to(tl.int64))


def test_offsets_beyond_32_bits(device: str) -> None:
    kv = torch.zeros(1, dtype=torch.bfloat16, device=device)
    table = torch.tensor([[0, 0, 0, 0], [3, 77, 2000, 100_000]], dtype=torch.int32, device=device)
    offsets = torch.zeros(2, 16, dtype=torch.int64, device=device)
    _offset_kernel[(2,)](kv, table[1], offsets, STRIDE_PAGE, STRIDE_HEAD, STRIDE_SLOT, PAGE_SIZE)
    page = table[1].long().repeat_interleave(PAGE_SIZE)
    slot = torch.arange(16, device=device) % PAGE_SIZE
    head = torch.arange(2, device=device)[:, None]
    elements = page * STRIDE_PAGE + head * STRIDE_HEAD + slot * STRIDE_SLOT
    assert elements.max() > 2**32
    assert torch.equal(offsets, elements * kv.itemsize)
