"""Times of iterations, measured beside what the cost model predicts for them.

    python benchmarks/iteration_times.py --shape Qwen3-8B --json benchmarks/results/h200-iteration-times.json

One engine decodes each load (requests x cached tokens of recorded reasoning) with every cycle in turn, each drafter
with each number of drafts that "auto" could choose, while their texts grow by some 400 tokens. Whole cycles are timed
once all requests are in the rhythm of the present number; the median counts. These are also the times on which the
tests try what chooses the number of drafts.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from decoding_clock import TooShortError
from environment import environment, usable_device
from inflated_shape import PRESETS
from rich.console import Console
from rich.table import Table
from throughput import load_model
from traces import recorded_traces
from workloads import workload

import sparsespec_compile as ss
from sparsespec_compile.runtime.device.drafters import Cycle, Drafter, cycles_of
from sparsespec_compile.runtime.host.iteration_times import IterationTime

LOADS = ("64x64", "64x1024", "64x4096", "64x8192", "16x1024", "16x8192", "1x8192", "128x1024")

_UNDER_WAY = 3
"""Iterations behind a first cycle that still belong to the former number of drafts."""

_FEWEST_ITERATIONS, _FEWEST_CYCLES = 12, 2
"""That are measured of each number of drafts."""

_NEW_TOKENS = 800
"""Of each text: more than all numbers of drafts take."""


class Tour:
    """Stands where `CycleChooser` does: goes through all numbers of drafts and notes what cycles took.

    Attributes:
        current: the present cycle.
        done: whether all numbers were measured since a stream began.
        rows: what was measured, of all streams: requests, mean cached tokens, drafter, drafts, seconds measured and
            predicted.
    """

    def __init__(self, config: ss.SpecConfig, predicted: IterationTime) -> None:
        self._cycles = cycles_of(config)
        self.current = self._cycles[-1]
        self.rows: list[dict[str, Any]] = []
        self._predicted = predicted
        self._left: list[Cycle] = []
        self._times: list[tuple[float, float, int]] = []

    @property
    def done(self) -> bool:
        """Whether nothing is left to be measured."""
        return not self._left

    def began(self) -> None:
        """A stream begins: measure everything."""
        self._left = list(self._cycles)
        self._next()

    def verified(self, drafter: Drafter, drafts: int, accepted: int) -> None:
        """What was accepted makes no difference."""

    def took(self, seconds: float, lengths: list[int]) -> None:
        """Note the time of an iteration of requests of these lengths."""
        self._times.append((seconds, statistics.mean(lengths), len(lengths)))

    def choose(self, lengths: list[int]) -> Cycle:
        """The cycle from here on."""
        iterations = self.current.passes + 1
        most = max((requests for *_, requests in self._times), default=0)
        settled = [time for time in self._times if time[2] == most][iterations + _UNDER_WAY :]
        cycles = [settled[at : at + iterations] for at in range(0, len(settled) - iterations + 1, iterations)]
        if not self.done and len(cycles) >= max(_FEWEST_CYCLES, _FEWEST_ITERATIONS // iterations):
            self._note(cycles)
            self._left.pop(0)
            self._next()
        return self.current

    def _next(self) -> None:
        self.current = self._left[0] if self._left else self._cycles[0]
        self._times.clear()

    def _note(self, cycles: list[list[tuple[float, float, int]]]) -> None:
        length = statistics.mean(length for cycle in cycles for _, length, _ in cycle)
        requests = cycles[0][0][2]
        seconds = statistics.median(statistics.mean(time for time, _, _ in cycle) for cycle in cycles)
        predicted = float(self._predicted([self.current], length, requests)[0])
        row = {"requests": requests, "length": round(length, 1), "drafter": self.current.name}
        row["draft_tokens"], row["passes"] = self.current.drafts, self.current.passes
        self.rows.append({**row, "seconds": float(f"{seconds:.5g}"), "predicted": float(f"{predicted:.5g}")})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS])
    parser.add_argument("--load", nargs="+", default=LOADS, help="requests x cached tokens")
    parser.add_argument("--max-draft-tokens", type=int, default=ss.SpecConfig().max_draft_tokens)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


@contextmanager
def touring() -> Iterator[Callable[[], Tour]]:
    """Let a `Tour` choose the cycles of every engine that builds its state meanwhile; gives the latest one."""
    tours: list[Tour] = []

    def start(config: ss.SpecConfig, predicted: IterationTime) -> Tour:
        tours.append(Tour(config, predicted))
        return tours[-1]

    with patch("sparsespec_compile.runtime.host.engine.chooser_for", start):
        yield lambda: tours[-1]


def run(fast: ss.OptimizedModel, prompts: list[list[int]], tour: Callable[[], Tour]) -> None:
    """Decode until everything is measured."""
    sampling = [
        ss.SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0.6, seed=i, stop_token_ids=())
        for i in range(len(prompts))
    ]
    with fast.stream(prompts, sampling) as pieces:
        for _ in pieces:
            if tour().done:
                return
    raise TooShortError(f"Texts of {_NEW_TOKENS} new tokens ended before every number of drafts was measured.")


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("requests", "cached tokens", "drafter", "drafts", "ms", "predicted", "measured / predicted")
    for row in rows:
        milliseconds = [f"{1e3 * row[name]:.2f}" for name in ("seconds", "predicted")]
        sizes = (str(row["requests"]), f"{row['length']:,.0f}", row["drafter"], str(row["draft_tokens"]))
        table.add_row(*sizes, *milliseconds, f"{row['seconds'] / row['predicted']:.3f}")
    return table


def main() -> None:
    arguments = parse_arguments()
    loads = [(one.requests, one.length) for one in map(workload, arguments.load)]
    model, tokenizer = load_model(arguments.shape, arguments.device)
    config = ss.SpecConfig(
        draft_tokens="auto",
        draft_proposals=0,  # a tour of all cycles that judge proposals would take too long
        max_draft_tokens=arguments.max_draft_tokens,
        max_requests=max(requests for requests, _ in loads),
        prefill_chunk=8192,
        ceilings=None if arguments.device.startswith("cuda") else ss.H200,
    )
    fast = ss.optimize(model, config)
    with touring() as tour:
        for requests, length in loads:
            prompts = recorded_traces(tokenizer, requests, length)
            run(fast, prompts, tour)
            if arguments.json:
                where = {"environment": environment(arguments.device), "shape": arguments.shape}
                result = {**where, "rows": tour().rows}
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        Console().print(show(tour().rows))


if __name__ == "__main__":
    main()
