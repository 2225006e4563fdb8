"""Products with 8-bit weights, and those weights: torch's and Triton's against float64, and what they refuse.

A product sums K terms in float32, each exact in itself (8-bit weights have as many digits as bfloat16 or fewer), in any
order, by tensor cores that cut off instead of rounding: K * 2**-23 of the sum of their magnitudes. Scaling and rounding
to float32 add two units, rounding to the dtype its own roundoff of the result. Triton's interpreter cuts bfloat16 off,
which errs twice as far.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels import launch, ops
from sparsespec_compile.kernels.errors import KernelInputError, KernelUnavailableError
from sparsespec_compile.kernels.launch import DeviceLimits
from sparsespec_compile.kernels.ops import LARGEST, QUANTISED_DTYPES, SMALLEST, unpaired
from sparsespec_compile.kernels.reference import products

from .error_budget import EPSILON, ROUNDOFF, TINY

KINDS = list(QUANTISED_DTYPES)

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def launched(name: str, device: str) -> Callable[..., object]:
    """A Triton launcher, which on a CPU is interpreted; a GPU goes through the op."""
    if device == "cuda":
        return getattr(torch.ops.sparsespec, name)
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from sparsespec_compile.kernels.products import quantised

    return getattr(quantised, name)


def weights(columns: int, inner: int, kind: str, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, inner, generator=generator) * torch.rand(columns, 1, generator=generator)
    narrow, scale = torch.empty(columns, inner, dtype=QUANTISED_DTYPES[kind]), torch.empty(columns)
    products.quantise_rows(weight, narrow, scale)
    return narrow.to(device), scale.to(device)


def check_product(product: Product, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """The result lies within the budget of float64's."""
    wide = unpaired(weight).double() * scale.double()[:, None]
    exact = x.double() @ wide.T
    terms = x.double().abs() @ wide.abs().T
    actual = product(x, weight, scale)
    assert actual.shape == exact.shape
    assert actual.dtype == x.dtype
    inner = x.shape[-1]
    roundoff = ROUNDOFF[x.dtype] * (1 if x.is_cuda or product is ops.quantised_product else 2)
    budget = 1.1 * ((inner + 2) * EPSILON * terms + roundoff * exact.abs() + TINY[x.dtype])
    assert ((actual.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_torch(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_CHUNK_ELEMENTS", 1000)
    check_product(ops.quantised_product, torch.randn(1, 5, 96).to(dtype), *weights(70, 96, kind, "cpu"))


SIZES = [(2, 130, 256), (17, 70, 96), (64, 128, 300), (1, 1, 2), (130, 40, 128), (3, 0, 16), (0, 8, 16)]
"""Rows, columns, what is summed over: whole tiles and parts of them, more rows than a tile has, nothing."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
def test_products_of_triton(kind: str, dtype: torch.dtype, rows: int, columns: int, inner: int, device: str) -> None:
    x = torch.randn(rows, inner).to(device, dtype)
    check_product(launched("quantised_product", device), x, *weights(columns, inner, kind, device))


SHARED_TILES = [(16, 64, 32, 4), (16, 64, 16, 3), (64, 64, 16, 2)]
"""Rows, columns and pairs of a tile, and the programs that share it."""


def _launch(tile: tuple[int, ...], x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    quantised = pytest.importorskip("sparsespec_compile.kernels.products.quantised")
    rows, columns, pairs, parts = tile
    return quantised.quantised_product(x, weight, scale, quantised.Tile(rows, columns, pairs, parts, 4, 3))


@pytest.mark.parametrize("tile", SHARED_TILES)
def test_programs_share_a_tile(tile: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two launches on the same counters, which end as they began; 48 columns are no whole tile."""
    quantised = pytest.importorskip("sparsespec_compile.kernels.products.quantised")
    counts = torch.zeros(64, dtype=torch.int32, device=device)
    monkeypatch.setattr(quantised, "counters", lambda *_: counts)
    narrow, scale = weights(112, 768, "int8", device)
    for seed in range(2):
        x = torch.randn(20, 768, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        check_product(lambda *given: _launch(tile, *given), x, narrow, scale)
        assert not counts.any()


def test_sums_of_parts_do_not_depend_on_who_ends_last(device: str, request: pytest.FixtureRequest) -> None:
    narrow, scale = weights(64, 256, "int8", device)
    x = torch.randn(4, 256).to(device, torch.float32)
    first = _launch((16, 64, 16, 4), x, narrow, scale)
    if device == "cpu":
        request.getfixturevalue("last_program_first")
    for _ in range(5 if device == "cuda" else 1):
        assert torch.equal(_launch((16, 64, 16, 4), x, narrow, scale), first)


@pytest.mark.parametrize("kib", [100, 164, 228])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 300])
@pytest.mark.parametrize(("columns", "inner"), [(6144, 4096), (4096, 12288), (24576, 4096), (151936, 4096), (64, 64)])
def test_tiles_fit_the_device_and_keep_it_busy(kib: int, rows: int, columns: int, inner: int) -> None:
    quantised = pytest.importorskip("sparsespec_compile.kernels.products.quantised")
    limits = DeviceLimits("any", 80, 132, kib * 1024)
    for dtype in (torch.bfloat16, torch.float32):
        tile = quantised.tile_for(rows, columns, inner // 2, dtype, limits)
        assert tile.stages * tile.pairs * (2 * tile.columns + 2 * dtype.itemsize * tile.rows) < kib * 1024
        assert tile.stages >= 2
        if columns >= 4096 and dtype == torch.bfloat16:
            assert -(-columns // tile.columns) * tile.parts * -(-rows // tile.rows) >= 0.7 * 132


def test_rows_may_lie_apart(device: str) -> None:
    product = launched("quantised_product", device)
    narrow, scale = weights(40, 64, "int8", device)
    x = torch.randn(2, 5, 96).to(device, torch.bfloat16)
    check_product(product, x[..., :64], narrow, scale)
    check_product(product, x[..., ::2][..., :40], *weights(24, 40, "int8", device))


def test_rows_that_are_not_finite_stay_alone(device: str) -> None:
    """Padding may hold anything; no other row may see it."""
    narrow, scale = weights(40, 64, "int8", device)
    x = torch.randn(5, 64).to(device, torch.bfloat16)
    product = launched("quantised_product", device)
    expected = product(x, narrow, scale)
    spoilt = x.clone()
    spoilt[3] = torch.nan
    actual = product(spoilt, narrow, scale)
    assert actual[3].isnan().all()
    assert torch.equal(actual[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


def awkward_weight(dtype: torch.dtype) -> Tensor:
    """Rows that are ordinary, zero, too small, with values that are not finite, and as large as a dtype allows."""
    weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(3))
    weight[1] = 0.0
    weight[2] *= SMALLEST / 100
    weight[3, 5], weight[3, 6], weight[3, 7] = torch.nan, torch.inf, -torch.inf
    weight[4] = torch.inf
    weight[5, 9] = 1000.0
    weight[6] = torch.finfo(dtype).max
    weight[7, 1:] = 0.0
    return weight.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_torch_are_the_nearest(kind: str, dtype: torch.dtype) -> None:
    """Half a unit of the largest magnitude / 127 away at most, or an eighth of a weight's power of two in fp8."""
    weight = awkward_weight(dtype)
    narrow, scale = torch.full(weight.shape, 7.0).to(QUANTISED_DTYPES[kind]), torch.full((9,), torch.nan)
    ops.quantise_rows(weight, kind, narrow, scale)
    finite = torch.where(weight.double().isfinite(), weight.double(), 0.0)
    magnitude = finite.abs().amax(1)
    largest = LARGEST[narrow.dtype]
    zeros = torch.tensor([1, 4] if dtype == torch.float16 else [1, 2, 4])
    if dtype != torch.float16:
        assert magnitude[2] > 0
    assert not scale[zeros].any()
    assert not narrow[zeros].float().any()
    magnitude[zeros] = 0.0
    assert torch.allclose(scale.double(), magnitude / largest, rtol=1e-6, atol=0)
    error = (unpaired(narrow).double() * scale.double()[:, None] - finite).abs()
    step = scale.double()[:, None] / 2 if kind == "int8" else finite.abs() / 16 + scale.double()[:, None] * 2.0**-10
    kept = magnitude > 0
    assert (error <= step * (1 + 1e-5))[kept].all()
    assert narrow.float().abs().max() == largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_triton_are_torchs(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But that Triton's interpreter rounds ties in fp8 away, and loses the carry of rounding to a power of two; and
    that a GPU multiplies and rounds in one instruction, which may decide a tie otherwise."""
    module = pytest.importorskip("sparsespec_compile.kernels.products.quantised")
    monkeypatch.setattr(module, "_MOST_CHUNK", 32)
    weight = awkward_weight(dtype)
    expected = torch.empty(weight.shape, dtype=QUANTISED_DTYPES[kind]), torch.empty(9)
    products.quantise_rows(weight, *expected)
    actual = torch.full(weight.shape, 7.0).to(device, expected[0].dtype), torch.full((9,), torch.nan, device=device)
    wide = torch.cat((weight, weight), 1).to(device)[:, 70:]
    launched("quantise_rows", device)(wide, *actual)
    assert torch.equal(actual[1].cpu(), expected[1])
    narrow = unpaired(expected[0]).float()
    compared = torch.ones_like(narrow, dtype=torch.bool)
    if kind == "fp8" and device == "cpu":
        units = torch.where(weight.isfinite(), weight, 0.0).float() / expected[1][:, None]
        mirrored, near = 2 * units - narrow, narrow.abs() * 1e-5
        ties = ((mirrored.to(expected[0].dtype).float() - mirrored).abs() <= near) & ((mirrored - narrow).abs() > near)
        compared = ~ties & ~((narrow.frexp().mantissa.abs() == 0.5) & (narrow.abs() > units.abs()))
        assert compared.float().mean() > 0.8
    if kind == "int8" and device == "cuda":
        units = torch.where(weight.isfinite(), weight, 0.0).float() / expected[1].clamp(min=SMALLEST)[:, None]
        compared = ((units - units.floor()) - 0.5).abs() > 1e-4
        assert compared.float().mean() > 0.8
    assert torch.equal(unpaired(actual[0]).cpu().float()[compared], narrow[compared])
    launched("quantise_rows", device)(wide, *actual, False)
    assert torch.equal(actual[0].cpu().float()[compared], narrow[compared])


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_in_its_own_order(kind: str) -> None:
    weight, (paired, scale) = torch.randn(6, 32), weights(6, 32, kind, "cpu")
    ordered, same_scale = torch.empty_like(paired), torch.empty_like(scale)
    ops.quantise_rows(weight, kind, paired, scale)
    ops.quantise_rows(weight, kind, ordered, same_scale, paired=False)
    assert torch.equal(scale, same_scale)
    assert torch.equal(unpaired(paired).float(), ordered.float())
    assert not torch.equal(paired.float(), ordered.float())


def test_copies_follow_the_weight_in_place() -> None:
    weight, (narrow, scale) = torch.randn(6, 32), weights(6, 32, "int8", "cpu")
    addresses = narrow.data_ptr(), scale.data_ptr()
    for _ in range(2):
        ops.quantise_rows(torch.nn.Parameter(weight), "int8", narrow, scale)
        assert torch.allclose(unpaired(narrow) * scale[:, None], weight, atol=float(weight.abs().max()) / 200)
        weight *= -3.0
    assert (narrow.data_ptr(), scale.data_ptr()) == addresses


INT8, SCALE = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(3, 6), INT8, SCALE), "last dimension must be weight's, 8"),
        ((torch.zeros(3, 8).double(), INT8, SCALE), "allowed on cpu: torch.float16, torch.bfloat16, torch.float32"),
        ((torch.zeros(3, 8), INT8.short(), SCALE), "weight is torch.int16; it must be torch.int8 or"),
        ((torch.zeros(3, 4), INT8.T, SCALE), "must be contiguous"),
        ((torch.zeros(3, 8), INT8, SCALE[:3]), r"scale has shape \(3,\)"),
        ((torch.zeros(3, 8), INT8, SCALE.double()), "scale is torch.float64"),
        ((torch.zeros(3, 8), INT8[None], SCALE), "number of dimensions must be 2"),
        ((torch.zeros(3, 7), torch.zeros(4, 7, dtype=torch.int8), SCALE), "must be even, since weights lie in pairs"),
        ((torch.zeros(3, 8), torch.zeros(33, dtype=torch.int8)[1:].view(4, 8), SCALE), "begins at byte 1 of its"),
    ],
)
def test_products_refuse_what_does_not_fit(arguments: tuple[Tensor, ...], text: str) -> None:
    with pytest.raises(KernelInputError, match=text):
        ops.quantised_product(*arguments)


@pytest.mark.parametrize(
    ("weight", "kind", "narrow", "text"),
    [
        (torch.zeros(4, 8), "int4", INT8, "the kind of 8-bit weights is 'int4'"),
        (torch.zeros(4, 8), "fp8", INT8, "'fp8' with torch.float8_e4m3fn"),
        (torch.zeros(4, 9), "int8", INT8, "out_weight has shape"),
        (torch.zeros(8, 4).T, "int8", INT8, "weight has last stride 4"),
        (torch.zeros(4, 8).double(), "int8", INT8, "weight is torch.float64"),
    ],
)
def test_weights_refuse_what_does_not_fit(weight: Tensor, kind: str, narrow: Tensor, text: str) -> None:
    with pytest.raises(KernelInputError, match=text):
        ops.quantise_rows(weight, kind, narrow, SCALE.clone())


def test_fp8_needs_a_device_that_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    old = launch.DeviceLimits("an A100", 80, 108, 164 * 1024)
    monkeypatch.setattr(launch, "device_limits", lambda _: old)
    launch.refuse_fp8(INT8)
    with pytest.raises(KernelUnavailableError, match=r"an A100 has compute capability 8\.0; fp8 needs 8\.9"):
        launch.refuse_fp8(INT8.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("kind", KINDS)
def test_ops_keep_their_schemas(kind: str) -> None:
    narrow, scale = weights(20, 32, kind, "cpu")
    # What a schema writes is looked for by arithmetic that torch lacks for fp8.
    looked_at = ["test_schema"] if kind == "int8" else []
    utilities = [*looked_at, "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.quantised_product, (torch.randn(1, 3, 32), narrow, scale), test_utils=utilities)
    arguments = torch.randn(20, 32), narrow, scale
    torch.library.opcheck(torch.ops.sparsespec.quantise_rows.default, arguments, test_utils=utilities)
