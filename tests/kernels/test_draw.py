"""Drawing tokens: the Triton kernels against the reference, token for token, and what a row may depend on."""

import math

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels.reference import sampling as reference

pytest.importorskip("triton", reason="Triton is published for Linux only")

from sparsespec_compile.kernels.sampling import draw
from sparsespec_compile.kernels.sampling import filter as filters

from .test_noise import exact_noise, philox_words

Settings = tuple[Tensor, ...]
"""temperature, top_k, top_p, min_p, seed, position."""

TEMPERATURES = (0.0, 1e-5, 0.3, 1.0, 1.0, 2.5, 1e5)
TOP_K = (0, 0, 1, 5, 20, 90, 2**31 - 1)
TOP_P = (1.0, 1.0, 0.05, 0.5, 0.95, 1 - 2**-24)
MIN_P = (0.0, 0.0, 0.02, 1.0)


@pytest.fixture(params=[pytest.param("blocks of their own size", marks=pytest.mark.slow), "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Small blocks: rows of several programs and blocks, candidates that do not suffice."""
    if request.param == "small blocks":
        monkeypatch.setattr(draw, "SPLIT", 128)
        monkeypatch.setattr(draw, "BLOCK", 32)
        monkeypatch.setattr(filters, "BLOCK", 128)
        monkeypatch.setattr(filters, "MOST", 16)
        monkeypatch.setattr(filters, "ROOM", 32)
    return request.param == "small blocks"


def settings_of(rows: int, generator: torch.Generator, **fixed: float) -> Settings:
    """Random settings; every filter alone and together, greedy rows among them."""

    def pick(name: str, values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
        chosen = torch.randint(len(values), (rows,), generator=generator)
        return torch.tensor((fixed[name],) if name in fixed else values, dtype=dtype)[0 if name in fixed else chosen]

    named = (("temperature", TEMPERATURES), ("top_k", TOP_K), ("top_p", TOP_P), ("min_p", MIN_P))
    chosen = [pick(name, values, torch.int64 if name == "top_k" else torch.float32) for name, values in named]
    seed = torch.randint(2**62, (rows,), generator=generator) * 2 + 1
    position = torch.randint(2**34, (rows,), generator=generator)
    return (*(setting.expand(rows).clone() for setting in chosen), seed, position)


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random, peaked and flat rows, with ties, zeros of both signs and -inf; rows may lie apart in memory."""
    spread = torch.tensor([0.1, 1.0, 4.0, 12.0])[torch.randint(4, (rows, 1), generator=generator)]
    logits = torch.randn(rows, vocabulary + 3, generator=generator) * spread
    logits[::3] = (logits[::3] * 2).round() / 2
    logits[1::4, ::5] = -math.inf
    logits[2::5, ::3] = -0.0
    return logits.to(dtype)[:, :vocabulary]


def compare(logits: Tensor, settings: Settings, device: str) -> None:
    expected = reference.draw_tokens(logits, *settings)
    actual = draw.draw_tokens(logits.to(device), *(setting.to(device) for setting in settings))
    assert actual.dtype == torch.int64
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1, torch.float32), (37, torch.float16), (397, torch.bfloat16)])
def test_triton_equals_reference(device: str, blocks: bool, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    compare(logits_of(24, vocabulary, dtype, generator), settings_of(24, generator), device)


@pytest.mark.parametrize(
    "fixed",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 7, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 70, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
    ],
    ids=str,
)
def test_one_row_and_each_filter_alone(device: str, blocks: bool, fixed: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    compare(logits_of(4, 301, torch.float32, generator), settings_of(4, generator, **fixed), device)
    compare(logits_of(1, 301, torch.bfloat16, generator), settings_of(1, generator, **fixed), device)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16))],
)
def test_thresholds_are_the_reference_s(device: str, blocks: bool, dtype: torch.dtype) -> None:
    """Not only do they give the same tokens: they are the same number, where rounding decides nothing."""
    generator = torch.Generator().manual_seed(1)
    logits = logits_of(24, 300, dtype, generator)
    settings = settings_of(24, generator, min_p=0.0)
    sampled = settings[0] > 0
    found = [lowest.cpu()[sampled] for lowest in _thresholds(logits.to(device), [s.to(device) for s in settings])]
    wanted = reference.lowest_kept(logits[sampled].float() / settings[0][sampled, None], *_filters(settings, sampled))
    filtered = (settings[1][sampled] > 0) & (settings[1][sampled] < 300) | (settings[2][sampled] < 1.0)
    assert torch.equal(found[0][filtered], wanted[filtered])
    assert (found[0][~filtered] == -math.inf).all()


def _filters(settings: Settings, rows: Tensor) -> list[Tensor]:
    return [settings[i][rows] for i in (1, 2, 3)]


def _thresholds(logits: Tensor, settings: list[Tensor]) -> list[Tensor]:
    rows = logits.shape[0]
    lowest = torch.full((rows,), torch.nan, device=logits.device)
    candidates = torch.zeros(rows, filters.ROOM, dtype=torch.int32, device=logits.device)
    filters.filter_kernel[(rows,)](
        logits,
        *settings[:4],
        candidates,
        lowest,
        logits.shape[1],
        logits.stride(0),
        DROPPED=draw.DROPPED[logits.dtype],
        BLOCK=filters.BLOCK,
        MOST=filters.MOST,
        ROOM=filters.ROOM,
        num_warps=filters.NUM_WARPS,
    )
    return [lowest, candidates]


def test_candidates_beyond_their_room(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """33 tokens reach the bound of the five highest slots, the highest token last: room for 32 does not do."""
    for name, value in (("BLOCK", 128), ("MOST", 16), ("ROOM", 32)):
        monkeypatch.setattr(filters, name, value)
    tokens = torch.arange(8 * 128)
    logits = torch.where(tokens % 128 < 4, 5.0 + tokens / 1000, -3.0)
    logits[4] = 4.0
    settings = settings_of(1, torch.Generator().manual_seed(0), temperature=1.0, top_k=5, top_p=1.0, min_p=0.0)
    lowest, _ = _thresholds(logits[None].to(device), [setting.to(device) for setting in settings])
    assert lowest.cpu() == logits.topk(5).values[-1]


def _bound_of(words: Tensor) -> Tensor:
    """What the kernel takes for an upper bound of the noise, in float64."""
    return math.log(2) * (32 + 127 - words.float().view(torch.int32).double() * 2.0**-23) + 1e-3


def _pair(generator: torch.Generator, equal: bool, start: int) -> tuple[Settings, Tensor, int]:
    """Settings of a row, the logits of two tokens of one lane, and the first, from ``start`` on; a block parts them.

    The bounds rank them in the wrong order: exactly, the second is higher by 0.01, or both are equal and the second
    has the higher bound. Equality comes from logits so large that they round the noise to halves.
    """
    block = draw.BLOCK
    while True:
        settings = settings_of(1, generator, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        seed, position = (int(setting) for setting in settings[4:])
        words = philox_words(seed, position, start + 2 * block)[start:].view(2, block)
        noise, bound = exact_noise(words), _bound_of(words)
        if equal:
            halves, bounds = (noise * 2).round(), (bound * 2).round()
            inside = ((noise * 2 - halves).abs() < 0.49).all(0)
            found = (halves[0] == halves[1]) & (bounds[1] > bounds[0]) & inside
            logits = torch.full((2, block), 1.5 * 2.0**22)
        else:
            found = bound[0] - noise[0] > bound[1] - noise[1] + 0.03
            logits = (torch.tensor([[0.0], [0.01]]) - noise).float()
        if found.any():
            lane = int(found.nonzero()[0, 0])
            return settings, logits[:, lane], start + lane


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("program", [0, 1])
def test_tokens_that_their_bounds_rank_wrongly(device: str, blocks: bool, equal: bool, program: int) -> None:
    start = program * draw.SPLIT
    settings, pair, first = _pair(torch.Generator().manual_seed(0), equal, start)
    second = first + draw.BLOCK
    logits = torch.full((1, start + 2 * draw.BLOCK), -1e9)
    logits[0, first], logits[0, second] = pair
    token = draw.draw_tokens(logits.to(device), *(setting.to(device) for setting in settings))
    assert int(token) == (first if equal else second)


def test_a_row_does_not_depend_on_the_others(device: str, blocks: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = logits_of(6, 333, torch.bfloat16, generator).to(device)
    settings = [setting.to(device) for setting in settings_of(6, generator)]
    together = draw.draw_tokens(logits, *settings)
    order = torch.randperm(6, generator=generator).to(device)
    assert torch.equal(draw.draw_tokens(logits[order], *(s[order] for s in settings)), together[order])
    for row in range(6):
        alone = draw.draw_tokens(logits[row : row + 1], *(s[row : row + 1] for s in settings))
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize(
    ("ends", "dtype"),
    [
        ((4, 8, 397), torch.bfloat16),
        pytest.param((200, 397), torch.float32, marks=pytest.mark.slow),
        pytest.param((128, 256, 384, 397), torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parts_of_the_vocabulary_draw_its_token(
    device: str, blocks: bool, ends: tuple[int, ...], dtype: torch.dtype
) -> None:
    """With ties between the parts among the rows, which the lowest token wins."""
    generator = torch.Generator().manual_seed(ends[0])
    logits = logits_of(24, 397, dtype, generator)
    settings = settings_of(24, generator, top_k=0, top_p=1.0, min_p=0.0)
    logits[:2], settings[0][:2] = 1.5, 0.0
    drawn = [settings[i] for i in (0, 4, 5)]
    for module, where in ((reference, "cpu"), (draw, device)):
        parts = [
            module.draw_part(logits[:, first:end].to(where), *(setting.to(where) for setting in drawn), first)
            for first, end in zip((0, *ends), ends, strict=False)
        ]
        values, tokens = (torch.stack(parts) for parts in zip(*parts, strict=True))
        best = values.amax(0)
        winner = torch.where(values == best, tokens, 397).amin(0)
        assert ((values == best).sum(0) > 1).any(), "no tie between the parts"
        whole = module.draw_tokens(logits.to(where), *(setting.to(where) for setting in settings))
        assert torch.equal(winner, whole)


def test_nothing_uninitialised_is_read(device: str, blocks: bool) -> None:
    """Workspaces and output hold NaN and the largest integers when the kernels get them."""
    generator = torch.Generator().manual_seed(4)
    logits, settings = logits_of(8, 300, torch.bfloat16, generator), settings_of(8, generator)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()
        compare(logits, settings, device)
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_rows_and_expanded_settings(device: str) -> None:
    settings = [setting.to(device) for setting in settings_of(1, torch.Generator().manual_seed(0), temperature=1.0)]
    logits = torch.randn(1, 50, device=device).expand(4, -1)
    assert draw.draw_tokens(logits[:0], *(s[:0] for s in settings)).shape == (0,)
    parts = draw.draw_part(logits[:0], *(settings[i][:0] for i in (0, 4, 5)), 8)
    assert [part.shape for part in parts] == [(0,), (0,)]
    tokens = draw.draw_tokens(logits, *(s.expand(4) for s in settings))
    assert (tokens == tokens[0]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_that_no_model_gives_keep_to_the_vocabulary(
    device: str, blocks: bool, value: float, temperature: float
) -> None:
    fixed = {"temperature": temperature, "top_k": 40, "top_p": 0.9, "min_p": 0.1}
    settings = [s.to(device) for s in settings_of(2, torch.Generator().manual_seed(0), **fixed)]
    logits = torch.full((2, 200), value, device=device)
    logits[1, ::2] = 1.0
    tokens = draw.draw_tokens(logits, *settings)
    assert ((tokens >= 0) & (tokens < 200)).all()
