"""Pillar selection: the reference against sorting in Python, and the Triton kernel against the reference, exactly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.reference import drafting as reference

from .cases import SENTINEL

Select = Callable[..., None]
HEADS, POSITIONS, CAPACITY = 2, 2100, 40


def _scores() -> dict[str, tuple[Tensor, int, int]]:
    """Name: scores [H, S], scored_length, budget. What lies past scored_length is larger than all before it."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(HEADS, POSITIONS, generator=generator)
    signed = torch.randn(HEADS, POSITIONS, generator=generator)
    signed[:, ::7] = 0.0
    signed[:, 3::7] = -0.0
    signed[:, 40:50], signed[:, 60:70] = torch.inf, -torch.inf
    below = -random
    below[:, 5::31] = 0.0
    below[:, 9::31] = -0.0
    uneven = random * 0.5
    uneven[:, 10:40], uneven[:, 1030:1032], uneven[:, 2050:2070], uneven[:, 2080:2085] = 1.0, 1.0, 1.0, 2.0
    few_values = (random * 4).floor()
    near = 1.0 + (random * 8).floor() * 2.0**-23
    tiny = random * 2.0**-140
    cases = {
        "random": (random, 2050, 40),
        "one block": (random, 777, 33),
        "signs, zeros and infinities": (signed, 2099, 39),
        "zeros of both signs": (below, 1600, 39),
        "negative": (-random, 1030, 20),
        "many ties": (few_values, 2077, 35),
        "ties in three blocks": (uneven, 2090, 39),
        "neighbouring floats": (near, 1500, 40),
        "subnormal": (tiny, 1300, 21),
        "all equal": (torch.full_like(random, 0.25), 1100, 37),
        "all zero": (torch.zeros_like(random), 50, 7),
        "only low ranks differ": (few_values.clamp(max=1) + random * 1e-3, 600, 40),
        "budget above length": (random, 13, 30),
        "budget equal to length": (random, 30, 30),
        "budget above capacity": (random, 1200, 1000),
        "budget 0": (random, 100, 0),
        "budget 1": (random, 1025, 1),
        "nothing scored": (random, 0, 12),
        "left alone": (random, -1, 12),
    }
    beyond = torch.arange(POSITIONS)
    return {
        name: (scores.masked_fill(beyond >= length, torch.inf), length, budget)
        for name, (scores, length, budget) in cases.items()
    }


CASES = _scores()


def _run(select: Select, device: str = "cpu", capacity: int = CAPACITY) -> tuple[Tensor, Tensor]:
    """All cases as the requests of one call, on strided views, outputs holding a sentinel."""
    slots = torch.randperm(len(CASES) + 2, generator=torch.Generator().manual_seed(1))[: len(CASES)]
    buffer = torch.full((len(CASES) + 2, HEADS + 2, POSITIONS), torch.inf, device=device)
    buffer[slots, 1:-1] = torch.stack([scores for scores, _, _ in CASES.values()]).to(device)
    lengths, budgets = (torch.tensor([case[i] for case in CASES.values()], dtype=torch.int32) for i in (1, 2))
    index = torch.full((len(CASES), HEADS + 2, capacity + 3), int(SENTINEL), dtype=torch.int32, device=device)
    count = torch.full((len(CASES),), int(SENTINEL), dtype=torch.int32, device=device)
    slots[list(CASES).index("left alone")] = 2**30
    score_slot = slots.int().to(device)
    select(buffer[:, 1:-1], score_slot, lengths.to(device), budgets.to(device), index[:, 1:-1, :capacity], count)
    return index.cpu(), count.cpu()


def test_reference_sorts() -> None:
    index, count = _run(ops.select_pillars)
    for b, (name, (scores, length, budget)) in enumerate(CASES.items()):
        if length < 0:
            assert (index[b] == SENTINEL).all()
            assert count[b] == SENTINEL
            continue
        kept = min(length, budget, CAPACITY)
        assert count[b] == kept, name
        for head in range(HEADS):
            values = scores[head, :length].tolist()
            best = sorted(range(length), key=lambda position: (-values[position], position))[:kept]
            assert index[b, 1 + head, :kept].tolist() == sorted(best), name
        assert (index[b, :, kept:] == SENTINEL).all(), name


def test_other_heads_are_not_written() -> None:
    index, _ = _run(ops.select_pillars)
    assert (index[:, [0, -1]] == SENTINEL).all()


@pytest.mark.parametrize(
    ("capacity", "chunk"),
    [
        pytest.param(CAPACITY, 1024, marks=pytest.mark.slow),
        pytest.param(0, 1024, marks=pytest.mark.slow),
        (CAPACITY, 512),
    ],
)
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_triton_equals_reference(
    capacity: int, chunk: int, packed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one chunk and of several, the last one full or not; counts that share a number, and that do not."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from sparsespec_compile.kernels.drafting import pillars

    monkeypatch.setattr(pillars, "CHUNK", chunk)
    if not packed:
        monkeypatch.setattr(pillars, "MOST_PACKED", 0)
    expected = _run(reference.select_pillars, capacity=capacity)
    actual = _run(pillars.select_pillars, device, capacity)
    for name, *tensors in zip(CASES, *expected, *actual, strict=True):
        index, count, actual_index, actual_count = tensors
        assert torch.equal(actual_index, index), name
        assert actual_count == count, name


@pytest.mark.parametrize("positions", [1, 8192, 1023 * 1024, 1023 * 1024 + 1, 3_000_000])
def test_no_lane_counts_further_than_its_bits(positions: int) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from sparsespec_compile.kernels.drafting import pillars

    chunk = pillars.chunk_of(positions)
    assert -(-positions // chunk) < 2**10
    assert chunk & (chunk - 1) == 0


def test_triton_counts_more_scores_than_share_a_number(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from sparsespec_compile.kernels.drafting import pillars

    if device == "cpu":
        monkeypatch.setattr(pillars, "CHUNK", 2**17)  # the interpreter takes as long for any
    scores = torch.arange(2**21 + 5, dtype=torch.float32)[None, None]
    index = torch.zeros(1, 1, 3, dtype=torch.int32, device=device)
    arguments = [torch.full((1,), value, dtype=torch.int32, device=device) for value in (0, scores.shape[2], 3, 0)]
    pillars.select_pillars(scores.to(device), *arguments[:3], index, arguments[3])
    assert index.flatten().tolist() == [2**21 + 2, 2**21 + 3, 2**21 + 4]


def test_triton_with_nan_keeps_to_its_bounds(device: str) -> None:
    """A model that gives NaN gets some selection, the same from both, and no stray write."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    from sparsespec_compile.kernels.drafting import pillars

    scores = torch.full((1, 2, 70), torch.nan)
    scores[0, 1, ::3] = 0.5
    results = []
    for select, place in ((reference.select_pillars, "cpu"), (pillars.select_pillars, device)):
        index = torch.zeros(1, 2, 16, dtype=torch.int32, device=place)
        arguments = [torch.full((1,), value, dtype=torch.int32, device=place) for value in (0, 70, 12, 0)]
        select(scores.to(place), *arguments[:3], index, arguments[3])
        results.append(index.cpu())
    assert torch.equal(*results)
