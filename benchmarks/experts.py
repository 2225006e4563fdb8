"""Times a layer of experts beside its bytes and transformers' grouped products: Qwen3-30B-A3B's shape, and others.

    python benchmarks/experts.py              # the table and results/<gpu>-experts.json
    python benchmarks/experts.py --tiles      # also other tiles than those that are shipped

Each call is a part of a CUDA graph and finds its weights in no cache. Bytes are those of the experts that the rows
have chosen, each counted once. Choices are even: of each row the experts with the highest of random numbers.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sparsespec_compile.kernels.launch import device_limits
from sparsespec_compile.kernels.ops import ExpertsCall, ExpertsSettings, experts
from sparsespec_compile.kernels.products.experts import Tile, tile_for
from sparsespec_compile.kernels.products.experts import experts as launch
from sparsespec_compile.kernels.tuning.measure import replay_ms

RESULTS = Path(__file__).parent / "results"
READ_CEILING = 4.3e12
SHAPES = {
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "OLMoE-1B-7B": (64, 8, 2048, 1024),
}
"""Experts, choices of a row, width, hidden values."""

ROWS = (1, 4, 16, 64, 128, 256, 1024)
LAYERS = 2
"""Copies of the weights that calls take in turn: even one is larger than the L2 cache."""

console = Console(width=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="time tiles other than those that are shipped, too")
    tiles = parser.parse_args().tiles
    found = [each for name in SHAPES for each in _shape(name, tiles)]
    table = Table("shape", "rows", "experts read", "bytes alone, us", "ours, us", "of bytes", "grouped_mm, us", "error")
    for each in found:
        us = each["us"]
        numbers = (f"{each['floor_us']:.1f}", f"{us['ours']:.1f}", f"{each['floor_us'] / us['ours']:.0%}")
        table.add_row(each["shape"], str(each["rows"]), str(each["read"]), *numbers,
                      f"{us['grouped_mm']:.1f}", f"{each['error']:.2%}")  # fmt: skip
    console.print(table)
    path = RESULTS / f"{torch.cuda.get_device_name().split()[-1].lower()}-experts.json"
    path.write_text(json.dumps({"environment": environment("cuda"), "experts": found}, indent=1) + "\n")
    console.print(f"wrote {path}")


def _shape(name: str, tiles: bool) -> Iterator[dict]:
    count, chosen, width, inner = SHAPES[name]
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    layers = [(draw(count, 2 * inner, width) * 0.02, draw(count, width, inner) * 0.02) for _ in range(LAYERS)]
    for rows in ROWS:
        x, weight = draw(rows, width), torch.rand(rows, chosen, device="cuda")
        index = torch.rand(rows, count, device="cuda").topk(chosen, dim=1).indices
        calls = [ExpertsCall(x, index, weight, *layer, None, None, ExpertsSettings("silu")) for layer in layers]
        read = len(index.unique())
        theirs = [partial(ALL_EXPERTS_FUNCTIONS["grouped_mm"], _module(*layer), x, index, weight) for layer in layers]
        expected = theirs[0]().double()
        error = float((experts(*calls[0].arguments()).double() - expected).norm() / expected.norm())
        us = {
            "ours": replay_ms([partial(experts, *call.arguments()) for call in calls]) * 1e3,
            "grouped_mm": replay_ms(theirs) * 1e3,
        }
        tried = [] if not tiles else sorted(_tried(calls, rows * chosen, count), key=lambda one: one["us"])[:6]
        for one in tried:
            console.print(name, rows, one, f"shipped {us['ours']:.1f}")
        floor = read * 3 * width * inner * 2 / READ_CEILING * 1e6
        yield {"shape": name, "rows": rows, "read": read, "floor_us": floor, "us": us, "error": error, "tiles": tried}


def _module(gate_up: torch.Tensor, down: torch.Tensor) -> SimpleNamespace:
    """What transformers' function reads of a layer of experts."""

    def gate(projected: torch.Tensor) -> torch.Tensor:
        first, second = projected.chunk(2, dim=-1)
        return functional.silu(first) * second

    flags = dict.fromkeys(("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"), False)
    return SimpleNamespace(
        gate_up_proj=gate_up, down_proj=down, num_experts=len(down), has_gate=True, _apply_gate=gate, **flags
    )


def _tried(calls: list[ExpertsCall], pairs: int, count: int) -> Iterator[dict]:
    """Other tiles, of both products alike but for the columns, of which gate and up are two matrices."""
    rows = tile_for(pairs, count, 2, torch.bfloat16, device_limits(calls[0].x.device)).rows
    for height in sorted({16, rows, min(128, 2 * rows)}):
        for columns in (32, 64):
            for inner in (64, 128):
                for stages in (3, 4, 5):
                    tile = Tile(height, columns, inner, 4, stages)
                    if tile.shared_bytes(2, 2) > 200 * 1024:
                        continue
                    both = tile, Tile(height, 2 * columns, inner, 4, stages)
                    timed = [partial(launch, *call.arguments(), tiles=both) for call in calls]
                    yield {"us": round(replay_ms(timed, 9) * 1e3, 2), "tile": asdict(tile)}


if __name__ == "__main__":
    main()
