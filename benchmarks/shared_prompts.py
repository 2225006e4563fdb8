"""What prompts that begin alike save: several samples of a prompt, and the turns of chats.

    python benchmarks/shared_prompts.py --shape Qwen3-8B --json benchmarks/results/h200-shared-prompts.json

**Samples.** Seconds from the call until every text has its first token, for `--samples` samples of one prompt, beside
as many different prompts of the same length. Median of `--runs`, fresh prompts each time.

**Chats.** Each turn's prompt is all of the chat so far, and some tokens more. What counts is the share of the prompts'
tokens that were found in the KV pool, over all turns but the first, and the seconds to the first token with and without
`prefix_caching`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import environment, usable_device
from inflated_shape import PRESETS
from rich.console import Console
from rich.table import Table
from throughput import load_model
from traces import recorded_traces

import sparsespec_compile as ss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen3-8B", choices=["countdown", *PRESETS])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that is sampled")
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--said", type=int, default=100, help="tokens that each turn adds to a prompt")
    parser.add_argument("--answer", type=int, default=200, help="new tokens of each turn")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def first_tokens(fast: ss.OptimizedModel, prompts: Sequence[list[int]], samples: int) -> float:
    """Seconds until each of so many samples of each prompt has its first token."""
    sampling = ss.SamplingParams(max_new_tokens=2, temperature=0.6, n=samples, stop_token_ids=())
    began = time.perf_counter()
    with fast.stream(prompts, sampling) as pieces:
        waiting = {(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)}
        for piece in pieces:
            waiting.discard((piece.index, piece.sample))
            if not waiting:
                return time.perf_counter() - began
    raise RuntimeError(f"{len(waiting)} samples ended without a token.")


def measure_samples(fast: ss.OptimizedModel, traces: list[list[int]], samples: int, runs: int) -> dict[str, Any]:
    """`traces`: runs * (samples + 1) prompts, and as many for a run before."""
    seconds: dict[str, list[float]] = {"one prompt": [], "different prompts": []}
    left = iter(traces)
    for _ in range(runs + 1):
        seconds["one prompt"].append(first_tokens(fast, [next(left)], samples))
        seconds["different prompts"].append(first_tokens(fast, [next(left) for _ in range(samples)], 1))
    one, different = (statistics.median(times[1:]) for times in seconds.values())
    return {
        "samples": samples,
        "prompt": len(traces[0]),
        "one_prompt_seconds": one,
        "different_prompts_seconds": different,
        "share": one / different,
    }


def measure_chats(fast: ss.OptimizedModel, texts: list[list[int]], turns: int, said: int, answer: int) -> dict:
    """`texts`: what each chat says, turns * said tokens at least."""
    chats: list[list[int]] = [[] for _ in texts]
    found = asked = 0
    seconds = []
    sampling = ss.SamplingParams(max_new_tokens=answer, temperature=0.6, stop_token_ids=())
    for turn in range(turns):
        for chat, text in zip(chats, texts, strict=True):
            chat += text[turn * said : (turn + 1) * said]
        answers = fast.generate_batch(chats, sampling)
        if turn:
            asked += sum(map(len, chats))
            found += fast.stats.cached_tokens
            seconds.append(statistics.median(one.stats.first_token_seconds for one in answers))
        for chat, one in zip(chats, answers, strict=True):
            chat += one.token_ids
    return {
        "chats": len(texts),
        "turns": turns,
        "said": said,
        "answer": answer,
        "found_share": found / asked,
        "first_token_seconds": statistics.median(seconds),
    }


def measure(fast: ss.OptimizedModel, plain: ss.OptimizedModel, tokenizer: Any, arguments: argparse.Namespace) -> dict:
    """All of it; `plain`: the same model without prefix caching."""
    count = (arguments.runs + 1) * (arguments.samples + 1)
    samples = measure_samples(
        fast, recorded_traces(tokenizer, count, arguments.prompt), arguments.samples, arguments.runs
    )
    texts = recorded_traces(tokenizer, arguments.chats, arguments.turns * arguments.said, seed=2)
    chats = {
        name: measure_chats(one, texts, arguments.turns, arguments.said, arguments.answer)
        for name, one in (("shared", fast), ("not shared", plain))
    }
    return {"environment": environment(arguments.device), "samples": samples, "chats": chats}


def show(result: dict) -> Table:
    samples, chats = result["samples"], result["chats"]
    table = Table("", "with shared pages", "without")
    seconds = (samples["one_prompt_seconds"], samples["different_prompts_seconds"])
    name = f"{samples['samples']} samples of {samples['prompt']:,} tokens: s to the first tokens"
    table.add_row(name, *(f"{one:.3f}" for one in seconds))
    name = f"{chats['shared']['chats']} chats of {chats['shared']['turns']} turns: prompt tokens found"
    table.add_row(name, *(f"{chats[one]['found_share']:.1%}" for one in ("shared", "not shared")))
    times = (chats[one]["first_token_seconds"] for one in ("shared", "not shared"))
    table.add_row("the same: s to the first token, median", *(f"{one:.3f}" for one in times))
    return table


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.shape, arguments.device)
    sizes = {"max_requests": max(arguments.samples, arguments.chats), "prefill_chunk": 8192}
    fast, plain = (
        ss.optimize(model, ss.SpecConfig(**sizes, prefix_caching=shared, memory_fraction=0.4))
        for shared in (True, False)
    )
    result = measure(fast, plain, tokenizer, arguments)
    Console().print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
