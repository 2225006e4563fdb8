"""Times products with 8-bit weights on the shapes of Qwen3-8B, beside their bytes, bfloat16's and torch's own in fp8.

    python benchmarks/products.py             # the table and results/<gpu>-products.json
    python benchmarks/products.py --tiles     # also every tile worth trying, compiled by all processors first

Each call is a part of a CUDA graph and finds its weight in no cache. A layer is its four products one after the other.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from environment import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsespec_compile.kernels import launch
from sparsespec_compile.kernels.launch import device_limits
from sparsespec_compile.kernels.ops import QUANTISED_DTYPES, quantise_rows, quantised_product
from sparsespec_compile.kernels.products import quantised
from sparsespec_compile.kernels.products.quantised import Tile, tile_for
from sparsespec_compile.kernels.tuning.measure import replay_ms

RESULTS = Path(__file__).parent / "results"
READ_CEILING = 4.3e12
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "head": (151936, 4096),
}
LAYER = ("qkv", "o", "gate_up", "down")
ROWS = (2, 16, 64, 128, 256)
TILED_ROWS = (2, 64, 128)
FRESH_BYTES = 500_000_000
SHARED_BYTES = 220 * 1024

console = Console(width=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="time tiles other than those that are shipped, too")
    tiles = parser.parse_args().tiles
    if tiles:
        launch.CAPTURED_CALLS = 2**16
        _compile_all()
    found = [_measure(name, rows, tiles) for name in SHAPES for rows in ROWS]
    table = Table("product", "rows", "bytes alone", "int8", "fp8", "bfloat16", "torch's fp8", "error int8", "error fp8")
    for each in found:
        times = (f"{each['us'][kind]:.1f}" for kind in ("int8", "fp8", "bfloat16", "scaled_mm"))
        errors = (f"{each['error'][kind]:.2%}" for kind in ("int8", "fp8"))
        table.add_row(each["product"], str(each["rows"]), f"{each['floor_us']:.1f}", *times, *errors)
    console.print(table)
    layers = [_layer(found, rows) for rows in ROWS]
    for layer in layers:
        console.print(layer)
    path = RESULTS / f"{torch.cuda.get_device_name().split()[-1].lower()}-products.json"
    path.write_text(
        json.dumps({"environment": environment("cuda"), "layers": layers, "products": found}, indent=1) + "\n"
    )
    console.print(f"wrote {path}; quantising all of a layer's weights: {_quantising_us():.0f} us")


def _layer(found: list[dict], rows: int) -> dict:
    """The four products of a layer, and their share of the read ceiling."""
    parts = [each for each in found if each["product"] in LAYER and each["rows"] == rows]
    floor = sum(each["floor_us"] for each in parts)
    us = {kind: sum(each["us"][kind] for each in parts) for kind in parts[0]["us"]}
    return {"rows": rows, "floor_us": floor, "us": us, "share_int8": floor / us["int8"]}


def _measure(name: str, rows: int, tiles: bool) -> dict:
    columns, inner = SHAPES[name]
    copies = max(2, -(-FRESH_BYTES // (columns * inner)))
    exact = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16) * 0.02
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    expected = (x.double() @ exact.double().T) if columns < 100_000 else (x.float() @ exact.float().T).double()
    us, error, tried = {}, {}, []
    for kind, dtype in QUANTISED_DTYPES.items():
        weights = torch.empty(copies, columns, inner, dtype=torch.int8, device="cuda").view(dtype)
        scale = torch.empty(columns, device="cuda")
        quantise_rows(exact, kind, weights[0], scale)
        weights.view(torch.int8)[1:] = weights.view(torch.int8)[0]
        calls = [partial(quantised_product, x, weight, scale) for weight in weights]
        error[kind] = float((calls[0]().double() - expected).norm() / expected.norm())
        us[kind] = _us(calls)
        if kind == "fp8":
            us["scaled_mm"] = _us([partial(_scaled_mm, x.to(dtype), weight) for weight in weights])
        elif tiles and rows in TILED_ROWS:
            tried = [(_us([partial(quantised.quantised_product, x, w, scale, tile) for w in weights], 7), tile)
                     for tile in _tiles(name, rows)]  # fmt: skip
    del weights
    copies = max(1, copies // 2)
    us["bfloat16"] = _us([partial(torch.nn.functional.linear, x, exact.clone()) for _ in range(copies)])
    tried.sort(key=lambda pair: pair[0])
    for time, tile in tried[:6]:
        console.print(f"{name} {rows}: {time:.2f} us (shipped {us['int8']:.2f})", tile)
    shipped = tile_for(rows, columns, inner // 2, x.dtype, device_limits(x.device))
    return {
        "product": name,
        "rows": rows,
        "floor_us": columns * inner / READ_CEILING * 1e6,
        "us": us,
        "error": error,
        "tile": asdict(shipped),
        "tiles": [{"us": round(time, 2), **asdict(tile)} for time, tile in tried],
    }


def _scaled_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Torch's product in fp8, which takes 16 rows at least; scales of 1, as others slow it down."""
    rows = (
        torch.nn.functional.pad(x.view(torch.int8), (0, 0, 0, max(0, 16 - len(x)))).view(x.dtype) if len(x) < 16 else x
    )
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _us(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    return replay_ms(calls, repeats, 2) * 1e3


def _quantising_us() -> float:
    """The four weights of a layer, one after the other."""
    calls = []
    for columns, inner in (SHAPES[name] for name in LAYER):
        weight = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
        made = torch.empty(columns, inner, dtype=torch.int8, device="cuda"), torch.empty(columns, device="cuda")
        calls.append(partial(quantise_rows, weight, "int8", *made))
    return _us(calls) * len(calls)


def _tiles(name: str, rows: int) -> Iterator[Tile]:
    columns, inner = SHAPES[name]
    height = max(16, min(rows, 128))
    for wide in (64, 128):
        for pairs in (64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4, 5, 6, 8):
                    shared = stages * pairs * (2 * wide + 4 * height)
                    for parts in (1, 2, 3, 4, 6, 8):
                        programs = -(-columns // wide) * parts
                        split = inner // 2 % (parts * pairs) == 0
                        balanced = programs >= 90 and (parts == 1 or programs <= 600)
                        if shared <= SHARED_BYTES and shared >= 24 * 1024 and split and balanced:
                            yield Tile(height, wide, pairs, parts, warps, stages)


def _compile_all() -> None:
    """Compile the kernels of all tiles in as many processes as there are processors; Triton keeps them on disk."""
    jobs = {(SHAPES[name][1], rows, tile) for name in SHAPES for rows in TILED_ROWS for tile in _tiles(name, rows)}
    processes = os.cpu_count() or 1
    shares = [sorted(jobs, key=str)[i :: 4 * processes] for i in range(4 * processes)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, shares))
    console.print(f"{len(jobs)} kernels compiled")


def _compile(jobs: list[tuple[int, int, Tile]]) -> None:
    for inner, rows, tile in jobs:
        weight, scale = torch.zeros(128, inner, dtype=torch.int8, device="cuda"), torch.zeros(128, device="cuda")
        x = torch.zeros(rows, inner, dtype=torch.bfloat16, device="cuda")
        quantised.quantised_product(x, weight, scale, tile)


if __name__ == "__main__":
    main()
