"""Experts: torch's and Triton's against a loop over experts in float64, and what they refuse.

Error budget. Let e = 2**-23, the error of one float32 operation (tensor cores cut off instead of rounding), u the
roundoff of the dtype and t its smallest normal number's unit; H what the first product sums over, I the second, K the
choices of a row.

First product p = x W + b: (H + 1) e P with P = sum |x W| + |b|, for gate g and up v alike. A limit does not enlarge it.
Activation: its slope is at most 1.13 (silu, swish, gelu), 1 (relu), 2 (|g| + dg) (relu2). Itself it errs by
(|z| + 16) e of |a| where exp is taken of z (its argument is rounded; z = alpha g, or 1.6 g + 0.072 g**3 by tanh), and
erf by 4 e, of |g| since 1 + erf may cancel; below exp's range everything is under 2**-100.
Hidden h = a s, s = v + shift: da |s| + |a| ds + da ds + 2 e |h|, and rounded to the dtype, u |h| + t.
Second product y = h D + c: sum dh |D| + (I + 2) e (sum |h D| + |c|), times the row's weight w.
Output: sum over k of |w| dy, (K + 1) e of sum |w y|, and u of the result. A tenth is added for products of errors.
Triton's interpreter cuts bfloat16 off where a GPU rounds, which errs twice as far.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError
from sparsespec_compile.kernels.launch import DeviceLimits
from sparsespec_compile.kernels.ops import ACTIVATIONS, ExpertsCall, ExpertsSettings

from .error_budget import EPSILON, ROUNDOFF, TINY, assert_within

Run = Callable[..., Tensor]

SILU = ExpertsSettings("silu")
GPT_OSS = ExpertsSettings("swish", alpha=1.702, limit=2.0, shift=1.0, interleaved=True)

ACT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda g, _: g * torch.sigmoid(g),
    "swish": lambda g, alpha: g * torch.sigmoid(alpha * g),
    "gelu": lambda g, _: functional.gelu(g),
    "gelu_tanh": lambda g, _: functional.gelu(g, approximate="tanh"),
    "relu": lambda g, _: g.clamp(min=0),
    "relu2": lambda g, _: g.clamp(min=0) ** 2,
}


@dataclass(frozen=True)
class Sizes:
    """Rows, experts, choices of a row, width and hidden values."""

    rows: int
    count: int = 6
    chosen: int = 2
    width: int = 40
    inner: int = 24


def build(
    sizes: Sizes,
    settings: ExpertsSettings = SILU,
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = True,
    biased: bool = False,
    transposed: bool = False,
    index: Tensor | None = None,
    seed: int = 0,
) -> ExpertsCall:
    """Random arguments, which are exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    count, columns = sizes.count, sizes.inner * (1 + gated)
    up = draw(count, columns, sizes.width, scale=max(sizes.width, 1) ** -0.5)
    down = draw(count, sizes.width, sizes.inner, scale=max(sizes.inner, 1) ** -0.5)
    if transposed:
        up, down = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (up, down))
    if index is None:
        index = torch.rand(sizes.rows, count, generator=generator).topk(sizes.chosen, dim=1).indices
    weight = torch.rand(sizes.rows, sizes.chosen, generator=generator)
    biases = (draw(count, columns), draw(count, sizes.width)) if biased else (None, None)
    return ExpertsCall(2 * draw(sizes.rows, sizes.width), index, weight, up, down, *biases, settings)


def on(call: ExpertsCall, device: str) -> ExpertsCall:
    return call._replace(**{name: one.to(device) for name, one in call._asdict().items() if isinstance(one, Tensor)})


def expected(call: ExpertsCall, roundoff: float, tiny: float) -> tuple[Tensor, Tensor]:
    """A loop over experts in float64, and the error that is allowed."""
    settings = call.settings
    x, weight = call.x.double(), call.weight.double()
    up, down = call.up.double(), call.down.double()
    width, inner, chosen = x.shape[1], down.shape[2], call.choice.shape[1]
    out, terms, error = (torch.zeros_like(x) for _ in range(3))
    for expert in range(len(up)):
        w = torch.where(call.choice == expert, weight, 0.0).sum(1)
        row = (call.choice == expert).any(1)
        p, large = x[row] @ up[expert].T, x[row].abs() @ up[expert].abs().T
        if call.up_bias is not None:
            p, large = p + call.up_bias[expert].double(), large + call.up_bias[expert].double().abs()
        dp = (width + 1) * EPSILON * large
        gated = len(up[expert]) == 2 * inner
        if gated:
            halves = [(one[:, ::2], one[:, 1::2]) if settings.interleaved else one.chunk(2, 1) for one in (p, dp)]
            (g, v), (dg, dv) = halves
            if settings.limit:
                g, v = g.clamp(max=settings.limit), v.clamp(-settings.limit, settings.limit)
            s, ds = v + settings.shift, dv + EPSILON * (v.abs() + settings.shift)
        else:
            g, dg, s, ds = p, dp, torch.ones_like(p), torch.zeros_like(p)
        a = ACT[settings.activation](g, settings.alpha)
        slope = 2 * (g.abs() + dg) if settings.activation == "relu2" else 1.13
        z = {"swish": settings.alpha * g.abs(), "gelu_tanh": 1.6 * g.abs() + 0.072 * g.abs() ** 3}
        own = (z.get(settings.activation, g.abs()) + 16) * a.abs()
        if settings.activation == "gelu":
            own = 4 * g.abs()
        da = slope * dg + own * EPSILON + 2.0**-100
        h = a * s
        dh = da * s.abs() + a.abs() * ds + da * ds + 2 * EPSILON * h.abs()
        dh = dh + roundoff * (h.abs() + dh) + tiny
        y, size = h @ down[expert].T, h.abs() @ down[expert].abs().T
        if call.down_bias is not None:
            y, size = y + call.down_bias[expert].double(), size + call.down_bias[expert].double().abs()
        dy = dh @ down[expert].abs().T + (inner + 2) * EPSILON * size
        out[row] += w[row, None] * y
        terms[row] += w[row, None].abs() * y.abs()
        error[row] += w[row, None].abs() * dy
    error = 1.1 * (error + (chosen + 1) * EPSILON * terms + roundoff * out.abs()) + tiny
    return out, error


def check(run: Run, call: ExpertsCall) -> Tensor:
    """The result lies within the budget of the loop's; gives it back."""
    actual = run(*call.arguments())
    assert actual.dtype == call.x.dtype
    dtype = call.x.dtype
    if dtype == torch.float64:
        exact, _ = expected(call, 0.0, 0.0)
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)
        return actual
    roundoff = ROUNDOFF[dtype] * (1 if actual.is_cuda or dtype != torch.bfloat16 else 2)
    assert actual.shape == call.x.shape
    if actual.numel():
        assert_within(actual, *expected(call, roundoff, TINY[dtype]))
    return actual


def launched(device: str) -> Run:
    """The Triton launcher, which on a CPU is interpreted; a GPU goes through the op."""
    if device == "cuda":
        return ops.experts
    return pytest.importorskip("sparsespec_compile.kernels.products.experts").experts


FORMS: dict[str, dict] = {
    "gated": {},
    "gpt-oss": {"settings": GPT_OSS, "biased": True, "transposed": True},
    "interleaved": {"settings": GPT_OSS},
    "transposed": {"transposed": True, "biased": True},
    "limited": {"settings": ExpertsSettings("silu", limit=1.5)},
    "no gate": {"gated": False, "settings": ExpertsSettings("relu2"), "biased": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch(form: str, dtype: torch.dtype) -> None:
    check(ops.experts, build(Sizes(17), dtype=dtype, **FORMS[form]))


def test_the_site_takes_matrices_as_they_lie() -> None:
    call = build(Sizes(9), transposed=True)
    turned = call._replace(up=call.up.transpose(1, 2), down=call.down.transpose(1, 2))
    assert turned.up.is_contiguous()
    assert torch.equal(ops.experts_site(*turned.arguments(), True), ops.experts(*call.arguments()))
    assert torch.equal(ops.experts_site(*call.arguments(), False), ops.experts(*call.arguments()))


@pytest.mark.parametrize("form", FORMS)
def test_triton(form: str, device: str) -> None:
    check(launched(device), on(build(Sizes(17), **FORMS[form]), device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "form", [*list(FORMS)[:2], *(pytest.param(f, marks=pytest.mark.slow) for f in list(FORMS)[2:])]
)
def test_triton_in_16_bits(form: str, dtype: torch.dtype, device: str) -> None:
    check(launched(device), on(build(Sizes(17), dtype=dtype, **FORMS[form]), device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, device: str) -> None:
    settings = ExpertsSettings(activation, alpha=1.3 if activation == "swish" else 0.0)
    call = build(Sizes(5, count=2, chosen=1, width=16, inner=16), settings)
    check(launched(device), on(call._replace(x=8 * call.x), device))
    check(ops.experts, call._replace(x=8 * call.x))


FEW = (1, 16, 33)


def where(rows: int) -> tuple[pytest.MarkDecorator, ...]:
    """All numbers of rows run on a GPU, in slow runs the small ones and those beside multiples of a tile."""
    if rows in FEW:
        return ()
    return (pytest.mark.slow,) if rows <= 40 or rows % 32 in (31, 0, 1) or rows == 300 else (pytest.mark.gpu,)


@pytest.mark.parametrize("rows", [pytest.param(rows, marks=where(rows)) for rows in range(1, 301)])
def test_every_number_of_rows(rows: int, device: str) -> None:
    """Small tiles, so that experts have several, in both ways to number them."""
    sizes = Sizes(rows, count=3, chosen=2, width=16, inner=20)
    check(launched(device), on(build(sizes, dtype=torch.float32, seed=rows), device))


def skewed(kind: str, rows: int, count: int, chosen: int) -> Tensor:
    index = torch.arange(rows * chosen).view(rows, chosen) % count
    if kind == "one expert":
        return torch.full_like(index, count - 2)
    if kind == "first and last":
        return torch.where(index % 2 == 0, 0, count - 1)
    if kind == "nobody":
        return torch.full_like(index, -1)
    if kind == "outside":  # as what masks of expert parallelism hold, and larger than 32 bits
        return torch.where(index == 1, count, torch.where(index == 2, 2**33 + 1, torch.where(index == 3, -1, index)))
    return index.to(torch.int32)


@pytest.mark.parametrize("kind", ["one expert", "first and last", "nobody", "outside", "32 bits"])
@pytest.mark.parametrize("rows", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_choices_that_are_not_even(kind: str, rows: int, device: str) -> None:
    call = build(Sizes(rows, chosen=3), biased=True, index=skewed(kind, rows, 6, 3))
    for run, at in ((launched(device), device), (ops.experts, "cpu")):
        actual = check(run, on(call, at))
        if kind == "nobody":
            assert not actual.any()


@pytest.mark.parametrize("by_pair", [False, True])
def test_tiles_cover_every_pair_once(by_pair: bool, device: str) -> None:
    """The plan: a permutation by expert, and slots whose rows are each expert's, none more than a tile."""
    module = pytest.importorskip("sparsespec_compile.kernels.products.experts")
    rows, count, tile = (7, 20, 16) if by_pair else (150, 7, 16)
    index = torch.randint(-1, count, (rows, 3), generator=torch.Generator().manual_seed(2)).to(device)
    order, slots = module._plan(index, count, tile)
    flat = index.flatten().cpu()
    assert slots.shape[1] == (21 if by_pair else 450 // 16 + 7)
    taken = int((flat >= 0).sum())
    assert torch.equal(order[:taken].cpu().long(), flat.argsort(stable=True)[len(flat) - taken :])
    covered = torch.zeros(len(flat), dtype=torch.int64)
    for expert, first, end in slots.T.tolist():
        if first < end:
            assert end - first <= tile
            covered[first:end] += 1
            assert (flat[order[first:end].cpu().long()] == expert).all()
    assert torch.equal(covered, (torch.arange(len(flat)) < taken).long())


def test_tiles_of_other_sizes(device: str) -> None:
    module = pytest.importorskip("sparsespec_compile.kernels.products.experts")
    call = on(build(Sizes(20, count=2, width=70, inner=36), dtype=torch.bfloat16), device)
    for rows, columns, inner in ((32, 16, 64), (128, 64, 32)):
        tile = module.Tile(rows, columns, inner, 4, 2)
        check(partial(module.experts, tiles=(tile, replace(tile, columns=2 * columns))), call)


@pytest.mark.parametrize("sizes", [Sizes(0), Sizes(3, inner=0), Sizes(3, chosen=0), Sizes(3, width=0)])
def test_nothing_to_multiply(sizes: Sizes, device: str) -> None:
    call = build(sizes, biased=True)
    for run, at in ((launched(device), device), (ops.experts, "cpu")):
        check(run, on(call, at))


def test_equal_calls_give_equal_bits_and_rows_do_not_see_each_other(
    device: str, request: pytest.FixtureRequest
) -> None:
    call = on(build(Sizes(12, count=3), dtype=torch.bfloat16, biased=True), device)
    run = launched(device)
    first = run(*call.arguments())
    spoilt = call.x.clone()
    spoilt[::4] = torch.nan
    others = [row for row in range(12) if row % 4]
    actual = run(*call._replace(x=spoilt).arguments())
    assert actual[::4].isnan().all()
    assert torch.equal(actual[others], first[others])
    if device == "cpu":
        request.getfixturevalue("last_program_first")
    for _ in range(5 if device == "cuda" else 1):
        assert torch.equal(run(*call.arguments()), first)


def test_rows_may_lie_apart(device: str) -> None:
    call = on(build(Sizes(7)), device)
    wide = torch.randn(7, 100, device=device)
    wide[:, :40] = call.x
    check(launched(device), call._replace(x=wide[:, :40]))
    check(launched(device), call._replace(x=call.x.T.contiguous().T))


@pytest.mark.parametrize("kib", [100, 164, 228])
@pytest.mark.parametrize("rows", [1, 16, 64, 256, 2048])
@pytest.mark.parametrize(("count", "chosen"), [(128, 8), (8, 2), (256, 8), (1, 1)])
def test_tiles_fit_the_device_twice(kib: int, rows: int, count: int, chosen: int) -> None:
    module = pytest.importorskip("sparsespec_compile.kernels.products.experts")
    for dtype in (torch.bfloat16, torch.float32):
        for matrices in (1, 2):
            limits = DeviceLimits("any", 80, 132, kib * 1024)
            tile = module.tile_for(rows * chosen, count, matrices, dtype, limits)
            assert 2 * (tile.shared_bytes(dtype.itemsize, matrices) + 1024) <= kib * 1024
            assert tile.stages >= 2
            assert tile.rows >= min(rows * chosen * 2 / count, 32)


def test_the_ops_keep_their_schemas() -> None:
    call = build(Sizes(5), GPT_OSS, biased=True)
    torch.library.opcheck(ops.experts, call.arguments())
    torch.library.opcheck(ops.experts_site, (*call.arguments(), False))
    names = [argument.name for argument in ops.experts._schema.arguments]
    assert ExpertsCall.of(names).arguments() == tuple(names)
    assert ExpertsCall.of(names).settings == ExpertsSettings._fields


CALL = build(Sizes(4))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": CALL.x[None]}, "x has shape .*; its number of dimensions must be 2"),
        ({"x": CALL.x.half()}, "up is torch.float32 but x is torch.float16"),
        ({"choice": CALL.choice.float()}, "choice is torch.float32; it must be torch.int32 or torch.int64"),
        ({"weight": CALL.weight[:, :1]}, "weight has shape .*; the other arguments call for"),
        ({"weight": CALL.choice}, "weight is torch.int64; allowed"),
        ({"up": CALL.up[:, :, :8]}, "up has shape .*; the other arguments call for"),
        ({"down": CALL.down[:, :, :9]}, "up gives 48 columns and down takes 9"),
        ({"up": CALL.up.repeat(1, 1, 2)[:, :, ::2]}, r"up has strides .*; one of the last two must be 1"),
        ({"up_bias": torch.zeros(6, 3)}, "up_bias has shape .*; the other arguments call for"),
        ({"settings": ExpertsSettings("tanh")}, "activation is 'tanh'; allowed: silu"),
        ({"settings": ExpertsSettings("silu", limit=-1.0)}, "limit is -1.0"),
        ({"up": CALL.up[:, :24], "settings": GPT_OSS}, "experts without a gate have"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, text: str) -> None:
    with pytest.raises(KernelInputError, match=text):
        ops.experts(*CALL._replace(**change).arguments())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 128, 256])
def test_qwen3_30b_on_a_gpu_and_in_a_graph(rows: int) -> None:
    """128 experts, 8 of a row, replayed with other choices."""
    sizes = Sizes(rows, count=128, chosen=8, width=2048, inner=768)
    call, other = (on(build(sizes, dtype=torch.bfloat16, seed=seed), "cuda") for seed in range(2))
    check(ops.experts, call)
    other = other._replace(up=call.up, down=call.down)
    static = call._replace(x=call.x.clone(), choice=call.choice.clone(), weight=call.weight.clone())
    ops.experts(*static.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.experts(*static.arguments())
    for one in (call, other, call):
        for name in ("x", "choice", "weight"):
            getattr(static, name).copy_(getattr(one, name))
        result.fill_(torch.nan)
        graph.replay()
        assert torch.equal(result, ops.experts(*one.arguments()))
