"""Products by the library, no kernels of ours: with a weight in two halves, and of 8-bit rows with 8-bit weights.

Halves are of what is summed over, for steps of few rows. A product of few rows has about one tile for each 64 columns
of the weight: 64 of them, in a model that is 4,096 wide, leave half of an H200's 132 multiprocessors reading nothing. A
library then splits the sum by itself, and adds the parts up in one more launch. Both halves in one launch keep more
multiprocessors reading, and adding them costs nothing where whoever reads the product does it (benchmarks/LOG.md,
2026-11-26, night).

Scales of 8-bit rows and weights stay outside of the call: with a single scale the library takes a faster kernel than
with one for each row (benchmarks/LOG.md, 2026-11-30), and who writes the rows and reads the product can apply them for
nothing.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..checks import check_fp8_product, check_product
from ..launch import refuse_fp8

FEW_ROWS = 256
"""Rows up to which halves are taken. With more the product is bound by computing, and whole."""


@torch.no_grad()
def halved_product(x: Tensor, weight: Tensor) -> Tensor:
    """Two summands of ``x @ weight.T``; see ``kernels.ops``."""
    check_product(x, weight)
    columns, inner = weight.shape
    rows = x.reshape(-1, inner)
    summands = x.new_empty(2, rows.shape[0], columns)
    if rows.shape[0] <= FEW_ROWS:
        halves = rows.view(-1, 2, inner // 2).transpose(0, 1), weight.view(columns, 2, inner // 2).permute(1, 2, 0)
        torch.bmm(*halves, out=summands)
    else:
        torch.mm(rows, weight.t(), out=summands[0])
        summands[1].zero_()
    return summands.view(2, *x.shape[:-1], columns)


@torch.no_grad()
def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``; see ``kernels.ops``.

    Raises:
        KernelUnavailableError: the device does not multiply fp8.
    """
    check_fp8_product(x, weight)
    refuse_fp8(weight)
    one = _one(x.device)
    columns, inner = weight.shape
    rows = x.view(-1, inner)
    product = torch._scaled_mm(
        rows, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.view(*x.shape[:-1], columns)


@lru_cache
def _one(device: torch.device) -> Tensor:
    """Made in the first call, which no capture is: steps run before they are captured."""
    return torch.ones((), dtype=torch.float32, device=device)
