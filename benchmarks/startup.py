"""Seconds from `optimize` to the first token, with empty caches of compiled code and with those of the run before.

    python benchmarks/startup.py --shape Qwen3-8B --json benchmarks/results/h200-startup.json

Each start is a process of its own. Loading the model, which any engine has to, is outside the clock; with it and with
the imports, from the start of the process, it is `process_to_first_token_seconds`. Other work on the machine's
processors makes both longer: run it by itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import environment, usable_device
from inflated_shape import PRESETS
from rich.console import Console
from rich.table import Table
from throughput import load_model, settings
from traces import recorded_traces

import sparsespec_compile as ss

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
"""Of compiled code, and of measured ceilings."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument(
        "--settings", type=settings, default={}, help="of SpecConfig: default, or name=value,name=value"
    )
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--once", action="store_true", help="start here, and print the seconds as JSON")
    return parser.parse_args()


def start(arguments: argparse.Namespace) -> dict[str, float]:
    """Optimize and generate in this process; `first_token_at` is a time, not seconds."""
    model, tokenizer = load_model(arguments.shape, arguments.device)
    prompts = recorded_traces(tokenizer, arguments.requests, 256)
    began = time.perf_counter()
    fast = ss.optimize(model, ss.SpecConfig(**arguments.settings))
    optimized = time.perf_counter()
    with fast.stream(prompts, ss.SamplingParams(max_new_tokens=64, stop_token_ids=())) as pieces:
        next(pieces)
        first, first_at = time.perf_counter(), time.time()
        for _ in pieces:
            pass
    return {
        "optimize_seconds": round(optimized - began, 2),
        "to_first_token_seconds": round(first - began, 2),
        "to_last_token_seconds": round(time.perf_counter() - began, 2),
        "first_token_at": first_at,
    }


def start_apart(caches: Path) -> dict[str, float]:
    """The same in a process of its own, with compiled code kept in `caches`."""
    places = {name: str(caches / name.lower()) for name in CACHES}
    command = [sys.executable, *sys.argv, "--once"]
    began = time.time()
    done = subprocess.run(command, env=os.environ | places, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    whole = round(seconds.pop("first_token_at") - began, 2)
    return {**seconds, "process_to_first_token_seconds": whole}


def main() -> None:
    arguments = parse_arguments()
    if arguments.once:
        print(json.dumps(start(arguments)))
        return
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"caches": caches, **start_apart(Path(folder))} for caches in ("empty", "filled")]
    table = Table(*rows[0], title=f"{arguments.shape}, {arguments.requests} requests")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if arguments.json:
        asked = {"shape": arguments.shape, "requests": arguments.requests, **arguments.settings}
        where = environment(arguments.device) | {"cpus": os.cpu_count(), "load_average": round(load_average, 2)}
        result = {"environment": where, "settings": asked, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
