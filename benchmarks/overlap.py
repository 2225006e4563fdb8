"""Is the GPU ever idle between steps? A profiler's trace with the host ahead of it, and with a host that waits.

    python benchmarks/overlap.py --json benchmarks/results/h200-overlap.json --png benchmarks/results/h200-overlap.png

Requests of an inflated Countdown model (`inflate.py`) decode at the given length; 40 iterations are traced under each
kind of host. Beside the idle share, and that between steps alone: the host's own time for a step, and how long it
waited for the GPU.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from environment import environment, require_gpu
from gpu_trace import Event, advance, busy_spans, gpu_events, idle_between_steps, idle_share
from inflated_shape import PRESETS
from rich.console import Console
from rich.table import Table
from throughput import load_model
from traces import recorded_traces
from transformers import PreTrainedModel

import sparsespec_compile as ss

matplotlib.use("Agg")
from matplotlib import pyplot

ITERATIONS = 40


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help="cached tokens; short steps show gaps most")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--png", type=Path, help="where to draw the busy times")
    return parser.parse_args()


def trace(model: PreTrainedModel, prompts: list[list[int]], *, overlap: bool) -> tuple[dict, list[Event]]:
    """The row of a host, and what ran on the GPU."""
    config = ss.SpecConfig(draft_tokens=8, overlap=overlap, max_requests=len(prompts), prefill_chunk=16_384)
    fast = ss.optimize(model, config)
    sampling = ss.SamplingParams(max_new_tokens=6 * ITERATIONS, temperature=0.6, seed=1, stop_token_ids=())
    with fast.stream(prompts, sampling) as pieces:
        advance(pieces, fast, 3 * ITERATIONS)  # prompts, captures, and the first decoding
        stats = fast.stats
        before = (stats.iterations, stats.host_seconds, stats.waited_seconds)
        events = gpu_events(lambda: advance(pieces, fast, ITERATIONS))
        done, host, waited = (
            now - then
            for now, then in zip((stats.iterations, stats.host_seconds, stats.waited_seconds), before, strict=True)
        )
    row = {
        "host": "ahead" if overlap else "waits for results",
        "gpu_idle_share": round(idle_share(events), 5),
        "idle_between_steps": round(idle_between_steps(events), 5),
        "ms_per_iteration": round((max(event.end for event in events) - events[0].start) / 1e3 / done, 4),
        "host_ms_per_iteration": round(1e3 * host / done, 4),
        "waited_ms_per_iteration": round(1e3 * waited / done, 4),
    }
    return row, events


def draw(rows: list[dict], traces: list[list[Event]], path: Path) -> None:
    """The first tenth of each trace: busy in colour, idle in white."""
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(12, 1.4 * len(rows)), layout="constrained")
    for axis, row, events in zip(axes, rows, traces, strict=True):
        busy = busy_spans(events)
        first, last = busy[0][0], busy[0][0] + (busy[-1][1] - busy[0][0]) / 10
        shown = [(start, end) for start, end in busy if start < last]
        axis.broken_barh([((start - first) / 1e3, (end - start) / 1e3) for start, end in shown], (0, 1))
        axis.set_title(
            f"host {row['host']}: GPU idle {row['gpu_idle_share']:.2%}, between steps {row['idle_between_steps']:.2%}"
        )
        axis.set_yticks([])
        axis.set_xlabel("ms")
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    require_gpu()
    model, tokenizer = load_model(arguments.shape, "cuda")
    prompts = recorded_traces(tokenizer, arguments.requests, arguments.length)
    traced = [trace(model, prompts, overlap=overlap) for overlap in (True, False)]
    rows = [row for row, _ in traced]
    table = Table(*rows[0], title=f"{arguments.shape}, {arguments.requests} requests at {arguments.length} tokens")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if arguments.png:
        draw(rows, [events for _, events in traced], arguments.png)
    if arguments.json:
        settings = {"shape": arguments.shape, "requests": arguments.requests, "length": arguments.length}
        result = {"environment": environment("cuda"), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
