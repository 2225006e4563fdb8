"""The torch reference against attention written from its definition."""

import pytest
import torch

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.kernels.reference import attention as reference

from .cases import Case, Request, Shape, build
from .naive import expected_output, expected_pool, expected_scores
from .not_finite import HIDDEN, SHAPES, check_hidden, with_not_finite
from .steps import LAYERS, MIXED

FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}


def _check_against_definition(case: Case) -> None:
    pool = expected_pool(case)
    case = case.to(torch.float64, score_dtype=torch.float64)
    out = reference.dual_mode_attention(*case.arguments())
    torch.testing.assert_close(out, expected_output(case), **FLOAT64)
    torch.testing.assert_close(case.tensors["scores"], expected_scores(case), **FLOAT64)
    torch.testing.assert_close(case.pool, pool, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_mixed_step_follows_the_definition(layer: str) -> None:
    _check_against_definition(build(LAYERS[layer], MIXED))


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(("window", "chunked"), [(0, False), (5, False), (5, True)])
def test_page_sizes_and_windows(page_size: int, window: int, chunked: bool) -> None:
    _check_against_definition(build(Shape(page_size=page_size, window=window, chunked=chunked), MIXED, seed=page_size))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_take_nothing_from_tokens_that_they_do_not_see(shape: str, bad: float) -> None:
    case = with_not_finite(build(SHAPES[shape], HIDDEN), bad)
    actual = case.to(torch.float64, score_dtype=torch.float64)
    check_hidden(case, reference.dual_mode_attention(*actual.arguments()), actual, error=1e-11)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_of_a_site_take_nothing_from_later_ones(bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    expected = ops.attention_site(q, k, v, 0.25, 0, 0.0, False, 0, None)
    k[:, 1, 5, 3], v[:, 1, 5, 2] = bad, bad
    actual = ops.attention_site(q, k, v, 0.25, 0, 0.0, False, 0, None)
    torch.testing.assert_close(actual[:, :5], expected[:, :5], rtol=0, atol=0)
    torch.testing.assert_close(actual[:, :, :2], expected[:, :, :2], rtol=0, atol=0)
    assert actual[:, 5:, 2:].isnan().all()


def test_rows_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than a block, whose scored rows span two blocks, gives what one block gives."""
    requests = [Request(Mode.PREFILL, cached=5, rows=19, score_rows=9), Request(Mode.VERIFY, cached=40, rows=9)]
    monkeypatch.setattr(reference, "_ROW_BLOCK", 4)
    for window, chunked in ((0, False), (7, False), (7, True)):
        _check_against_definition(build(Shape(window=window, chunked=chunked), requests))


def test_float32_stays_float32_and_half_is_computed_in_float32() -> None:
    """Half inputs are rounded at the end only: the result is the float32 one, rounded."""
    case = build(Shape(), MIXED, torch.bfloat16)
    half, single = case.to(torch.bfloat16), case.to(torch.float32)
    from_half, from_single = (
        reference.dual_mode_attention(*half.arguments()),
        reference.dual_mode_attention(*single.arguments()),
    )
    assert from_half.dtype == torch.bfloat16
    torch.testing.assert_close(from_half, from_single.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(half.tensors["scores"], single.tensors["scores"], rtol=0, atol=0)


def test_draft_without_pillars_is_full_attention() -> None:
    verify = build(Shape(), [Request(Mode.VERIFY, cached=20, rows=2)])
    draft = build(Shape(), [Request(Mode.DRAFT, cached=20, rows=2)])
    expected = reference.dual_mode_attention(*verify.arguments())
    torch.testing.assert_close(reference.dual_mode_attention(*draft.arguments()), expected, **FLOAT64)


def test_a_call_without_rows() -> None:
    """Only idle slots, as in a padded step: zeros, and nothing written."""
    case = build(Shape(), [Request(Mode.IDLE, cached=3), Request(Mode.VERIFY, cached=3, rows=0, score_rows=0)])
    before = case.pool.clone()
    assert torch.count_nonzero(reference.dual_mode_attention(*case.arguments())) == 0
    torch.testing.assert_close(case.pool, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("window", "softcap", "chunked", "sinks"),
    [
        (0, 0.0, False, None),
        (5, 0.0, False, None),
        (0, 2.0, False, None),
        (3, 2.0, False, None),
        (5, 0.0, False, 1.0),
        (5, 0.0, True, None),
        (7, 2.0, True, 1.0),
    ],
)
def test_site_is_causal_attention(
    window: int, softcap: float, chunked: bool, sinks: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site over T rows equals prefilling them as one request."""
    monkeypatch.setattr(reference, "_ROW_BLOCK", 7)
    shape = Shape(q_heads=6, window=window, softcap=softcap, value_dim=8, sinks=sinks, chunked=chunked)
    case = build(shape, [Request(Mode.PREFILL, rows=19)])
    rows = slice(case.row_start[0], case.row_start[0] + 19)
    q, k, v = (case.tensors[name][rows].transpose(0, 1)[None] for name in ("q", "k", "v"))
    out = ops.attention_site(q, k, v, shape.scale, window, softcap, chunked, 0, case.tensors.get("sinks"))
    assert out.shape == (1, 19, 6, 8)
    torch.testing.assert_close(out[0], expected_output(case)[rows], **FLOAT64)


def test_verify_without_pillars_gives_probabilities() -> None:
    """Drafts that saw everything measure by the full sum, as a prefill does."""
    scores = []
    for mode in (Mode.VERIFY, Mode.PREFILL):
        case = build(Shape(window=9), [Request(mode, cached=20, rows=3, score_rows=2)])
        case = case.to(torch.float64, score_dtype=torch.float64)
        reference.dual_mode_attention(*case.arguments())
        scores.append(case.tensors["scores"])
    torch.testing.assert_close(*scores, **FLOAT64)
