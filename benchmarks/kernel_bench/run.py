"""Runs the cases, prints the table, writes the result file."""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from environment import environment, usable_device
from rich.console import Console

from sparsespec_compile.kernels.launch import promised
from sparsespec_compile.kernels.ops import Mode, draw_tokens, dual_mode_attention, select_pillars
from sparsespec_compile.kernels.tuning.measure import Call, Step, make_step, replay_ms

from .cases import CASES, Case, Draw, Selection, shrunk
from .peers import DRAW_PEERS, PEERS, PeerUnavailableError, versions
from .report import Result, as_table, judge

RESULTS = Path(__file__).parents[1] / "results"

FRESH_BYTES = 400_000_000
"""Inputs of a case together: eight times the L2 cache of an H200."""

console = Console()


def main() -> None:
    options = _options()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    cases = [case for case in CASES if re.search(options.only, case.name)]
    if options.quick or device.type == "cpu":
        cases = [shrunk(case, 8 if device.type == "cuda" else 256, 4 if device.type == "cuda" else 2) for case in cases]
    results = []
    for case in cases:
        results.append(_run(case, device, options.repeats))
        console.print(f"{case.name}: {results[-1].ms:.4f} ms", results[-1].notes or "")
    judge(results, [case.bar for case in cases])
    console.print(as_table(results))
    if options.quick or device.type == "cpu" or options.only:
        console.print("A part of the cases or small ones: nothing written.")
        return
    path = RESULTS / f"{torch.cuda.get_device_name().split()[-1].lower()}-kernels.json"
    content = {"environment": environment("cuda") | versions(), "cases": [result.as_json() for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"wrote {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kernels beside their bytes and beside other libraries' kernels.")
    parser.add_argument("--device", type=usable_device, choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--only", default="", help="regular expression that names of cases must contain")
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


def _run(case: Case | Selection | Draw, device: torch.device, repeats: int) -> Result:
    if isinstance(case, Selection):
        calls, fewest = _selection_calls(case, device)
        return Result(case.name, _time(calls, repeats), fewest)
    if isinstance(case, Draw):
        return _run_draw(case, device, repeats)
    first = make_step(case.heads, case.work, device)
    fewest = first.fewest_bytes()
    sets = max(2, -(-FRESH_BYTES // fewest)) if device.type == "cuda" else 1
    steps = [first, *(make_step(case.heads, case.work, device, seed) for seed in range(1, sets))]
    result = Result(case.name, _time([partial(_attend, step) for step in steps], repeats), fewest)
    if case.split:
        result.peers["in turn"] = _in_turn(case, device, sets, repeats)
    del steps
    for name in case.peers:
        _add_peer(result, name, lambda name=name: [PEERS[name](first) for _ in range(sets)], device, repeats)
    return result


def _attend(step: Step) -> object:
    with promised(step.promise()):
        return dual_mode_attention(*step.arguments())


def _in_turn(case: Case, device: torch.device, sets: int, repeats: int) -> float:
    """Milliseconds of the drafts and of the other requests in two launches of our own, one after the other."""
    parts = [[item for item in case.work if (item.mode == Mode.DRAFT) == drafts] for drafts in (True, False)]
    pairs = [[make_step(case.heads, part, device, seed) for part in parts] for seed in range(sets)]
    return _time([partial(_attend_both, *pair) for pair in pairs], repeats)


def _attend_both(drafts: Step, others: Step) -> None:
    _attend(drafts)
    _attend(others)


def _selection_calls(case: Selection, device: torch.device) -> tuple[list[Call], int]:
    """Selections on scores of their own, and the bytes one must move."""
    fewest = case.requests * case.rows * 4 * (case.length + case.budget)
    lengths = [case.length if b < case.requests else -1 for b in range(case.slots)]
    scored = torch.tensor(lengths, dtype=torch.int32, device=device)
    slot = torch.arange(case.slots, dtype=torch.int32, device=device) % case.requests
    budget = torch.full((case.slots,), case.budget, dtype=torch.int32, device=device)
    count = torch.zeros(case.slots, dtype=torch.int32, device=device)
    index = torch.zeros(case.slots, case.rows, case.budget, dtype=torch.int32, device=device)
    calls: list[Call] = []
    for _ in range(max(2, -(-FRESH_BYTES // fewest)) if device.type == "cuda" else 1):
        scores = torch.rand(case.requests, case.rows, case.length, device=device) ** 8
        calls.append(partial(select_pillars, scores, slot, scored, budget, index, count))
    return calls, fewest


def _run_draw(case: Draw, device: torch.device, repeats: int) -> Result:
    """Draws from logits of their own, which must be read once, and what torch takes for them."""
    fewest = case.rows * case.vocabulary * torch.bfloat16.itemsize
    sets = max(2, -(-FRESH_BYTES // fewest)) if device.type == "cuda" else 1
    # Spread as a model's are: a few tokens carry most of the probability.
    logits = [(torch.randn(case.rows, case.vocabulary, device=device) * 3).bfloat16() for _ in range(sets)]
    ones = torch.ones(case.rows, device=device)
    count, seed = (torch.full((case.rows,), value, device=device) for value in (case.top_k, 7))
    position = torch.arange(case.rows, device=device)
    rows = (ones * case.temperature, count, ones * case.top_p, ones * 0.0, seed, position)
    result = Result(case.name, _time([partial(draw_tokens, own, *rows) for own in logits], repeats), fewest)
    settings = (case.temperature, case.top_k, case.top_p)
    for name, peer in DRAW_PEERS.items():
        if case.temperature > 0 or name == "torch argmax":
            calls = [partial(peer, own, *settings) for own in logits]
            _add_peer(result, name, lambda calls=calls: calls, device, repeats)
    return result


def _add_peer(
    result: Result, name: str, calls: Callable[[], Sequence[Call]], device: torch.device, repeats: int
) -> None:
    """Time a peer, or note why there is no time."""
    if device.type != "cuda":
        result.notes += f"{name}: needs a GPU. "
        return
    try:
        result.peers[name] = _time(calls(), repeats)
    except PeerUnavailableError as error:
        result.notes += f"{name}: {error}. "
    except Exception as error:  # another library's failure must not cost our results; it is reported
        text = str(error).partition("\n")[0][:120]
        result.notes += f"{name}: {type(error).__name__}: {text}. "
    torch.cuda.empty_cache()


def _time(calls: Sequence[Call], repeats: int) -> float:
    """Milliseconds of a call: in a CUDA graph, or on the CPU as it is."""
    if torch.cuda.is_available():
        return replay_ms(calls, repeats)
    times = []
    for _ in range(min(repeats, 3)):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - start) * 1000 / len(calls))
    return median(times)
