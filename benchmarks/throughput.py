"""Tokens a second at the shape of a large model, ours beside other engines, on the same texts and the same card.

    python benchmarks/throughput.py --shape Qwen3-8B --workload 64x8192 48x14000

The weights are the trained Countdown model's, inflated to the shape without changing its function (`inflate.py`): texts
and acceptance are a trained model's, bytes and operations the large one's. A workload RxL decodes R requests that
already have L tokens of real reasoning each; prompts and warm-up are outside the clock, which runs while all of them
decode. RxL-drain is a batch that drains: the shortest text has a quarter of the longest one's new tokens, and the clock
runs to the end of the last. Every engine gets the same prompts, seeds and number of new tokens. Results go to one JSON
list, a row for each engine and workload.
"""

import argparse
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from countdown_model import load as load_countdown
from environment import environment, usable_device
from inflate import inflated_model
from inflated_shape import PRESETS, preset
from report import label
from rich.console import Console
from rich.table import Table
from texts import common_share
from throughput_engines import (
    ENGINES,
    EngineMissingError,
    Load,
    Measured,
    checkpoint_exists,
    release_memory,
    versions,
)
from traces import recorded_traces
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparsespec_compile as ss
from sparsespec_compile.config import Schedule

OURS = ("sparsespec", "plain")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS])
    parser.add_argument("--workload", nargs="+", default=["64x8192"], help="requests x cached tokens, -drain behind")
    parser.add_argument("--engine", nargs="+", default=["sparsespec", "plain"], choices=list(ENGINES))
    parser.add_argument("--drafter", nargs="+", default=["pillar"], choices=["pillar", "window", "full", "ngram"])
    parser.add_argument("--draft-tokens", type=draft_tokens, nargs="+", default=[8], help="numbers, or auto")
    parser.add_argument("--schedule", nargs="+", default=["grouped"], choices=get_args(Schedule))
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="the same model on disk (inflate.py), for vllm")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write, or add, the rows")
    return parser.parse_args()


def draft_tokens(text: str) -> int | str:
    """A value of `SpecConfig.draft_tokens`."""
    return text if text == "auto" else int(text)


def workload_size(name: str) -> tuple[int, int, bool]:
    """Requests and cached tokens of a workload such as 64x8192, and whether it drains."""
    size, dash, drains = name.partition("-")
    requests, cross, length = size.partition("x")
    numbers = cross and requests.isdigit() and length.isdigit() and int(requests) and int(length)
    if not numbers or (dash and drains != "drain"):
        raise SystemExit(f"--workload {name}: give requests x cached tokens, such as 64x8192 or 64x8192-drain")
    return int(requests), int(length), bool(dash)


def load_model(shape: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Countdown model, inflated to a shape if that is another one, which takes a GPU."""
    if shape != "countdown" and not device.startswith("cuda"):
        raise SystemExit(f"--shape {shape} takes a GPU, got --device {device}: there, use --shape countdown.")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model, tokenizer = load_countdown(device, dtype)
    return (model if shape == "countdown" else inflated_model(preset(shape), device, dtype)), tokenizer


def variants(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Engines with their settings."""
    found: list[tuple[str, dict[str, Any]]] = []
    for engine in arguments.engine:
        if engine == "sparsespec":
            for drafter, schedule in product(arguments.drafter, arguments.schedule):
                settings = {"drafter": drafter, "schedule": schedule}
                found += [(engine, {**settings, "draft_tokens": k}) for k in arguments.draft_tokens]
        elif engine == "vllm":
            found += [(engine, {"checkpoint": str(arguments.checkpoint), "ngram": ngram}) for ngram in (False, True)]
        else:
            found.append((engine, {}))
    return found


def row_of(workload: str, engine: str, settings: dict[str, Any], measured: Measured, device: str) -> dict[str, Any]:
    numbers = {name: value for name, value in asdict(measured).items() if name != "texts"}
    rounded = {name: value if value is None else float(f"{value:.6g}") for name, value in numbers.items()}
    shown = {name: value for name, value in settings.items() if name != "checkpoint"}
    where = {"hardware": environment(device)["hardware"]} | versions(engine)
    return {"workload": workload, "engine": engine, "settings": shown, **rounded, "versions": where}


def equal_to_plain(results: list[tuple[str, Measured]]) -> list[tuple[str, float]]:
    """Share of our texts' tokens up to which they equal plain decoding's, by engine and settings: 1.0 in float32."""
    plain = next((measured.texts for name, measured in results if name == "plain"), None)
    return [
        (name, common_share(measured.texts, plain))
        for name, measured in results
        if plain is not None and measured.texts is not None and name != "plain"
    ]


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("workload", "engine", "settings", "tokens/s", "ms", "accepted", "KV bytes", "GPU idle")
    for row in rows:
        accepted, share, idle = (row[name] for name in ("accepted_per_cycle", "kv_bytes_share", "gpu_idle_share"))
        table.add_row(
            row["workload"],
            row["engine"],
            ", ".join(f"{name}={value}" for name, value in row["settings"].items()),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms_per_iteration']:.2f}",
            "-" if accepted is None else f"{accepted:.2f}",
            "-" if share is None else f"{share:.1%}",
            "-" if idle is None else f"{idle:.1%}",
        )
    return table


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    sizes = {name: workload_size(name) for name in arguments.workload}
    console.print(environment(arguments.device))
    model, tokenizer = load_model(arguments.shape, arguments.device)
    rows: list[dict[str, Any]] = []
    for workload, (requests, length, drains) in sizes.items():
        prompts = recorded_traces(tokenizer, requests, length, arguments.seed)
        load = Load(prompts, arguments.new_tokens, arguments.temperature, arguments.seed, drains)
        results: list[tuple[str, Measured]] = []
        for engine, settings in variants(arguments):
            if drains and engine not in OURS:
                console.print(f"[yellow]{engine} skipped: {workload} needs an engine that is watched token by token")
                continue
            if engine == "vllm" and not checkpoint_exists(arguments.checkpoint):
                raise SystemExit("vllm needs --checkpoint: write one with benchmarks/inflate.py")
            try:
                measured = ENGINES[engine](model, load, settings)
            except EngineMissingError as missing:
                console.print(f"[yellow]{engine} skipped: {missing}")
                continue
            row = row_of(f"{arguments.shape} {workload}", engine, settings, measured, arguments.device)
            results.append((label(row), measured))
            rows.append(row)
            release_memory()
            _write(arguments.json, rows)
        for name, share in equal_to_plain(results):
            console.print(f"{workload}: {share:.1%} of the tokens of {name} equal plain decoding's", soft_wrap=True)
    console.print(show(rows))


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Rows of this run, in place of earlier ones of the same workload, engine and settings."""
    if path is None:
        return
    earlier = json.loads(path.read_text()) if path.exists() else []
    names = ("workload", "engine", "settings")
    mine = [[row[name] for name in names] for row in rows]
    kept = [row for row in earlier if [row[name] for name in names] not in mine]
    path.write_text(json.dumps([*kept, *rows], indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ss.SparseSpecError as error:
        sys.exit(str(error))
