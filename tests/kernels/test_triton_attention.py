"""The Triton attention against the float64 reference, each element within a derived error.

Without a GPU the kernels run in Triton's interpreter; `pytest -m gpu` runs the same tests, and larger ones, on CUDA.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError
from sparsespec_compile.kernels.launch import Promise, promised
from sparsespec_compile.kernels.ops import Mode

from .cases import Case, Request, Shape, build
from .error_budget import Expected, assert_within, expect
from .not_finite import HIDDEN, SHAPES, check_hidden, with_not_finite
from .steps import LAYERS, MIXED

pytest.importorskip("triton", reason="Triton is published for Linux only")

LONG = [
    Request(Mode.DRAFT, cached=75, pillars=41, recent=70),
    Request(Mode.VERIFY, cached=70, rows=9, score_rows=9),
    Request(Mode.VERIFY, cached=150, rows=4, score_rows=4, pillars=140, recent=145),
    Request(Mode.VERIFY, cached=160, rows=4, score_rows=4, pillars=20, recent=30),
    Request(Mode.PREFILL, cached=3, rows=37, score_rows=20),
]
"""More keys than one block, more pillars than one block and than measure scores, more recent positions than those, more
rows and more scored rows than one tile."""


def launch(case: Case) -> Tensor:
    from sparsespec_compile.kernels.attention import launcher

    return launcher.dual_mode_attention(*case.arguments())


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    expected = expect(case, dtype, device)
    actual = case.to(dtype, device)
    output = launch(actual)
    check_result(output, actual, expected)


def check_result(output: Tensor, actual: Case, expected: Expected) -> None:
    assert_within(output, expected.output, expected.output_error)
    assert_within(actual.tensors["scores"], expected.scores, expected.score_error * (expected.scores >= 0))
    torch.testing.assert_close(actual.pool.double(), expected.pool, rtol=0, atol=0, equal_nan=True)


FEW_HIDDEN = (
    ("gqa", torch.float32, torch.nan),
    ("gqa", torch.bfloat16, torch.inf),
    ("chunks", torch.float32, torch.nan),
)
FAST = ("gqa", "groups of 7, page 16", "window", "chunks", "unequal dims")


@pytest.mark.parametrize(
    "layer", [pytest.param(layer, marks=() if layer in FAST else pytest.mark.slow) for layer in LAYERS]
)
def test_mixed_step_in_float32(layer: str, device: str) -> None:
    check(build(LAYERS[layer], MIXED, torch.float32), torch.float32, device)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        ("gqa", torch.bfloat16),
        ("unequal dims", torch.float16),
        pytest.param("gqa", torch.float16, marks=pytest.mark.slow),
        pytest.param("unequal dims", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_mixed_step_in_half_precision(layer: str, dtype: torch.dtype, device: str) -> None:
    check(build(LAYERS[layer], MIXED, dtype), dtype, device)


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 33])
def test_several_blocks_and_tiles(window: int, device: str) -> None:
    check(
        build(Shape(q_heads=7, kv_heads=1, page_size=16, window=window), LONG, torch.bfloat16), torch.bfloat16, device
    )
    check(build(Shape(window=window), LONG, torch.float32), torch.float32, device)


AROUND_A_START = [
    Request(Mode.VERIFY, cached=60, rows=9, score_rows=9, pillars=20, recent=57),
    Request(Mode.VERIFY, cached=64, rows=3, score_rows=3, pillars=9, recent=60),
    Request(Mode.VERIFY, cached=63, rows=2, score_rows=1, pillars=9, recent=30),
    Request(Mode.VERIFY, cached=40, rows=30, score_rows=8, pillars=9, recent=38),
    Request(Mode.DRAFT, cached=63, rows=3, pillars=20, recent=58),
    Request(Mode.DRAFT, cached=64, pillars=41, recent=60),
    Request(Mode.PREFILL, cached=3, rows=97, score_rows=45),
    Request(Mode.PREFILL, cached=32, rows=80, score_rows=5),
]
"""Tiles, scored rows and drafts before, on both sides of and behind the start of a chunk of 32, and prompts of so many
tiles that they read the step's own rows beside the pool, one of them from the start of a chunk on."""


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(q_heads=7, kv_heads=1, page_size=16, window=32, chunked=True), torch.bfloat16),
        pytest.param(Shape(page_size=4, window=32, chunked=True, sinks=0.0), torch.float32, marks=pytest.mark.slow),
        pytest.param(Shape(page_size=16, window=64, chunked=True, softcap=3.0), torch.float16, marks=pytest.mark.slow),
    ],
)
def test_chunks_begin_within_a_tile(shape: Shape, dtype: torch.dtype, device: str) -> None:
    check(build(shape, AROUND_A_START, dtype), dtype, device)


SINGLE = [
    Request(Mode.DRAFT, cached=75, pillars=41, recent=70),
    Request(Mode.VERIFY, cached=150, rows=1),
    Request(Mode.IDLE, cached=30, rows=4),
    Request(Mode.VERIFY, cached=63, rows=1),
    Request(Mode.PREFILL, rows=1),
    Request(Mode.DRAFT, cached=64),
    Request(Mode.DRAFT, cached=31, pillars=3, recent=31),
]


def unscored(requests: list[Request]) -> list[Request]:
    return [dataclasses.replace(request, score_rows=0) for request in requests]


JUDGING = [
    Request(Mode.DRAFT, cached=75, rows=3, pillars=41, recent=70),
    Request(Mode.DRAFT, cached=150, rows=6, pillars=70, recent=140),
    Request(Mode.DRAFT, cached=31, rows=2, pillars=3, recent=31),
    Request(Mode.DRAFT, cached=64, rows=3),
]
"""Drafts of several rows, which fit a small tile or take two."""


@pytest.mark.parametrize(
    "requests", [SINGLE, JUDGING, unscored(LONG), unscored(MIXED)], ids=["kept", "judging", "broken", "broken, short"]
)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(), marks=pytest.mark.slow),
        Shape(q_heads=7, kv_heads=1, page_size=16, window=33),
        pytest.param(Shape(page_size=16, window=32, chunked=True), marks=pytest.mark.slow),
    ],
)
def test_steps_promised_to_need_small_tiles(requests: list[Request], shape: Shape, device: str) -> None:
    """They take tiles of their own. A step that breaks the promise is right as well."""
    with promised(Promise.SMALL_TILES):
        check(build(shape, requests, torch.bfloat16), torch.bfloat16, device)


@pytest.mark.parametrize("requests", [unscored(LONG), unscored(MIXED)], ids=["long", "short"])
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 33])
def test_steps_promised_to_have_no_scores(requests: list[Request], window: int, device: str) -> None:
    with promised(Promise.NO_SCORES):
        check(build(Shape(page_size=16, window=window), requests, torch.bfloat16), torch.bfloat16, device)


@pytest.mark.parametrize("promise", [Promise.NO_SCORES, Promise.SMALL_TILES])
def test_scores_that_a_step_promised_not_to_ask_for_are_not_written(promise: Promise, device: str) -> None:
    """Its rows are right, and so are the pool and everything else in the scores."""
    case = build(Shape(page_size=16), LONG, torch.bfloat16)
    expected = expect(case, torch.bfloat16, device)
    actual = case.to(torch.bfloat16, device)
    scores = actual.tensors["scores"].clone()
    with promised(promise):
        output = launch(actual)
    assert_within(output, expected.output, expected.output_error)
    assert torch.equal(actual.tensors["scores"].view(torch.int32), scores.view(torch.int32))


@pytest.mark.parametrize(
    ("group", "rows", "window"),
    [
        (4, 17, 150),
        (5, 13, 0),
        *(
            pytest.param(*given, marks=pytest.mark.slow)
            for given in ((4, 17, 0), (8, 9, 0), (8, 9, 150), (5, 13, 150), (4, 65, 0), (4, 65, 150))
        ),
    ],
)
def test_verifications_of_several_tiles_give_scores_as_they_attend(
    group: int, rows: int, window: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scored rows fill the last tile, so no pass of their own reads all keys once more."""
    scored = ops.scored_rows_at_most(group)
    requests = [
        Request(Mode.VERIFY, cached=200, rows=rows, score_rows=scored, pillars=30, recent=190),
        Request(Mode.VERIFY, cached=70, rows=rows, score_rows=3, pillars=9, recent=64),
        Request(Mode.DRAFT, cached=75, pillars=41, recent=70),
    ]
    case = build(Shape(q_heads=2 * group, page_size=16, window=window), requests, torch.bfloat16)
    with promised(Promise.ONLY_VERIFICATIONS_SCORED), monkeypatch.context() as patches:
        patches.setattr("sparsespec_compile.kernels.attention.launcher.score_kernel", None)
        check(case, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verifications_of_more_scored_rows_than_a_tile_holds(dtype: torch.dtype, device: str) -> None:
    """As 9 rows in float32, where tiles are small: in passes of their own, whatever a step promises of others."""
    requests = [Request(Mode.VERIFY, cached=70, rows=9, score_rows=9, pillars=9, recent=64)]
    with promised(Promise.ONLY_VERIFICATIONS_SCORED):
        check(build(Shape(), requests, dtype), dtype, device)


@pytest.mark.parametrize("promise", [Promise.NOTHING, Promise.ONLY_VERIFICATIONS_SCORED])
@pytest.mark.parametrize("changed", [{"scored_ahead": 0}, pytest.param({"big_m": 16}, marks=pytest.mark.slow)])
def test_tiles_that_cannot_give_out_what_a_step_asks_for(
    promise: Promise, changed: dict[str, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file of measured ones may name them: a verification's scores take passes of their own then."""
    from sparsespec_compile.kernels.attention import launcher

    choose = launcher.tiling_for
    monkeypatch.setattr(launcher, "tiling_for", lambda *given: dataclasses.replace(choose(*given), **changed))
    requests = [Request(Mode.VERIFY, cached=70, rows=9, score_rows=9, pillars=9, recent=64)]
    with promised(promise):
        check(build(Shape(page_size=16), requests, torch.bfloat16), torch.bfloat16, device)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_rows_of_requests_that_have_none_are_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where such a request's rows would begin may be anywhere, also behind the last row. The interpreter can watch."""
    from sparsespec_compile.kernels.attention import kernel

    requests = [Request(Mode.VERIFY, cached=9, rows=3), Request(Mode.IDLE, rows=2), Request(Mode.DRAFT, rows=0)]
    case = build(Shape(), requests, torch.float32)
    rows = case.tensors["q"].shape[0]
    case.tensors["row_start"][1:] = rows + 7
    cleared: list[int] = []
    monkeypatch.setattr(kernel, "clear_row", lambda out, row, width: cleared.append(int(row)))
    launch(case)
    own = range(case.row_start[0], case.row_start[0] + 3)
    assert sorted(cleared) == [row for row in range(rows) if row not in own]


@pytest.mark.parametrize("kind", ["mixed", "prefill"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 512)])
def test_a_tile_holds_the_rows_that_the_engine_scores(kind: str, dims: tuple[int, int]) -> None:
    from sparsespec_compile.kernels.launch import INTERPRETER, StepKind
    from sparsespec_compile.kernels.tuning.tiling import Layer, default_tiling

    for group in range(1, 130):
        tiling = default_tiling(Layer(group, *dims, torch.bfloat16, 16), StepKind(kind), INTERPRETER)
        assert 1 <= ops.scored_rows_at_most(group) <= tiling.big_m // group


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 40.0), (torch.bfloat16, 40.0), (torch.float16, 8.0)])
def test_drafts_that_missed_what_rows_look_at_most(dtype: torch.dtype, scale: float, device: str) -> None:
    """Weights measured from what a draft could see leave the range of numbers; tiles of both kinds attend again."""
    rows = ((2, 2), (9, 9), (40, 8))  # the last ones in several tiles, of which one attends again
    requests = [Request(Mode.VERIFY, cached=70, rows=r, score_rows=s, pillars=1, recent=69) for r, s in rows]
    check(build(Shape(scale=scale), requests, dtype), dtype, device)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "bad"),
    [
        pytest.param(shape, dtype, error, bad, marks=() if (shape, dtype, bad) in FEW_HIDDEN else pytest.mark.slow)
        for shape in SHAPES
        for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.05))
        for bad in (torch.nan, torch.inf)
    ],
)
def test_rows_take_nothing_from_tokens_that_they_do_not_see(
    shape: str, dtype: torch.dtype, error: float, bad: float, device: str
) -> None:
    case = with_not_finite(build(SHAPES[shape], HIDDEN, dtype), bad)
    actual = case.to(dtype, device)
    check_hidden(case, launch(actual), actual, error)


def test_rows_promised_to_be_single_take_nothing_from_others(device: str) -> None:
    case = with_not_finite(build(Shape(), unscored(HIDDEN), torch.bfloat16), torch.nan)
    actual = case.to(torch.bfloat16, device)
    with promised(Promise.SMALL_TILES):
        check_hidden(case, launch(actual), actual, 0.05)


def test_more_query_heads_than_a_tile_has_rows(device: str) -> None:
    check(build(Shape(q_heads=17, kv_heads=1), MIXED[:4], torch.float32), torch.float32, device)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale: float, device: str) -> None:
    check(build(Shape(scale=scale), MIXED[:4], torch.float32), torch.float32, device)


def test_no_rows_no_requests_no_scores(device: str) -> None:
    """Empty dimensions launch nothing that could fail, and rows without requests give zeros."""
    case = build(Shape(), [Request(Mode.PREFILL, rows=3)], torch.float32).to(torch.float32, device)
    none = {name: tensor[:0] for name, tensor in case.tensors.items() if name not in ("q", "k", "v", "kv")}
    assert torch.count_nonzero(launch(dataclasses.replace(case, tensors={**case.tensors, **none}))) == 0
    empty = {name: case.tensors[name][:0] for name in ("q", "k", "v")}
    assert launch(dataclasses.replace(case, tensors={**case.tensors, **empty})).shape == (0, 4, 16)
    without = {"scores": case.tensors["scores"][..., :0]}
    assert torch.isfinite(launch(dataclasses.replace(case, tensors={**case.tensors, **without}))).any()


def test_float64_is_refused(device: str) -> None:
    case = build(Shape(), MIXED).to(torch.float64, device)
    with pytest.raises(KernelInputError, match=r"q is torch.float64; allowed .* torch.bfloat16, torch.float32"):
        launch(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget_notices_wrong_results(dtype: torch.dtype) -> None:
    """A window off by one, a missing score row and inputs rounded to fewer bits all fall outside the budget."""
    case = build(Shape(window=20), MIXED, dtype)
    expected = expect(case, dtype)
    coarser = torch.bfloat16 if dtype == torch.float32 else torch.float8_e4m3fn
    wrong_window = dataclasses.replace(case, shape=dataclasses.replace(case.shape, window=21))
    fewer_scores = build(Shape(window=20), [*MIXED[:3], dataclasses.replace(MIXED[3], score_rows=3)], dtype)
    rounded = case.to(dtype)
    rounded.tensors["q"].copy_(rounded.tensors["q"].to(coarser))
    for wrong in (wrong_window, rounded):
        with pytest.raises(AssertionError):
            assert_within(expect(wrong, dtype).output, expected.output, expected.output_error)
    here = (case.tensors["score_slot"][3], slice(None), slice(0, 12))
    with pytest.raises(AssertionError):
        assert_within(expect(fewer_scores, dtype).scores[here], expected.scores[here], expected.score_error[here])
