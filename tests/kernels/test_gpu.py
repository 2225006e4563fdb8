"""What only a GPU shows: models' own shapes at length, CUDA graphs, pools beyond 2**31 elements."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.kernels.reference import drafting, sampling
from sparsespec_compile.kernels.reference.sampling import gumbel_noise

from .cases import Case, Request, Shape, build
from .error_budget import expect
from .test_triton_attention import check_result

pytestmark = pytest.mark.gpu

STEP = [
    Request(Mode.DRAFT, cached=8200, pillars=410, recent=8192, score_rows=1),
    Request(Mode.VERIFY, cached=8192, rows=9, score_rows=9, pillars=410, recent=8192),
    Request(Mode.PREFILL, cached=2048, rows=600, score_rows=9),
    Request(Mode.IDLE, cached=100),
    Request(Mode.VERIFY, cached=1023, rows=9, score_rows=9),
    Request(Mode.DRAFT, cached=128),
    Request(Mode.PREFILL, rows=1, score_rows=0),
    Request(Mode.DRAFT, cached=5003, rows=1, pillars=251, recent=5000),
    Request(Mode.PREFILL, rows=97, score_rows=9),
    Request(Mode.VERIFY, cached=1, rows=1, score_rows=1, pillars=1, recent=1),
    Request(Mode.VERIFY, cached=300, rows=40, score_rows=40, pillars=20, recent=290),
    Request(Mode.VERIFY, cached=8192, rows=17, score_rows=16, pillars=410, recent=8192),
    Request(Mode.VERIFY, cached=3000, rows=65, score_rows=4, pillars=150, recent=2990),
    Request(Mode.DRAFT, cached=64, pillars=64, recent=64),
    Request(Mode.VERIFY, cached=63, rows=9, score_rows=9, pillars=63, recent=63),
    Request(Mode.VERIFY, cached=4096),
]
"""Lengths 1, at page and block boundaries and long, budgets of everything there is, scores on and off, tiles of every
kind and more rows than a tile has."""

MODELS = {
    "Qwen3-8B": (Shape(32, 8, 128, 128, page_size=16, scale=128**-0.5), torch.bfloat16),
    "Qwen3-8B, page 1": (Shape(32, 8, 128, 128, page_size=1, scale=128**-0.5), torch.bfloat16),
    "Qwen3-8B, page 128": (Shape(32, 8, 128, 128, page_size=128, scale=128**-0.5), torch.bfloat16),
    "Qwen3-1.7B": (Shape(16, 8, 128, 128, page_size=16, scale=128**-0.5), torch.bfloat16),
    "64-wide heads": (Shape(32, 8, 64, 64, page_size=16, scale=0.125), torch.float16),
    "Qwen2.5-7B": (Shape(28, 4, 128, 128, page_size=16, scale=128**-0.5), torch.float16),
    "Gemma-2": (Shape(8, 4, 256, 256, page_size=16, window=1000, softcap=50.0, scale=0.0625), torch.bfloat16),
    "Phi-3": (Shape(32, 32, 96, 96, page_size=16, window=2047, scale=96**-0.5), torch.bfloat16),
    "float32": (Shape(16, 8, 64, 64, page_size=16, scale=0.125), torch.float32),
}


@pytest.mark.parametrize("model", MODELS)
def test_step_at_length(model: str) -> None:
    shape, dtype = MODELS[model]
    case = build(shape, STEP, dtype)
    expected = expect(case, dtype, "cuda")
    actual = case.to(dtype, "cuda")
    check_result(ops.dual_mode_attention(*actual.arguments()), actual, expected)


def test_one_long_request_beside_many_short_ones() -> None:
    """The long one is split over most programs."""
    requests = [
        *(Request(Mode.DRAFT, cached=90 + b, pillars=40, recent=80) for b in range(60)),
        Request(Mode.VERIFY, cached=131072, rows=9, score_rows=9, pillars=6554, recent=131072),
        *(Request(Mode.VERIFY, cached=b, rows=9, score_rows=9) for b in range(60)),
    ]
    case = build(Shape(8, 2, 64, 64, page_size=16, scale=0.125), requests, torch.bfloat16)
    actual = case.to(torch.bfloat16, "cuda")
    expected = expect(case, torch.bfloat16, "cuda")
    check_result(ops.dual_mode_attention(*actual.arguments()), actual, expected)
    again = case.to(torch.bfloat16, "cuda")
    assert torch.equal(ops.dual_mode_attention(*again.arguments()), ops.dual_mode_attention(*actual.arguments()))
    assert torch.equal(again.tensors["scores"], actual.tensors["scores"])


def test_site_on_cuda_equals_cpu() -> None:
    q, k, v = torch.randn(1, 8, 700, 64), torch.randn(1, 2, 700, 64), torch.randn(1, 2, 700, 64)
    expected = ops.attention_site(q.double(), k.double(), v.double(), 0.125, 300, 20.0, False, 0, None)
    actual = ops.attention_site(
        q.cuda().double(), k.cuda().double(), v.cuda().double(), 0.125, 300, 20.0, False, 0, None
    )
    torch.testing.assert_close(actual.cpu(), expected)


def test_tensors_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = build(Shape(), STEP[-1:], torch.float32)
    expected = expect(case, torch.float32, "cuda:1")
    actual = case.to(torch.float32, "cuda:1")
    check_result(ops.dual_mode_attention(*actual.arguments()), actual, expected)


def test_graph_replays_with_other_lengths() -> None:
    """A captured step and selection, replayed after modes, lengths, rows and pages changed in place: eager's bits."""
    shape = Shape(32, 8, 128, 128, page_size=16, scale=128**-0.5)
    first = build(shape, STEP, torch.bfloat16).to(torch.bfloat16, "cuda")
    others = [STEP[b] for b in (1, 0, 3, 2, 7, 6, 5, 4, 8, 15, 14, 13, 12, 11, 10, 9)]
    second = build(shape, others, torch.bfloat16, seed=1).to(torch.bfloat16, "cuda")
    first, second = _alike(first, second)
    budget = torch.full((len(STEP),), 300, dtype=torch.int32, device="cuda")
    eager = [_step_and_select(case, budget) for case in (_copy(first), _copy(second))]
    static = _copy(first)
    _step_and_select(_copy(first), budget)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _step_and_select(static, budget)
    for case, expected in zip((first, second, first), (*eager, eager[0]), strict=True):
        for name, tensor in case.tensors.items():
            static.tensors[name].copy_(tensor)
        results[0].fill_(torch.nan)
        graph.replay()
        for got, wanted in zip(results, expected, strict=True):
            assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_graphs_and_streams_share_nothing() -> None:
    """Captures and eager calls at once on streams of their own give what they give alone, over and over."""
    shape = Shape(32, 8, 128, 128, page_size=16, scale=128**-0.5)
    cases = [build(shape, STEP[:5], torch.bfloat16, seed).to(torch.bfloat16, "cuda") for seed in range(4)]
    expected = [ops.dual_mode_attention(*case.arguments()).clone() for case in cases]
    graphs, results = [], []
    for case in cases[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(ops.dual_mode_attention(*case.arguments()))
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        eager = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    graphs[i].replay()
                else:
                    eager.append(ops.dual_mode_attention(*cases[i].arguments()))
        torch.cuda.synchronize()
        for got, wanted in zip((*results, *eager), expected, strict=True):
            assert torch.equal(got, wanted)


def test_sanitizer_finds_nothing() -> None:
    """compute-sanitizer over a small step and a selection: no stray access, no race, nothing read uninitialised."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    script = Path(__file__).with_name("sanitize.py")
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert run.returncode == 0, f"{tool}: {run.stdout[-3000:]}{run.stderr[-1000:]}"


def _step_and_select(case: Case, budget: Tensor) -> tuple[Tensor, ...]:
    out = ops.dual_mode_attention(*case.arguments())
    tensors = case.tensors
    scored = (tensors["cached_length"] + tensors["row_count"] - tensors["score_rows"]).int()
    scored = scored.where((tensors["score_rows"] > 0) & (tensors["request_mode"] >= Mode.VERIFY), -1)
    index, count = tensors["pillar_index"].clone(), tensors["pillar_count"].clone()
    ops.select_pillars(tensors["scores"], tensors["score_slot"], scored.int(), budget, index, count)
    return out, tensors["scores"], tensors["kv"], index, count


def _alike(*cases: Case) -> tuple[Case, ...]:
    """Pad the tensors of each case to the largest, so that one set of static tensors takes them in turn."""
    names = cases[0].tensors
    sizes = {name: [max(s) for s in zip(*(c.tensors[name].shape for c in cases), strict=True)] for name in names}
    return tuple(dataclasses.replace(c, tensors={n: _padded(c.tensors[n], sizes[n]) for n in names}) for c in cases)


def _padded(tensor: Tensor, size: list[int]) -> Tensor:
    grown = tensor.new_zeros(size)
    grown[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return grown


def _copy(case: Case) -> Case:
    return dataclasses.replace(case, tensors={name: tensor.clone() for name, tensor in case.tensors.items()})


def test_buffers_beyond_32_bit_offsets() -> None:
    """Pages, scores and pillars more than 2**31 elements apart."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    shape = Shape(page_size=4)
    requests = [
        Request(Mode.VERIFY, cached=9, rows=3, score_rows=3),
        Request(Mode.DRAFT, cached=9, pillars=4, recent=7),
        Request(Mode.VERIFY, cached=21, rows=3, score_rows=3),
    ]
    case = build(shape, requests, torch.bfloat16)
    expected = expect(case, torch.bfloat16, "cuda")
    actual = case.to(torch.bfloat16, "cuda")
    pages = actual.tensors["kv"].shape[0]
    for name, parts in (("kv", pages), ("scores", 5), ("pillar_index", 3)):
        actual.tensors[name] = _spread(actual.tensors[name], 2**31 // (parts - 1) + 64)
    out = ops.dual_mode_attention(*actual.arguments())
    actual.pool[:, 32:-32] = actual.tensors["kv"].flatten(1)
    check_result(out, actual, expected)


def _spread(tensor: Tensor, stride: int) -> Tensor:
    """The same values with ``stride`` elements between the entries of the first dimension."""
    buffer = tensor.new_empty(stride * tensor.shape[0])
    spread = buffer.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
    spread.copy_(tensor)
    return spread


def test_selection_of_long_contexts() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 16, 131072, generator=generator) ** 20
    scores[1] = (scores[1] * 50).floor()
    length, budget = (torch.tensor(x, dtype=torch.int32) for x in ([131072, 99991, 8192], [6554, 3000, 410]))
    results = []
    for device in ("cpu", "cuda"):
        index = torch.zeros(3, 16, 6600, dtype=torch.int32, device=device)
        count = torch.zeros(3, dtype=torch.int32, device=device)
        select = drafting.select_pillars if device == "cpu" else ops.select_pillars
        slot = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
        select(scores.to(device), slot, length.to(device), budget.to(device), index, count)
        results.append((index.cpu(), count.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


DRAW_ROWS, VOCABULARY = 122, 151936


def _draw_inputs(seed: int) -> list[Tensor]:
    """Logits of a large model's spread in bfloat16, and settings of all kinds, row by row."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.arange(DRAW_ROWS, device="cuda") + seed
    spread = torch.tensor([1.0, 2.5, 4.0], device="cuda")[rows % 3, None]
    logits = torch.randn(DRAW_ROWS, VOCABULARY, generator=generator, device="cuda") * spread

    def cycle(values: list[float], dtype: torch.dtype, every: int) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cuda")[rows // every % len(values)]

    settings = [
        cycle([1.0, 0.6, 0.0, 1.5], torch.float32, 1),
        cycle([0, 20, 0, 5000, 1], torch.int64, 4),
        cycle([1.0, 0.95, 0.3], torch.float32, 5),
        cycle([0.0, 0.0, 0.0, 0.05], torch.float32, 7),
    ]
    seeds = torch.randint(2**62, (2, DRAW_ROWS), generator=generator, device="cuda")
    return [logits.bfloat16(), *settings, seeds[0], seeds[1] >> 29]


def _decided(logits: Tensor, settings: list[Tensor]) -> Tensor:
    """Rows whose token no rounding within the kernels' bounds can change: bool [R]. Greedy rows all are."""
    heat, top_k, top_p, min_p, seed, position = settings
    sampled = heat != 0
    scaled = logits.float() / heat.where(sampled, 1.0)[:, None]
    lowest = {}
    for off in (-1, 1):  # the fewest and the most tokens that may be kept
        near_p = (top_p + off * 2.0**-16).clamp(min=2.0**-20).where(top_p < 1.0, top_p)
        lowest[off] = sampling.lowest_kept(scaled, top_k, near_p, min_p * (1 - off * 2.0**-18))
    noisy = scaled + gumbel_noise(seed, position, VOCABULARY)
    best = noisy.masked_fill(scaled < lowest[1][:, None], float("-inf")).topk(2, dim=1)
    first, second = best.values.unbind(1)
    error = 2.0**-21 + 23 * 2.0**-23 + first.abs() * 2.0**-24  # of one value; as much in the reference
    certain = scaled.gather(1, best.indices[:, :1])[:, 0] >= lowest[-1]
    return ~sampled | (first - second > 4 * error) & certain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_draw_at_length(dtype: torch.dtype) -> None:
    logits, *settings = _draw_inputs(0)
    logits = logits.to(dtype)
    actual, expected = ops.draw_tokens(logits, *settings), sampling.draw_tokens(logits, *settings)
    decided = _decided(logits, settings)
    assert decided.float().mean() > 0.9
    assert torch.equal(actual[decided], expected[decided])
    assert torch.equal(ops.draw_tokens(logits, *settings), actual)
    for rows in (slice(0, 1), slice(7, 15)):
        assert torch.equal(ops.draw_tokens(logits[rows], *(setting[rows] for setting in settings)), actual[rows])


def test_captured_draws_follow_their_inputs() -> None:
    cases = [_draw_inputs(seed) for seed in (0, 1)]
    eager = [ops.draw_tokens(*case).clone() for case in cases]
    static = [tensor.clone() for tensor in cases[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = ops.draw_tokens(*static)
    for i in (0, 1, 0):
        for held, given in zip(static, cases[i], strict=True):
            held.copy_(given)
        token.fill_(-1)
        graph.replay()
        assert torch.equal(token, eager[i])
