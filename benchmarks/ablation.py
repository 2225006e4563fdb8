"""What each mechanism adds, one after the other, on the same prompts and seeds (the paper's ablation).

    python benchmarks/ablation.py --shape Qwen3-8B --requests 96 --max-requests 48 --max-new-tokens 2048 \
        --pool-tokens 49152 --json benchmarks/results/h200-ablation.json

From plain decoding with a host that waits: self-speculation with all requests in phase, balanced phases, few of them
(the default), a host that runs ahead, and a host tier that lets more requests run than the pool can hold. The last
stage has a pool that holds them all: what the host tier loses to moving them is what that one is faster. Prompts are
held-out puzzles, or, with --length, that much recorded reasoning each; texts end naturally. Reading the prompts is
inside the clock, compilation is not.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from countdown_model import held_out_prompts
from environment import environment, usable_device
from inflated_shape import PRESETS
from rich.console import Console
from rich.table import Table
from texts import common_share
from throughput import load_model
from throughput_ours import release_memory
from traces import recorded_traces
from transformers import PreTrainedModel

import sparsespec_compile as ss

STAGES: dict[str, dict[str, Any]] = {
    "plain": {"draft_tokens": 0, "overlap": False},
    "+ self-speculation, in phase": {"schedule": "in_phase", "overlap": False},
    "+ balanced phases": {"schedule": "balanced", "overlap": False},
    "+ in groups": {"overlap": False},
    "+ no wait": {},
    "+ host tier": {"host_tier": True},
    "pool for all": {"pool_tokens": None},
}

_STAGES = "which of them; texts are compared with those of the first"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="countdown", choices=["countdown", *PRESETS])
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=list(STAGES), help=_STAGES)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--max-requests", type=int, default=64)
    parser.add_argument("--length", type=int, default=0, help="tokens of recorded reasoning; 0 = held-out puzzles")
    parser.add_argument("--max-new-tokens", type=int, default=4096)
    parser.add_argument("--pool-tokens", type=int, default=131_072, help="of the KV pool, for all stages but the last")
    parser.add_argument("--host-pool-tokens", type=int, default=262_144, help="of host memory, for its stage")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def measure(
    model: PreTrainedModel, prompts: list[list[int]], stage: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[list[int]]]:
    """A stage's row, and its texts."""
    settings = dict(stage)
    host_tokens = arguments.host_pool_tokens if settings.pop("host_tier", False) else 0
    config = ss.SpecConfig(
        **{"pool_tokens": arguments.pool_tokens, "max_requests": arguments.max_requests, **settings},
        host_pool_tokens=host_tokens,
    )
    fast = ss.optimize(model, config)
    limits = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    sampling = [ss.SamplingParams(seed=i, **limits) for i in range(len(prompts))]
    short = [ss.SamplingParams(seed=i, **{**limits, "max_new_tokens": 32}) for i in range(len(prompts))]
    with fast.stream([prompt[:64] for prompt in prompts], short) as warm_up:
        for _ in warm_up:
            pass
    start = time.perf_counter()
    texts = [completion.token_ids for completion in fast.generate_batch(prompts, sampling, progress=True)]
    seconds = time.perf_counter() - start
    stats = fast.stats
    row = {
        "tokens": stats.tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(stats.tokens / seconds, 1),
        "iterations": stats.iterations,
        "ms_per_iteration": round(1e3 * seconds / stats.iterations, 3),
        "accepted_per_cycle": round(stats.accepted_per_cycle, 3) if stats.cycles else None,
        "waited_ms_per_iteration": round(1e3 * stats.waited_seconds / stats.iterations, 3),
        "host_ms_per_iteration": round(1e3 * stats.host_seconds / stats.iterations, 3),
        "pages_offloaded": stats.pages_offloaded,
    }
    return row, texts


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.shape, arguments.device)
    if arguments.length:
        prompts = recorded_traces(tokenizer, arguments.requests, arguments.length)
    else:
        batch = held_out_prompts(tokenizer, arguments.requests, arguments.device)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    rows: list[dict[str, Any]] = []
    plain: list[list[int]] = []
    for name in arguments.stage:
        row, texts = measure(model, prompts, STAGES[name], arguments)
        plain = plain or texts
        gain = row["tokens_per_second"] / rows[-1]["tokens_per_second"] if rows else 1.0
        rows.append({"stage": name, "gain": round(gain, 3), **row, "texts_equal": common_share(texts, plain)})
        release_memory()
        if arguments.json:
            settings = {name: value for name, value in vars(arguments).items() if name != "json"}
            result = {"environment": environment(arguments.device), "settings": settings, "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    shown = ("stage", "gain", "tokens_per_second", "ms_per_iteration", "accepted_per_cycle", "texts_equal")
    table = Table(*shown, title=f"{arguments.shape}: {arguments.requests} requests")
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    Console().print(table)


if __name__ == "__main__":
    main()
