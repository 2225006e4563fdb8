"""Addresses in a pool of more than 2**31 elements, computed without allocating one."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is published for Linux only")

import triton.language as tl  # noqa: E402

from sparsespec_compile.kernels.attention.launcher import pool_units  # noqa: E402
from sparsespec_compile.kernels.attention.tiles import PoolShape, Source, pages_of, pool_pointers  # noqa: E402  # noqa: E402

PAGE_SIZE, STRIDE_PAGE, STRIDE_HEAD, STRIDE_SLOT = 4, 1 << 26, 1 << 24, 1 << 20


@triton.jit
def _offset_kernel(
    kv,
    table,
    offsets,
    stride_head,
    page_units,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    TOKEN_UNITS: tl.constexpr,
    WIDE_UNITS: tl.constexpr,
):
    POOL: tl.constexpr = PoolShape(PAGE_SIZE, UNIT, TOKEN_UNITS, WIDE_UNITS)
    position = tl.arange(0, 16)
    head = tl.program_id(0)
    source = Source(kv + head.to(tl.int64) * stride_head, kv, kv, table, page_units, 0, 0, 16)
    token = tl.reshape(pool_pointers(source, position, pages_of(source, position, POOL), 3, 1, POOL), (16,))
    tl.store(offsets + head * 16 + position, token.to(tl.int64) - kv.to(tl.int64))


@pytest.mark.parametrize("stride_slot", [STRIDE_SLOT, STRIDE_SLOT + 2])
def test_offsets_beyond_32_bits(stride_slot: int, device: str) -> None:
    """In elements; in units, which fit 32 bits or, where token and page have little in common, do not."""
    shape, strides = (100_001, 2, PAGE_SIZE, 8), (STRIDE_PAGE, STRIDE_HEAD, stride_slot, 1)
    pool = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")
    units = pool_units(pool)
    constants = (PAGE_SIZE, units["UNIT"], units["TOKEN_UNITS"], units["WIDE_UNITS"])
    assert units["WIDE_UNITS"] == (stride_slot != STRIDE_SLOT)
    kv = torch.zeros(1, dtype=torch.bfloat16, device=device)
    table = torch.tensor([[0, 0, 0, 0], [3, 77, 2000, 100_000]], dtype=torch.int32, device=device)
    offsets = torch.zeros(2, 16, dtype=torch.int64, device=device)
    _offset_kernel[(2,)](kv, table[1], offsets, STRIDE_HEAD, units["page_units"], *constants)
    page = table[1].long().repeat_interleave(PAGE_SIZE)
    slot = torch.arange(16, device=device) % PAGE_SIZE
    head = torch.arange(2, device=device)[:, None]
    elements = page * STRIDE_PAGE + head * STRIDE_HEAD + slot * stride_slot + 3
    assert elements.max() > 2**32
    assert torch.equal(offsets, elements * kv.itemsize)
