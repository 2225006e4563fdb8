"""What the engine costs on a CPU beside `model.generate` of transformers: same process, same model, float32, greedy.

    python benchmarks/cpu_overhead.py --json benchmarks/results/cpu-overhead.json

Models have the shape of small Llamas and random weights: what is measured is time, and no text is worth reading.
Random weights accept few drafts, so that drafts are a cost here: "plain" decodes without them, and "default" is what
users get who set nothing. HuggingFace runs with its default attention. Every call is made once beforehand. The
contestants then take turns, and a figure is the median of its rounds, so that a busy moment of the machine hits all
alike; a ratio is the median of the rounds' own ratios.

Cases: one prompt of 16,000 tokens and 64 new ones; 10 tokens and 300 new ones; 40 prompts of 8 to 200 tokens, 48 new
ones each, padded into one batch for HuggingFace.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsespec_compile as ss

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A Llama's shape."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Case:
    """Prompts of lengths from `shortest` to `longest`, evenly spread, and the new tokens of each."""

    prompts: int
    shortest: int
    longest: int
    new_tokens: int


SHAPES = {
    "tiny": Shape(256, 6, 8, 2, 704, 8192),
    "SmolLM2-135M": Shape(576, 30, 9, 3, 1536, 49152),
}
CASES = {
    "16,000 + 64": Case(1, 16_000, 16_000, 64),
    "10 + 300": Case(1, 10, 10, 300),
    "40 ragged x 48": Case(40, 8, 200, 48),
}
CONFIGS = {
    "plain": ss.SpecConfig(draft_tokens=0),
    "8 drafts": ss.SpecConfig(draft_tokens=8),
    "default": ss.SpecConfig(),
}
HUGGINGFACE = "HuggingFace"


def build_model(shape: Shape) -> PreTrainedModel:
    """A model of this shape with random weights, which never writes a stop token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def padded_prompts(case: Case, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Random prompts, padded on the left, and their mask: int64 [prompts, longest] both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (case.prompts, case.longest), generator=generator)
    lengths = torch.linspace(case.shortest, case.longest, case.prompts).int()
    mask = (torch.arange(case.longest) >= case.longest - lengths[:, None]).long()
    return ids * mask, mask


def rounds(calls: dict[str, Call], count: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of `count` rounds in which every call takes its turn, after one round that does not count; the texts."""
    texts = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds, texts


def measure(model: PreTrainedModel, case: Case, configs: dict[str, ss.SpecConfig], count: int) -> list[dict]:
    """A row for each contestant."""
    ids, mask = padded_prompts(case, model.config.vocab_size)
    arguments = {"attention_mask": mask, "max_new_tokens": case.new_tokens, "do_sample": False}
    calls: dict[str, Call] = {HUGGINGFACE: lambda: model.generate(ids, **arguments)}
    for name, config in configs.items():
        fast = ss.optimize(model, config)
        calls[name] = lambda fast=fast: fast.generate(ids, **arguments)
    seconds, texts = rounds(calls, count)
    theirs = seconds[HUGGINGFACE]
    return [
        {
            "engine": name,
            "median_s": round(statistics.median(taken), 4),
            "fastest_s": round(min(taken), 4),
            "times_huggingface": round(statistics.median(map(lambda a, b: a / b, taken, theirs)), 3),
            "equal_texts": f"{int((texts[name] == texts[HUGGINGFACE]).all(1).sum())} of {case.prompts}",
        }
        for name, taken in seconds.items()
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    configs = {name: CONFIGS[name] for name in arguments.configs}
    rows = []
    for shape in arguments.shapes:
        model = build_model(SHAPES[shape])
        for case in arguments.cases:
            measured = measure(model, CASES[case], configs, arguments.rounds)
            rows += [{"model": shape, "case": case} | row for row in measured]
            for row in rows[-len(measured) :]:
                print(*row.values(), sep="  ", flush=True)
    table = Table(*rows[0], title=f"float32, {arguments.threads} threads, median of {arguments.rounds} rounds")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if arguments.json:
        settings = {
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "shapes": {name: asdict(SHAPES[name]) for name in arguments.shapes},
            "cases": {name: asdict(CASES[name]) for name in arguments.cases},
        }
        result = {"environment": environment("cpu"), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
