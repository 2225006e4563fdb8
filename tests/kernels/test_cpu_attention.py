"""What runs on a CPU against attention written from its definition, and against the reference where that is long."""

import pytest
import torch

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.cpu import attention
from sparsespec_compile.kernels.cpu.plan import plan_of
from sparsespec_compile.kernels.launch import Promise, promised
from sparsespec_compile.kernels.ops import STEP_TENSORS, Mode
from sparsespec_compile.kernels.reference import attention as reference

from .cases import Case, Request, Shape, build
from .error_budget import assert_within, expect
from .naive import expected_output, expected_pool, expected_scores
from .not_finite import HIDDEN, SHAPES, check_hidden, with_not_finite
from .steps import LAYERS, MIXED

FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}
LONG = [
    Request(Mode.PREFILL, cached=0, rows=41),
    Request(Mode.PREFILL, cached=29, rows=37, score_rows=5),
    Request(Mode.VERIFY, cached=50, rows=23, score_rows=9, pillars=20, recent=44),
    Request(Mode.DRAFT, cached=60, pillars=57, recent=57),
    Request(Mode.DRAFT, cached=45, pillars=9, recent=38),
    Request(Mode.DRAFT, cached=31, pillars=3, recent=31),
]
"""Prompts and a verification of more rows than take explicit logits, and drafts of unlike lengths, of which one's
pillars are all there is."""


def _check_against_definition(case: Case) -> None:
    pool = expected_pool(case)
    case = case.to(torch.float64, score_dtype=torch.float64)
    out = attention.dual_mode_attention(*case.arguments())
    torch.testing.assert_close(out, expected_output(case), **FLOAT64)
    torch.testing.assert_close(case.tensors["scores"], expected_scores(case), **FLOAT64)
    torch.testing.assert_close(case.pool, pool, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("requests", [MIXED, LONG], ids=["mixed", "long"])
@pytest.mark.parametrize("layer", LAYERS)
def test_steps_follow_the_definition(layer: str, requests: list[Request]) -> None:
    _check_against_definition(build(LAYERS[layer], requests))


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(("window", "chunked"), [(0, False), (5, False), (5, True)])
def test_page_sizes_and_windows(page_size: int, window: int, chunked: bool) -> None:
    _check_against_definition(build(Shape(page_size=page_size, window=window, chunked=chunked), MIXED, seed=page_size))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_rows_are_computed_in_blocks(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ROW_BLOCK", 4)
    for window, chunked in ((0, False), (7, False), (7, True), (32, True)):
        _check_against_definition(build(Shape(window=window, softcap=softcap, chunked=chunked), LONG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["gqa", "window", "chunks", "softcap"])
def test_errors_stay_within_the_budget(layer: str, dtype: torch.dtype) -> None:
    """Half inputs are computed in float32 and rounded once."""
    case = build(LAYERS[layer], LONG, dtype)
    expected, actual = expect(case, dtype), case.to(dtype)
    out = attention.dual_mode_attention(*actual.arguments())
    assert out.dtype == dtype
    assert_within(out, expected.output, expected.output_error)
    assert_within(actual.tensors["scores"], expected.scores, expected.score_error)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_take_nothing_from_tokens_that_they_do_not_see(shape: str, bad: float) -> None:
    case = with_not_finite(build(SHAPES[shape], HIDDEN), bad)
    actual = case.to(torch.float64, score_dtype=torch.float64)
    check_hidden(case, attention.dual_mode_attention(*actual.arguments()), actual, error=1e-11)


def test_the_op_on_a_cpu_is_this_one() -> None:
    """Bit for bit: the reference sums in another order."""
    outputs = []
    for run in (ops.dual_mode_attention, attention.dual_mode_attention, reference.dual_mode_attention):
        case = build(Shape(), LONG).to(torch.float32)
        outputs.append(run(*case.arguments()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


class TestPlan:
    """The plan of a step is made once, and never one too few."""

    @staticmethod
    def step() -> tuple[torch.Tensor, ...]:
        case = build(Shape(), MIXED)
        return tuple(case.tensors[name] for name in STEP_TENSORS)

    def test_layers_of_a_step_share_it(self) -> None:
        step = self.step()
        with promised(Promise.NOTHING):
            assert plan_of(step) is plan_of(step)

    def test_layers_with_page_tables_of_their_own_take_turns(self) -> None:
        step, place = self.step(), STEP_TENSORS.index("page_table")
        other = (*step[:place], step[place].clone(), *step[place + 1 :])
        with promised(Promise.NOTHING):
            first, second = plan_of(step), plan_of(other)
            assert first is not second
            assert (plan_of(step), plan_of(other)) == (first, second)

    def test_another_step_has_its_own(self) -> None:
        step = self.step()
        with promised(Promise.NOTHING):
            first = plan_of(step)
        with promised(Promise.NOTHING):
            assert plan_of(step) is not first

    def test_nothing_is_kept_outside_of_a_step(self) -> None:
        step = self.step()
        assert plan_of(step) is not plan_of(step)

    def test_other_tensors_have_their_own(self) -> None:
        first, second = self.step(), self.step()
        with promised(Promise.NOTHING):
            assert plan_of(first) is not plan_of((*first[:-1], second[-1]))

    def test_page_tables_that_take_turns_have_one_each(self) -> None:
        step, table = self.step(), STEP_TENSORS.index("page_table")
        other = (*step[:table], step[table].clone(), *step[table + 1 :])
        with promised(Promise.NOTHING):
            first, second = plan_of(step), plan_of(other)
            assert first is not second
            assert (plan_of(step), plan_of(other)) == (first, second)

    def test_a_change_in_place_is_noticed(self) -> None:
        step = self.step()
        with promised(Promise.NOTHING):
            before = plan_of(step)
            step[STEP_TENSORS.index("cached_length")][0] = 3
            assert plan_of(step) is not before
            assert plan_of(step).requests[0].cached == 3

    def test_inference_mode(self) -> None:
        """Its tensors have no versions."""
        with torch.inference_mode(), promised(Promise.NOTHING):
            step = self.step()
            assert plan_of(step) is plan_of(step)


def test_a_call_unlike_others_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(Shape(), MIXED).to(torch.float32)
    arguments = list(case.arguments())
    attention.dual_mode_attention(*arguments)
    monkeypatch.setattr(attention, "check_attention", None)
    attention.dual_mode_attention(*arguments)
    monkeypatch.undo()
    arguments[1] = arguments[1][:, :, :-1]
    with pytest.raises(ops.KernelInputError, match="k has shape"):
        attention.dual_mode_attention(*arguments)
