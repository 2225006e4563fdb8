"""Products with a weight in two halves of what they sum over, for steps of few rows. By the library, no kernel of ours.

A product of few rows has about one tile for each 64 columns of the weight: 64 of them, in a model that is 4,096 wide,
leave half of an H200's 132 multiprocessors reading nothing. A library then splits the sum by itself, and adds the parts
up in one more launch. Both halves in one launch keep more multiprocessors reading, and adding them costs nothing where
whoever reads the product does it (benchmarks/LOG.md, 2026-11-26, night).
"""

import torch
from torch import Tensor

from ..checks import check_product

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
