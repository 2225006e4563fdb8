"""Thousands of short random texts through a pool that is too small: arrivals, cancellations and lengths at random.

    python benchmarks/soak.py --json benchmarks/results/cpu-soak.json

A tiny random model, so that the engine is what is tested. Texts of a sample are compared with the same texts generated
alone in a large pool. Afterwards every page and slot must be free, and memory must not have grown.
"""

import argparse
import gc
import json
import random
import resource
import time
from pathlib import Path

import torch
from environment import environment, usable_device
from rich.console import Console
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import sparsespec_compile as ss

VOCABULARY, LONGEST = 97, 96


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def tiny_model(device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval().to(device)


def random_request(rng: random.Random, number: int) -> tuple[list[int], ss.SamplingParams]:
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
    return prompt, ss.SamplingParams(
        max_new_tokens=rng.randint(1, LONGEST - len(prompt)),
        temperature=rng.choice([0.0, 0.8]),
        seed=number,
        stop_token_ids=[rng.randrange(VOCABULARY)],
    )


def soak(fast: ss.OptimizedModel, count: int, seed: int, sample_every: int) -> dict:
    """Run `count` random requests; what happened, and every `sample_every`-th text with its request."""
    rng = random.Random(seed)
    outcome = {"completed": 0, "cancelled": 0, "samples": [], "resident_mib": []}
    added, open_requests = 0, {}
    with fast.stream([]) as pieces, tqdm(total=count, unit="text") as bar:

        def arrive(most: int) -> None:
            nonlocal added
            for _ in range(min(most, count - added)):
                request = random_request(rng, added)
                (index,) = pieces.add([request[0]], request[1])
                open_requests[index] = request
                added += 1

        arrive(64)
        for piece in pieces:
            if piece.completion is not None:
                request = open_requests.pop(piece.index)
                outcome["completed"] += 1
                if piece.index % sample_every == 0:
                    outcome["samples"].append((request, piece.completion.token_ids))
                bar.update()
                if outcome["completed"] % max(1, count // 20) == 0:
                    gc.collect()
                    outcome["resident_mib"].append(resident_mib())
            if rng.random() < 0.01 and open_requests:
                index = rng.choice(list(open_requests))
                outcome["cancelled"] += len(pieces.cancel(index))
                open_requests.pop(index)
                bar.update()
            if len(open_requests) < 64:
                arrive(rng.randint(1, 8))  # at least one, so that the stream never runs dry before the end
    return outcome


def resident_mib() -> float:
    """Memory that this process holds now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def check(outcome: dict, count: int, model: Qwen3ForCausalLM) -> dict[str, bool]:
    """What must be true afterwards."""
    alone = ss.optimize(model, ss.SpecConfig(draft_tokens=0))
    samples = outcome["samples"]
    expected = [alone.generate_batch([prompt], params)[0].token_ids for (prompt, params), _ in samples]
    memory = outcome["resident_mib"]
    return {
        "every text came to its end": outcome["completed"] + outcome["cancelled"] == count,
        "sampled texts equal those generated alone": expected == [text for _, text in samples],
        "memory is flat (second half grows under 2%)": not memory or memory[-1] <= 1.02 * memory[len(memory) // 2],
    }


def main() -> None:
    arguments = parse_arguments()
    model = tiny_model(arguments.device)
    config = ss.SpecConfig(
        draft_tokens=4,
        min_budget=8,
        page_size=4,
        max_requests=arguments.slots,
        pool_tokens=arguments.slots * 16,
        host_pool_tokens=arguments.slots * LONGEST,
    )
    fast = ss.optimize(model, config)
    start = time.perf_counter()
    outcome = soak(fast, arguments.requests, arguments.seed, sample_every=max(1, arguments.requests // 200))
    seconds = time.perf_counter() - start
    checks = check(outcome, arguments.requests, model) | {"every page is free": fast.stats.pages_held == 0}
    result = {
        "environment": environment(arguments.device),
        "requests": arguments.requests,
        "completed": outcome["completed"],
        "cancelled": outcome["cancelled"],
        "texts_compared": len(outcome["samples"]),
        "pages_moved_to_host": fast.stats.pages_offloaded,
        "iterations": fast.stats.iterations,
        "resident_mib": [round(size, 1) for size in outcome["resident_mib"]],
        "seconds": round(seconds, 1),
        "checks": checks,
    }
    Console().print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if not all(checks.values()):
        raise SystemExit("a check failed")


if __name__ == "__main__":
    main()
