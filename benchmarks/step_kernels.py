"""Which kernels an iteration spends its time in.

    python benchmarks/step_kernels.py --shape Qwen3-8B --workload 1x8192 --settings draft_tokens=0

Requests of an inflated Countdown model (`inflate.py`) decode at the given length; once all of them do, iterations are
traced. For each kernel: its time and its launches in a mean iteration, and what one launch takes in the least, the
median and the longest case, since a kernel that serves drafts and verifications alike takes very different times.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from environment import environment, require_gpu
from gpu_trace import Event, advance, gpu_events
from inflated_shape import PRESETS
from rich.console import Console
from rich.table import Table
from throughput import load_model, settings
from traces import recorded_traces
from transformers import PreTrainedModel
from workloads import workload

import sparsespec_compile as ss

ITERATIONS = 52
"""Four cycles of 12 drafts."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS])
    parser.add_argument("--workload", default="64x8192", help="requests x cached tokens")
    parser.add_argument(
        "--settings", type=settings, default={}, help="of SpecConfig: default, or name=value,name=value"
    )
    parser.add_argument("--kernels", type=int, default=16, help="how many to show")
    parser.add_argument("--json", type=Path, help="where to write all of them")
    return parser.parse_args()


def trace(model: PreTrainedModel, prompts: list[list[int]], settings: dict[str, Any]) -> tuple[list[Event], int]:
    """What ran on the GPU in some iterations, and in how many."""
    config = ss.SpecConfig(max_requests=len(prompts), prefill_chunk=8192, **settings)
    fast = ss.optimize(model, config)
    sampling = ss.SamplingParams(max_new_tokens=1024, temperature=0.6, seed=1, stop_token_ids=())
    with fast.stream(prompts, sampling) as pieces:
        waiting = set(range(len(prompts)))
        while waiting:
            waiting.discard(next(pieces).index)
        advance(pieces, fast, ITERATIONS)
        before = fast.stats.iterations
        events = gpu_events(lambda: advance(pieces, fast, ITERATIONS))
        return events, fast.stats.iterations - before


def by_kernel(events: list[Event], iterations: int) -> list[dict[str, str | float]]:
    """A row for each kernel, the one that takes most time first; times in microseconds."""
    launches: dict[str, list[float]] = defaultdict(list)
    for event in events:
        launches[event.name].append(event.end - event.start)
    rows: list[dict[str, str | float]] = [
        {
            "kernel": name,
            "us_per_iteration": round(sum(times) / iterations, 2),
            "launches_per_iteration": round(len(times) / iterations, 2),
            "least_us": round(min(times), 2),
            "median_us": round(statistics.median(times), 2),
            "longest_us": round(max(times), 2),
        }
        for name, times in launches.items()
    ]
    return sorted(rows, key=lambda row: -float(row["us_per_iteration"]))


def main() -> None:
    arguments = parse_arguments()
    require_gpu()
    load = workload(arguments.workload)
    model, tokenizer = load_model(arguments.shape, "cuda")
    events, iterations = trace(model, recorded_traces(tokenizer, load.requests, load.length), arguments.settings)
    rows = by_kernel(events, iterations)
    total = (max(event.end for event in events) - events[0].start) / iterations
    busy = sum(float(row["us_per_iteration"]) for row in rows)
    table = Table(*rows[0], title=f"{arguments.workload}: {total / 1e3:.2f} ms an iteration, kernels {busy / 1e3:.2f}")
    for row in rows[: arguments.kernels]:
        table.add_row(*(str(value)[:72] for value in row.values()))
    Console().print(table)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "kernels")}
        result = {
            "environment": environment("cuda"),
            "settings": settings,
            "iterations": iterations,
            "us_per_iteration": round(total, 2),
            "kernels": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
