"""GEMM rows and KV bytes of each iteration under each schedule, as a picture (the paper's figure of its scheduler).

    python benchmarks/schedules.py --json benchmarks/results/cpu-schedules.json --png cpu-schedules.png

The embedded Countdown model continues the same prompts of unequal lengths under every schedule, greedily. Rows and
bytes are counted, not timed: they are the same on any hardware.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import torch
from countdown_model import held_out_prompts, load
from environment import environment, usable_device
from rich.console import Console
from rich.table import Table

import sparsespec_compile as ss

matplotlib.use("Agg")
from matplotlib import pyplot

SCHEDULES = ("in_phase", "random", "balanced", "grouped")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=400, help="of the longest text; the others are shorter")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--png", type=Path, help="where to draw them")
    return parser.parse_args()


def measure(model, prompts: list[list[int]], new_tokens: int, schedule: str) -> tuple[dict, list[list[int]]]:
    """Rows and KV megabytes of each iteration, and the texts."""
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=8, schedule=schedule, max_requests=len(prompts)))
    sampling = [
        ss.SamplingParams(max_new_tokens=max(8, new_tokens * (nth + 1) // len(prompts)), stop_token_ids=())
        for nth in range(len(prompts))
    ]
    texts = [completion.token_ids for completion in fast.generate_batch(prompts, sampling, progress=True)]
    stats = fast.stats
    row = {
        "schedule": schedule,
        "rows": list(stats.rows_by_iteration),
        "kv_megabytes": [round(read * model.dtype.itemsize / 1e6, 3) for read in stats.kv_read_by_iteration],
    }
    return row, texts


def uneven(values: list[float]) -> float:
    """Mean over windows of 9 iterations, one cycle, of the largest value over the mean: 1 = all alike."""
    windows = [values[start : start + 9] for start in range(9, len(values) - 9, 9)]
    return statistics.mean(max(window) / statistics.mean(window) for window in windows if any(window))


def draw(rows: list[dict], path: Path) -> None:
    figure, axes = pyplot.subplots(2, len(rows), sharex="row", sharey="row", figsize=(12, 5), layout="constrained")
    for column, row in zip(axes.T, rows, strict=True):
        for axis, name, label in zip(column, ("rows", "kv_megabytes"), ("GEMM rows", "KV MB read"), strict=True):
            axis.bar(range(len(row[name])), row[name], width=1.0)
            axis.set_title(f"{row['schedule']}: {label}")
            axis.set_xlabel("iteration")
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load(arguments.device, torch.float32)
    batch = held_out_prompts(tokenizer, arguments.requests, arguments.device)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    measured = [measure(model, prompts, arguments.new_tokens, schedule) for schedule in SCHEDULES]
    rows = [row for row, _ in measured]
    table = Table("schedule", "iterations", "rows, largest over mean", "KV bytes, largest over mean", "texts equal")
    for row, texts in measured:
        row["rows_uneven"], row["kv_uneven"] = round(uneven(row["rows"]), 3), round(uneven(row["kv_megabytes"]), 3)
        row["texts_equal"] = texts == measured[0][1]
        cells = (len(row["rows"]), row["rows_uneven"], row["kv_uneven"], row["texts_equal"])
        table.add_row(row["schedule"], *map(str, cells))
    Console().print(table)
    if arguments.png:
        draw(rows, arguments.png)
    if arguments.json:
        settings = {"requests": arguments.requests, "new_tokens": arguments.new_tokens, "dtype": "float32"}
        result = {"environment": environment(arguments.device), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
