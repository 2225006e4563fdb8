"""Products in two summands: their sum against float64, for few rows and for many, and what they refuse."""

import pytest
import torch

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError
from sparsespec_compile.kernels.products.library import FEW_ROWS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_the_product(device: str, rows: int, dtype: torch.dtype) -> None:
    """Each summand is rounded once, by half a unit of its own size; float32 sums of 96 terms add 96 * 2**-24 each."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 192, generator=generator).to(device, dtype)
    weight = torch.randn(64, 192, generator=generator).to(device, dtype)
    summands = ops.halved_product(x, weight)
    assert summands.shape == (2, 1, rows, 64)
    assert summands.dtype == dtype
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    budget = summands.double().abs().sum(0) * unit + terms * 192 * 2.0**-24
    assert ((summands.double().sum(0) - exact).abs() <= budget).all()


@pytest.mark.parametrize("device", DEVICES)
def test_few_rows_come_in_halves_and_many_whole(device: str) -> None:
    weight = torch.randn(64, 32, device=device)
    x = torch.randn(FEW_ROWS + 1, 32, device=device)
    first, second = ops.halved_product(x[:FEW_ROWS], weight)
    assert torch.allclose(first, x[:FEW_ROWS, :16] @ weight[:, :16].T, atol=1e-4)
    assert torch.allclose(second, x[:FEW_ROWS, 16:] @ weight[:, 16:].T, atol=1e-4)
    whole, nothing = ops.halved_product(x, weight)
    assert torch.allclose(whole, x @ weight.T, atol=1e-4)
    assert not nothing.any()


def test_weights_that_are_trained_are_read_as_they_are() -> None:
    x, weight = torch.randn(5, 32), torch.randn(64, 32)
    assert torch.equal(ops.halved_product(x, torch.nn.Parameter(weight)), ops.halved_product(x, weight))


def test_rows_may_lie_apart() -> None:
    x, weight = torch.randn(5, 40)[:, :32], torch.randn(64, 32)
    assert torch.equal(ops.halved_product(x, weight), ops.halved_product(x.contiguous(), weight))


@pytest.mark.parametrize(
    ("x", "weight", "text"),
    [
        (torch.zeros(3, 8), torch.zeros(4, 6), "last dimension must be weight's, 6"),
        (torch.zeros(3, 7), torch.zeros(4, 7), "must be even"),
        (torch.zeros(3, 8), torch.zeros(8, 4).T, "must be contiguous"),
        (torch.zeros(3, 8), torch.zeros(4, 8, dtype=torch.float64), "give both one dtype"),
        (torch.zeros(3, 8), torch.zeros(1, 4, 8), "number of dimensions must be 2"),
    ],
)
def test_refuses_what_does_not_fit(x: torch.Tensor, weight: torch.Tensor, text: str) -> None:
    with pytest.raises(KernelInputError, match=text):
        ops.halved_product(x, weight)
