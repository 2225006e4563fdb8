"""Lets the model solve held-out puzzles and writes what it reached.

python -m examples.countdown.evaluate --json benchmarks/results/h200-countdown-eval.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, Qwen3ForCausalLM

from .decode import sample
from .hard_puzzles import load_hard_puzzles
from .puzzles import Puzzle, check_answer, puzzles
from .tokenizer import CONTEXT

MODEL = Path(__file__).with_name("model")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--puzzles", type=int, default=500, help="held-out puzzles to solve")
    parser.add_argument("--hard", type=int, default=50, help="puzzles of hard_puzzles.json to solve besides")
    parser.add_argument("--limit", type=int, default=CONTEXT, help="tokens of a trace, prompt included")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=1, help="of the puzzles and of the sampling")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def summary(asked: list[Puzzle], texts: list[str], lengths: list[int]) -> dict[str, Any]:
    """Share solved, and how long the traces are: tokens with the prompt, unfinished ones counted in full."""
    verdicts = [check_answer(text) for text in texts]
    solved = [verdict.correct for verdict in verdicts]
    by_size = {
        size: [right for right, puzzle in zip(solved, asked, strict=True) if len(puzzle.numbers) == size]
        for size in sorted({len(puzzle.numbers) for puzzle in asked})
    }
    reasons = [verdict.reason.split(" ")[0] for verdict in verdicts if not verdict.correct]
    return {
        "puzzles": len(asked),
        "solved": sum(solved),
        "solve_rate": round(sum(solved) / len(solved), 4),
        "solve_rate_by_numbers": {size: round(sum(part) / len(part), 4) for size, part in by_size.items()},
        "no_answer": reasons.count("no"),
        "wrong_answer": len(reasons) - reasons.count("no"),
        "tokens": sum(lengths),
        "mean_length": round(statistics.fmean(lengths), 1),
        "mean_length_solved": round(
            statistics.fmean([n for n, right in zip(lengths, solved, strict=True) if right] or [0]), 1
        ),
        "median_length": statistics.median(lengths),
        "over_4000": sum(length > 4000 for length in lengths),
        "over_12000": sum(length > 12000 for length in lengths),
        "solved_over_12000": sum(length > 12000 for length, right in zip(lengths, solved, strict=True) if right),
        "lengths": lengths,
    }


def solve(args: argparse.Namespace, model: Qwen3ForCausalLM, sets: dict[str, list[Puzzle]]) -> dict[str, Any]:
    """Samples a trace for every puzzle, all sets together, and checks the answers."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = [puzzle for chosen in sets.values() for puzzle in chosen]
    start = time.perf_counter()
    traces = sample(model, tokenizer([p.prompt for p in asked])["input_ids"], args.limit, args.temperature, args.seed)
    results: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    remaining = iter(traces)
    for name, chosen in sets.items():
        part = list(islice(remaining, len(chosen)))
        texts = tokenizer.batch_decode(part, skip_special_tokens=True)
        results[name] = summary(chosen, texts, [len(trace) for trace in part])
    return results


def main() -> None:
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Qwen3ForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    torch.nn.Module.to(model, device)
    model.eval()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "temperature": args.temperature,
        "limit": args.limit,
        "seed": args.seed,
    }
    sets = {"held_out": list(islice(puzzles(args.seed, held_out=True), args.puzzles))}
    if args.hard:
        sets["hard"] = load_hard_puzzles()[: args.hard]
    results.update(solve(args, model, sets))
    print(results["seconds"], "s")
    for name in sets:
        print(name, json.dumps({key: value for key, value in results[name].items() if key != "lengths"}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
