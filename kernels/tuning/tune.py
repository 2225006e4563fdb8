"""Measures tile sizes of the attention kernel on the present GPU and keeps the best in the user's file.

    python -m sparsespec_compile.kernels.tuning --heads 32 8 128
    python -m sparsespec_compile.kernels.tuning --heads 28 4 128 --dtype float16 --output tiles.json

Candidates are compiled first, in several processes, then timed one after the other on steps of this project, for each
kind of step its own: plain decoding and drafting, verifying and a mix with scores and without, a prompt. The best has
the smallest product of times. The search goes on around it until nothing there is better by a percent.
"""

import argparse
import itertools
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from triton.errors import TritonError

from ..attention.launcher import dual_mode_attention
from ..errors import KernelUnavailableError
from ..launch import LARGE_STEP_PAIRS, StepKind, device_limits, promised
from ..ops import Mode
from .measure import Call, Heads, Step, Work, make_step, replay_ms
from .tiling import Layer, Tiling, cache_path, can_be_kept, default_tiling, entry_key, save

STEPS: dict[StepKind, dict[str, list[Work]]] = {
    StepKind.SMALL_TILES: {
        "decode": [Work(Mode.VERIFY, 8192)] * 16,
        "decode 1024": [Work(Mode.VERIFY, 1024)] * 64,
        "draft": [Work(Mode.DRAFT, 8192, pillars=410)] * 57,
        "draft, judging": [Work(Mode.DRAFT, 8192, 3, pillars=410)] * 64,
    },
    StepKind.UNSCORED: {
        "verify": [Work(Mode.VERIFY, 8192, 9)] * 16,
        "mixed": [Work(Mode.DRAFT, 8192, pillars=410)] * 57 + [Work(Mode.VERIFY, 8192, 9)] * 7,
        "verify 1024": [Work(Mode.VERIFY, 1024, 9)] * 64,
    },
    StepKind.MIXED: {
        "verify": [Work(Mode.VERIFY, 8192, 9, 410, True)] * 16,
        "mixed": [Work(Mode.DRAFT, 8192, pillars=410)] * 57 + [Work(Mode.VERIFY, 8192, 9, 410, True)] * 7,
        "mixed 1024": [Work(Mode.DRAFT, 1024, pillars=128)] * 43 + [Work(Mode.VERIFY, 1024, 9, 128, True)] * 21,
    },
    StepKind.PREFILL: {"prefill": [Work(Mode.PREFILL, 0, 8192)]},
}

_WORTH_GOING_ON = 0.01
"""Share of the mean time that a round of the search must save for another one."""


def main() -> None:
    options = _options()
    if not torch.cuda.is_available():
        raise KernelUnavailableError(
            "tile sizes are measured on a GPU, and torch finds none: run this on the GPU's machine"
        )
    q_heads, kv_heads, dim = options.heads
    heads = Heads(q_heads, kv_heads, dim, options.value_dim or dim, getattr(torch, options.dtype), options.page_size)
    console = Console()
    for kind in map(StepKind, options.kind):
        _tune(heads, kind, STEPS[kind], options, console)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, metavar=("QUERY", "KV", "DIM"), default=(32, 8, 128))
    parser.add_argument("--value-dim", type=int, help="dimension of values, if not that of keys")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    kinds = [kind.value for kind in StepKind]
    parser.add_argument("--kind", nargs="+", choices=kinds, default=kinds, help="steps to tune for")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="compiling processes")
    parser.add_argument("--output", type=Path, default=cache_path(), help="file to add the best tiles to")
    return parser.parse_args()


def _tune(
    heads: Heads, kind: StepKind, steps: dict[str, list[Work]], options: argparse.Namespace, console: Console
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    limits = device_limits(device)
    layer = layer_of(heads)
    made = {name: _copies(heads, work, device) for name, work in steps.items()}
    console.print(entry_key(layer, kind, limits))
    timed: dict[Tiling, dict[str, float]] = {}
    compiled: set[Tiling] = set()
    default = default_tiling(layer, kind, limits)
    best, before = default, math.inf
    while True:
        candidates = [tiling for tiling in candidate_tilings(best, kind) if tiling not in compiled]
        compiled.update(candidates)
        usable = _compile(heads, kind, candidates, options, console)
        if not timed and not usable:
            raise KernelUnavailableError("no tiles run on this GPU for these heads; the reasons stand above")
        timed |= {tiling: _times(made, tiling) for tiling in tqdm(usable, desc="timing")}
        best = min(timed, key=lambda tiling: math.prod(timed[tiling].values()))
        console.print(_report(timed, default))
        # After every round, so that an interrupted search keeps what it has found.
        save({entry_key(layer, kind, limits): best}, options.output)
        console.print(f"wrote {options.output}")
        product = math.prod(timed[best].values())
        if product > (1 - _WORTH_GOING_ON) ** len(steps) * before:
            break
        before = product


def layer_of(heads: Heads) -> Layer:
    """The layer that tiles are chosen for."""
    return Layer(heads.q_heads // heads.kv_heads, heads.key_dim, heads.value_dim, heads.dtype, heads.page_size)


def candidate_tilings(default: Tiling, kind: StepKind) -> list[Tiling]:
    """The default first, then tiles around it: other blocks, depths, warps, programs and costs of a unit."""
    found = [default]
    if kind is not StepKind.SMALL_TILES:
        for big_n, big_ahead in itertools.product((32, 64), (1, 2, 3, 4)):
            found.append(replace(default, big_n=min(big_n, default.block_n), big_ahead=big_ahead))
    if kind is StepKind.MIXED:
        found += [replace(default, scored_ahead=ahead) for ahead in (1, 2, 3)]
        found += [replace(default, scored_overhead=overhead) for overhead in (7, 9, 16)]
    found += [replace(default, small_ahead=ahead) for ahead in (1, 2, 3)]
    blocks = {max(16, default.block_n // 2), default.block_n, default.block_n * 2}
    programs = {max(1, default.programs_per_sm - 1), default.programs_per_sm, default.programs_per_sm + 1}
    for block_n, per_sm in itertools.product(sorted(blocks), sorted(programs)):
        found.append(replace(default, block_n=block_n, big_n=min(default.big_n, block_n), programs_per_sm=per_sm))
    found += [replace(default, num_warps=warps) for warps in (default.num_warps // 2, default.num_warps * 2) if warps]
    found += [replace(default, unit_overhead=default.unit_overhead * parts // 4) for parts in (2, 3, 6)]
    found += [replace(default, part_cost=default.part_cost * parts // 4) for parts in (1, 2, 8)]
    return [tiling for tiling in dict.fromkeys(found) if can_be_kept(tiling)]


def _compile(
    heads: Heads, kind: StepKind, candidates: list[Tiling], options: argparse.Namespace, console: Console
) -> list[Tiling]:
    """Those candidates that compile and fit; leaves what was compiled in Triton's cache."""
    work = partial(obstacle, heads, kind)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(tqdm(pool.map(work, candidates), total=len(candidates), desc="compiling"))
    for reason, count in Counter(filter(None, found)).items():
        console.print(f"{count} left out: {reason}")
    return [tiling for tiling, reason in zip(candidates, found, strict=True) if reason is None]


def obstacle(heads: Heads, kind: StepKind, tiling: Tiling) -> str | None:
    """Why a step does not run with these tiles; None if it does."""
    rows = -(-LARGE_STEP_PAIRS // heads.q_heads) if kind is StepKind.PREFILL else 1
    step = make_step(heads, [Work(Mode.PREFILL, 0, rows)], torch.device("cuda", torch.cuda.current_device()))
    try:
        _call(step, tiling)()
        torch.cuda.synchronize()
    except (TritonError, RuntimeError) as error:
        first_line, *_ = str(error).split("\n")
        return f"{type(error).__name__}: {first_line[:60]}"
    return None


def _copies(heads: Heads, work: list[Work], device: torch.device) -> list[Step]:
    """The step on as many inputs of their own as it takes to leave none of them in the L2 cache."""
    bytes_each = make_step(heads, work, device).fewest_bytes()
    return [make_step(heads, work, device, seed) for seed in range(max(2, -(-400_000_000 // bytes_each)))]


def _times(made: dict[str, list[Step]], tiling: Tiling) -> dict[str, float]:
    return {name: replay_ms([_call(step, tiling) for step in steps], 10) for name, steps in made.items()}


def _call(step: Step, tiling: Tiling) -> Call:
    attend: Callable[..., object] = partial(dual_mode_attention, tiling=tiling)

    def call() -> object:
        with promised(step.promise()):
            return attend(*step.arguments())

    return call


def _report(timed: dict[Tiling, dict[str, float]], default: Tiling) -> Table:
    """The best tiles by what they change of the default ones, which stand last if they are not among them."""
    best_first = sorted(timed, key=lambda tiling: math.prod(timed[tiling].values()))
    table = Table("tiles", *timed[best_first[0]], title=f"milliseconds, best first; default: {default}")
    shown = best_first[:12]
    for tiling in shown + [default] * (default in timed and default not in shown):
        table.add_row(_changes(tiling, default), *(f"{ms:.4f}" for ms in timed[tiling].values()))
    return table


def _changes(tiling: Tiling, default: Tiling) -> str:
    values = asdict(default)
    changed = [f"{name} {value}" for name, value in asdict(tiling).items() if value != values[name]]
    return ", ".join(changed) or "default"
