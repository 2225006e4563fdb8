"""Units of work split over programs: right at any split, the same bits in any order, counters left at 0."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode

from .cases import Case, Request, Shape, build
from .error_budget import expect
from .test_triton_attention import check_result

pytest.importorskip("triton", reason="Triton is published for Linux only")

import triton
import triton.language as tl

from sparsespec_compile.kernels.attention import launcher
from sparsespec_compile.kernels.attention.plan import cost_of_unit, share_of_line
from sparsespec_compile.kernels.launch import INTERPRETER, Promise, promised
from sparsespec_compile.kernels.tuning.tiling import Tiling

REQUESTS = [
    Request(Mode.DRAFT, cached=75, pillars=41, recent=70),
    Request(Mode.VERIFY, cached=150, rows=5, score_rows=5, pillars=20, recent=130),
    Request(Mode.IDLE, cached=30, rows=4),
    Request(Mode.VERIFY, cached=61, rows=1),
    Request(Mode.VERIFY, cached=40, rows=14, score_rows=14, pillars=9, recent=36),
    Request(Mode.PREFILL, cached=19, rows=41, score_rows=11),
    Request(Mode.DRAFT, cached=3, rows=37),
    Request(Mode.PREFILL, rows=7, score_rows=2),
    Request(Mode.VERIFY, cached=36, rows=33, score_rows=8, pillars=9, recent=30),
]
"""In tiles of 8 rows, drafts of 16: one tile, two with scores in a pass of their own, five with the last one giving
them out, and more than stand in the line."""

Sharing = tuple[int, Tiling]

TILING = Tiling(16, 16, 16, 4, 2, 2, 2, 1, unit_overhead=0, scored_overhead=0, part_cost=0)

SHARINGS: dict[str, Sharing] = {
    "one program": (1, TILING),
    "blocks dealt out one by one": (90, TILING),
    "uneven": (7, dataclasses.replace(TILING, unit_overhead=3, scored_overhead=2, part_cost=4)),
    "more programs than blocks": (400, TILING),
}

FAST = (("uneven", 37, False),)


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sharing], list[Tensor]]:
    """Sets programs and tiles. What is returned receives the counters of each launch; parts start as NaN."""

    def apply(sharing: Sharing) -> list[Tensor]:
        programs, tiling = sharing
        seen: list[Tensor] = []
        limits = dataclasses.replace(INTERPRETER, multiprocessors=programs)

        def counters(device: torch.device, count: int) -> Tensor:
            seen.append(torch.zeros(count, dtype=torch.int32, device=device))
            return seen[-1]

        def parts(device: torch.device, count: int, elements: int) -> Tensor:
            return torch.full((count, 2, elements), torch.nan, device=device)

        monkeypatch.setattr(launcher, "device_limits", lambda _: limits)
        monkeypatch.setattr(launcher, "tiling_for", lambda *_: tiling)
        monkeypatch.setattr(launcher, "counters", counters)
        monkeypatch.setattr(launcher, "parts", parts)
        return seen

    return apply


def _launch(case: Case, device: str) -> tuple[Tensor, Case]:
    actual = case.to(torch.float32, device)
    return launcher.dual_mode_attention(*actual.arguments()), actual


@pytest.mark.parametrize(
    ("sharing", "window", "chunked"),
    [
        pytest.param(*given, marks=() if given in FAST else pytest.mark.slow)
        for sharing in SHARINGS
        for given in ((sharing, 0, False), (sharing, 37, False), (sharing, 32, True))
        if given[1] == 0 or sharing != "more programs than blocks"
    ],
)
def test_any_split_is_right(
    sharing: str, window: int, chunked: bool, device: str, share: Callable[[Sharing], list[Tensor]]
) -> None:
    shape = Shape(window=window, kv_heads=1, q_heads=2, scale=1.5, chunked=chunked)
    case = build(shape, REQUESTS, torch.float32)
    seen = share(SHARINGS[sharing])
    output, actual = _launch(case, device)
    check_result(output, actual, expect(case, torch.float32, device))
    assert seen[0].numel() == SHARINGS[sharing][0]
    assert not seen[0].any()


@triton.jit
def _stretches(ends, total, longest, PART_COST: tl.constexpr, UNIT_OVERHEAD: tl.constexpr):
    _, begin, end = share_of_line(total, longest, PART_COST, UNIT_OVERHEAD)
    tl.store(ends + 2 * tl.program_id(0), begin)
    tl.store(ends + 2 * tl.program_id(0) + 1, end)


@pytest.mark.parametrize(
    ("total", "longest", "stretch"),
    [
        pytest.param(80, 40, 16, id="even"),
        pytest.param(20, 20, 9, id="not cut too small"),
        pytest.param(20, 5, 5, id="short units apart"),
        pytest.param(10, 2, 2, id="very short units apart"),
        pytest.param(60, 15, 15, id="not cut for little"),
        pytest.param(60, 16, 16, id="nor for half as much again"),
        pytest.param(60, 17, 12, id="cut for more"),
        pytest.param(70, 8, 16, id="two whole"),
        pytest.param(0, 0, 0, id="none"),
    ],
)
def test_stretches_of_the_line(total: int, longest: int, stretch: int, device: str) -> None:
    ends = torch.full((5, 2), -1, dtype=torch.int32, device=device)
    _stretches[(5,)](ends, total, longest, 64, 3)
    assert ends.tolist() == [[min(total, place * stretch), min(total, (place + 1) * stretch)] for place in range(5)]


@triton.jit
def _costs(target, emits, pillars, recent, end, BLOCK_N: tl.constexpr, OVERHEADS: tl.constexpr):
    tl.store(target, cost_of_unit(emits, pillars, recent, end, BLOCK_N, OVERHEADS))


@pytest.mark.parametrize(("emits", "cost"), [(0, 4), (1, 4 + 7 + 1)])
def test_giving_out_scores_costs_a_start_of_its_own_and_the_keys_that_measure_them(
    emits: int, cost: int, device: str
) -> None:
    """128 positions measure, two blocks of keys without values."""
    target = torch.zeros(1, dtype=torch.int32, device=device)
    _costs[(1,)](target, emits, 410, 8100, 8140, 64, (4, 7))
    assert target.item() == cost


def test_the_kernel_is_given_what_the_tiles_say(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    class Kernel:
        arg_names = launcher.attention_kernel.arg_names

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda **arguments: given.update(arguments)

    tiling = dataclasses.replace(TILING, unit_overhead=5, scored_overhead=9, part_cost=3)
    monkeypatch.setattr(launcher, "attention_kernel", Kernel())
    case = build(Shape(), REQUESTS, torch.float32).to(torch.float32, "cpu")
    with promised(Promise.NO_SCORES):  # one kernel
        launcher.dual_mode_attention(*case.arguments(), tiling=tiling)
    assert [given[name] for name in ("UNIT_OVERHEAD", "SCORED_OVERHEAD", "PART_COST")] == [5, 9, 3]
    assert (tiling.scored_ahead, given["SCORED_AHEAD"]) == (2, 0), "whatever tiles say, it holds no code for scores"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_equal_calls_give_equal_bits(device: str, share: Callable[[Sharing], list[Tensor]]) -> None:
    share(SHARINGS["uneven"])
    case = build(Shape(), REQUESTS, torch.float32)
    first, second = _launch(case, device), _launch(case, device)
    _assert_same_bits(first, second)


@pytest.mark.slow
def test_bits_do_not_depend_on_the_order_of_programs(
    device: str, share: Callable[[Sharing], list[Tensor]], request: pytest.FixtureRequest
) -> None:
    """Whichever part of a unit comes last, parts are joined in one order; and no program waits for another."""
    share(SHARINGS["uneven"])
    case = build(Shape(), REQUESTS, torch.float32)
    first = _launch(case, device)
    request.getfixturevalue("last_program_first")
    _assert_same_bits(first, _launch(case, device))


@pytest.mark.slow
def test_pages_and_rows_do_not_matter(device: str, share: Callable[[Sharing], list[Tensor]]) -> None:
    """The same step on other pages, with other packed rows and score slots: the same bits."""
    share(SHARINGS["uneven"])
    case = build(Shape(), REQUESTS, torch.float32)
    moved = build(Shape(), REQUESTS, torch.float32, seed=1)
    for b, request in enumerate(REQUESTS):
        _transplant(case, moved, b, request)
    (first, before), (second, after) = _launch(case, device), _launch(moved, device)
    for b, request in enumerate(REQUESTS):
        if request.length:
            rows = [output[made.row_start[b] :][: request.rows] for output, made in ((first, case), (second, moved))]
            assert torch.equal(*rows)
        if request.score_rows:
            slots = before.tensors["score_slot"][b], after.tensors["score_slot"][b]
            assert torch.equal(before.tensors["scores"][slots[0]], after.tensors["scores"][slots[1]])


def _assert_same_bits(first: tuple[Tensor, Case], second: tuple[Tensor, Case]) -> None:
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].tensors["scores"], second[1].tensors["scores"])


def _transplant(source: Case, target: Case, b: int, request: Request) -> None:
    """Give a request of the target the tokens, pillars and rows that it has in the source."""
    size = source.shape.page_size
    target.history[b] = source.history[b]
    for position in range(request.cached if request.length else 0):
        pages = [case.tensors["page_table"][b, position // size] for case in (source, target)]
        target.tensors["kv"][pages[1], :, position % size] = source.tensors["kv"][pages[0], :, position % size]
    pillars = source.tensors["pillar_index"][b, :, : request.pillars]
    target.tensors["pillar_index"][b, :, : request.pillars] = pillars
    for name in ("q", "k", "v"):
        rows = source.tensors[name][source.row_start[b] :][: request.rows]
        if request.length:
            target.tensors[name][target.row_start[b] :][: request.rows] = rows
