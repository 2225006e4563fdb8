"""Generates one text with sparse self-speculation, and the same text without, and compares the two.

Without arguments it lets the embedded Countdown model solve a puzzle, offline and on a CPU. With `--model` it takes any
causal LM that `AutoModelForCausalLM` loads.
"""

import argparse
import time
from pathlib import Path
from typing import get_args

import torch
from countdown.device import usable_device
from countdown.puzzles import check_answer, puzzles
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

import sparsespec_compile as ss
from sparsespec_compile.config import Drafter, DraftWeights

COUNTDOWN = Path(__file__).parent / "countdown" / "model"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(COUNTDOWN), help="folder or hub id")
    parser.add_argument("--prompt", help="text to continue; default: a Countdown puzzle")
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--draft-tokens", type=number_or_auto, default=8, help="of a cycle, or auto")
    parser.add_argument("--drafter", default="pillar", choices=get_args(Drafter))
    parser.add_argument("--draft-weights", default="auto", choices=get_args(DraftWeights))
    parser.add_argument("--min-budget", type=int, default=128)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def number_or_auto(text: str) -> int | str:
    """The value of --draft-tokens."""
    return text if text == "auto" else int(text)


def generate(
    model: PreTrainedModel, config: ss.SpecConfig, input_ids: torch.Tensor, streamer: TextStreamer | None, **settings
) -> tuple[torch.Tensor, ss.Stats, float]:
    """The text, what speculation achieved, and the seconds it took; compilation and a first short text stay outside."""
    fast = ss.optimize(model, config)
    fast.generate(input_ids, **{**settings, "max_new_tokens": min(32, settings["max_new_tokens"])})
    start = time.perf_counter()
    output = fast.generate(input_ids, streamer=streamer, **settings)
    return output, fast.stats, time.perf_counter() - start


def summary(stats: ss.Stats, seconds: float, plain_seconds: float, config: ss.SpecConfig) -> Table:
    chosen = "drafts as auto chose them" if "auto" in (config.drafter, config.draft_tokens) else config.drafter
    table = Table(title=f"{chosen}, {config.draft_weights} draft weights", show_header=False)
    table.add_row("tokens", f"{stats.tokens:,}")
    if stats.cycles:
        table.add_row(f"accepted of {stats.drafts_per_cycle:.3g} drafts", f"{stats.accepted_per_cycle:.2f}")
    for (drafter, drafts), count in stats.iterations_by_cycle.most_common(
        3 if len(stats.iterations_by_cycle) > 1 else 0
    ):
        name = f"{drafts} {drafter} drafts" if drafts else "plain decoding"
        table.add_row(f"iterations with {name}", f"{count / stats.iterations:.0%}")
    table.add_row("full-attention passes saved", f"{1 - stats.target_passes / stats.tokens:.1%}")
    table.add_row("KV bytes read, of plain decoding's", f"{stats.kv_bytes_share:.1%}")
    table.add_row("time, and plain decoding's in this engine", f"{seconds:.1f} s, {plain_seconds:.1f} s")
    return table


def main() -> None:
    arguments = parse_arguments()
    try:
        run(arguments, Console())
    except ss.SparseSpecError as error:
        raise SystemExit(str(error)) from error


def run(arguments: argparse.Namespace, console: Console) -> None:
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    own_puzzle = arguments.model == str(COUNTDOWN) and arguments.prompt is None
    prompt = next(puzzles(arguments.seed, held_out=True)).prompt if own_puzzle else arguments.prompt
    if prompt is None:
        raise SystemExit("--model needs a --prompt; puzzles are for the embedded model alone")
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(arguments.device)
    settings = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature != 0}
    if arguments.temperature != 0:
        settings |= {"temperature": arguments.temperature, "top_k": 0, "seed": arguments.seed}

    config = ss.SpecConfig(
        draft_tokens=arguments.draft_tokens,
        drafter=arguments.drafter,
        draft_weights=arguments.draft_weights,
        min_budget=arguments.min_budget,
    )
    output, stats, seconds = generate(model, config, input_ids, TextStreamer(tokenizer), **settings)
    console.print("\nThe same once more, token by token ...")
    plain, _, plain_seconds = generate(model, ss.SpecConfig(draft_tokens=0), input_ids, None, **settings)

    text = tokenizer.decode(output[0])
    if own_puzzle:
        verdict = check_answer(text)
        console.print(f"answer: {'[green]' if verdict.correct else '[red]'}{verdict.reason}")
    same = torch.equal(output, plain)
    console.print(f"text equals plain decoding's: {'[green]yes' if same else '[red]no'}")
    console.print(summary(stats, seconds, plain_seconds, config))
    if arguments.device == "cpu":
        console.print("On a CPU arithmetic sets the speed, not the cache: what counts are passes and bytes.")


if __name__ == "__main__":
    main()
