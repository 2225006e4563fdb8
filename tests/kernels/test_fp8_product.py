"""Products of 8-bit rows: against float64, and what is refused."""

import pytest
import torch

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError

FP8 = torch.float8_e4m3fn
BFLOAT16 = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""


def operands(rows, columns, inner, device="cpu"):
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(1, rows, inner, generator=generator)
    weight = torch.randn(columns, inner, generator=generator)
    return tuple((value * 80).clamp(-448, 448).to(FP8).to(device) for value in (x, weight))


def check(rows, columns, inner, device, bits):
    """`bits` of a partial sum that the device keeps."""
    x, weight = operands(rows, columns, inner, device)
    got = ops.fp8_product(x, weight)
    assert (got.dtype, got.shape) == (torch.bfloat16, (1, rows, columns))
    wide, wide_weight = x.cpu().double(), weight.cpu().double()
    expected = wide @ wide_weight.t()
    sizes = wide.abs() @ wide_weight.abs().t()
    # Each of `inner` additions rounds a partial sum, which is at most the sum of magnitudes.
    budget = BFLOAT16 * expected.abs() + inner * 2.0**-bits * sizes
    assert ((got.cpu().double() - expected).abs() <= budget).all()


def test_against_float64():
    check(5, 48, 96, "cpu", bits=24)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 130])
def test_against_float64_on_a_gpu(rows):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device does not multiply fp8")
    # Fast accumulation keeps 13 bits behind the leading one, and adds 32 products at a time.
    check(rows, 4096, 512, "cuda", bits=13 + 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.float(), w), "x is torch.float32; it must be"),
        (lambda x, w: (x, w.float()), "weight is torch.float32; it must be"),
        (lambda x, w: (x, w[:, :80]), "weight has strides"),
        (lambda x, w: (x, w[:40]), "must be multiples of 16"),
        (lambda x, w: (x[..., :16].contiguous(), w), "its last dimension must be weight's, 96"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(KernelInputError, match=message):
        ops.fp8_product(*change(*operands(5, 48, 96)))


def test_the_contract():
    utilities = ["test_autograd_registration", "test_faketensor"]  # comparing inputs is not there for fp8
    torch.library.opcheck(ops.fp8_product, operands(3, 32, 64), test_utils=utilities)
