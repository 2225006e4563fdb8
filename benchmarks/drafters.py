"""How many drafts each drafter gets accepted on real reasoning, and what share of the KV cache it reads for that.

    python benchmarks/drafters.py --json benchmarks/results/h200-drafters.json

The embedded Countdown model solves the same held-out puzzles with the same seeds for every drafter, every budget and
for plain decoding, in float32. Each row counts the texts that equal plain decoding's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from countdown_model import held_out_prompts, load
from environment import environment, usable_device
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import sparsespec_compile as ss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=4096)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[64, 128], help="min_budget, beside 5%% of the length"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def configurations(arguments: argparse.Namespace) -> list[ss.SpecConfig]:
    """Plain decoding, full drafting, then window, the paper's pillar and this project's pillar at each budget."""
    common = {"draft_tokens": arguments.draft_tokens, "max_requests": arguments.puzzles}
    sparse = [
        ss.SpecConfig(**common, min_budget=budget, **policy)
        for budget in arguments.budgets
        for policy in ({"drafter": "window"}, {"drafter": "pillar", "local_ratio": 0.0}, {"drafter": "pillar"})
    ]
    plain = ss.SpecConfig(draft_tokens=0, max_requests=arguments.puzzles)
    return [plain, ss.SpecConfig(**common, drafter="full"), *sparse]


def measure(model, prompts: dict[str, Tensor], config: ss.SpecConfig, settings: dict[str, Any]) -> tuple[dict, Tensor]:
    """One row of the result, and the texts."""
    fast = ss.optimize(model, config)
    fast.generate(**prompts, **{**settings, "max_new_tokens": 32})  # compiles
    start = time.perf_counter()
    texts = fast.generate(**prompts, **settings)
    seconds = time.perf_counter() - start
    stats = fast.stats
    row = {
        "drafter": config.drafter if config.draft_tokens else "none",
        "draft_tokens": config.draft_tokens,
        "min_budget": config.min_budget if config.draft_tokens and config.drafter != "full" else None,
        "local_ratio": config.local_ratio if config.draft_tokens and config.drafter == "pillar" else None,
        "requests": len(texts),
        "tokens": stats.tokens,
        "cycles": stats.cycles,
        "accepted_per_cycle": round(stats.accepted_per_cycle, 3) if stats.cycles else None,
        "accepted_by_position": [round(share, 4) for share in stats.accepted_by_position],
        "tokens_per_target_pass": round(stats.tokens_per_target_pass, 3),
        "kv_bytes_share": round(stats.kv_bytes_share, 4),
        "iterations": stats.iterations,
        "seconds": round(seconds, 2),
    }
    return row, texts


def equal_texts(texts: Tensor, plain: Tensor) -> int:
    """Rows that are equal but for the padding behind them, which is 0."""
    width = max(texts.shape[1], plain.shape[1])
    padded = [torch.nn.functional.pad(rows, (0, width - rows.shape[1])) for rows in (texts, plain)]
    return int((padded[0] == padded[1]).all(dim=1).sum())


HEADINGS = ("drafter", "budget", "accepted", "tokens per target pass", "KV bytes read", "texts equal to plain")


def cells(row: dict) -> tuple[str, ...]:
    """A row of the result as text, under `HEADINGS`."""
    sparse = row["min_budget"] is not None
    return (
        row["drafter"] + (", all by score (paper)" if row["local_ratio"] == 0 else ""),
        f"max({row['min_budget']}, 5%)" if sparse else "-",
        f"{row['accepted_per_cycle']:.2f}" if row["cycles"] else "-",
        f"{row['tokens_per_target_pass']:.2f}",
        f"{row['kv_bytes_share']:.1%}",
        f"{row['texts_equal_to_plain']} of {row['requests']}",
    )


def markdown(rows: list[dict]) -> str:
    """The result as the table that the README shows."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(rows: list[dict]) -> Table:
    table = Table(*HEADINGS, title="drafting on the Countdown model")
    for row in rows:
        table.add_row(*cells(row))
    return table


def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load(arguments.device, torch.float32)
    prompts = held_out_prompts(tokenizer, arguments.puzzles, arguments.device)
    settings = {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": True,
        "temperature": arguments.temperature,
        "top_k": 0,
        "seed": arguments.seed,
    }
    rows, all_texts = [], []
    for config in tqdm(configurations(arguments), desc="configurations"):
        row, texts = measure(model, prompts, config, settings)
        rows.append(row)
        all_texts.append(texts)
    for row, texts in zip(rows, all_texts, strict=True):
        row["texts_equal_to_plain"] = equal_texts(texts, all_texts[0])
    Console().print(show(rows))
    if arguments.json:
        settings |= {"puzzles": arguments.puzzles, "dtype": "float32"}
        result = {"environment": environment(arguments.device), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
