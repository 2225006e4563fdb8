"""Tile sizes of the attention kernel: what they mean, and which a launch takes.

They are those measured on this device, those shipped for a device like it, or defaults that work for any layer and
device. The choice is made from shapes alone and stays the same within a process, so that captured steps never measure
anything and equal calls give equal bits. ``python -m sparsespec_compile.kernels.tuning`` measures, and writes the
user's file.
"""

import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from ..errors import TuningCacheWarning
from ..launch import DeviceLimits, StepKind
from ..ops import SCORED_PAIRS

_REGISTERS = 65536
"""Of a multiprocessor, on all NVIDIA GPUs from Ampere on."""

SMALL_JOIN_M, BIG_JOIN_M = 4, 16
"""Pairs of small and of large tiles that are joined at a time: those of a row, and as few as warps can share."""

_REGISTERS_OF_PARTS = 64
"""Of a thread, for parts that it joins."""

_RESERVED = 1024
"""Bytes of shared memory that a device takes for each program."""

_EXCHANGES = 4096
"""Bytes that the compiler takes for exchanges between threads beside the tiles, about."""


@dataclass(frozen=True)
class Layer:
    """The properties of an attention layer that decide on its tiles."""

    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    page_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes that key and value of a token take in shared memory."""
        return (padded(self.key_dim) + padded(self.value_dim)) * self.dtype.itemsize


@dataclass(frozen=True)
class Tiling:
    """How a launch is divided into tiles and programs.

    Attributes:
        big_m: (row, query head) pairs of a tile of verifying or prefilling rows, a power of two; what fits one takes a
            tile of 16 pairs, or of a group if that is larger.
        block_n: keys of a block of small tiles, a power of two; work is shared out in such blocks.
        big_n: keys that a large tile takes at a time, a power of two up to block_n.
        num_warps: warps of a program.
        small_ahead: blocks of keys and values that are on their way at a time, for tiles of drafts and plain decoding.
        big_ahead: the same for large tiles.
        scored_ahead: the same for large tiles that give out scores, which take block_n keys at a time; 0 = no tile
            does, scores take passes of their own, and the kernel is smaller and parks less outside its registers.
        programs_per_sm: programs that share a multiprocessor.
        unit_overhead: what starting a tile with a KV head costs, in blocks of keys.
        scored_overhead: its further cost where scores are returned.
        part_cost: what joining one more part of a unit costs, in sixteenths of a block.
    """

    big_m: int
    block_n: int
    big_n: int
    num_warps: int
    small_ahead: int
    big_ahead: int
    scored_ahead: int
    programs_per_sm: int
    unit_overhead: int = 4
    scored_overhead: int = 12
    part_cost: int = 24

    @property
    def registers(self) -> int | None:
        """Most registers of a thread with which so many programs fit a multiprocessor; None if any number does."""
        share = _REGISTERS // (32 * self.num_warps * self.programs_per_sm)
        return share // 8 * 8 if share < 255 else None


def small_tile(group: int) -> int:
    """Pairs of a draft's tile: a row's query heads of a KV head, or what a product on tensor cores takes at least."""
    return padded(group)


def default_tiling(layer: Layer, kind: StepKind, limits: DeviceLimits) -> Tiling:
    """Tiles within the registers of a program and the shared memory of a multiprocessor."""
    # Tiles of others take more registers than a thread of two warps has.
    light = layer.dtype != torch.float32 and small_tile(layer.group) == 16 and layer.token_bytes <= 1024
    tiling = (
        _for_small_tiles(layer, limits) if kind is StepKind.SMALL_TILES and light else _for_any(layer, kind, limits)
    )
    return replace(tiling, scored_ahead=0) if kind in (StepKind.SMALL_TILES, StepKind.UNSCORED) else tiling


def _for_small_tiles(layer: Layer, limits: DeviceLimits) -> Tiling:
    """Small tiles alone, of programs as small as may be: while one starts a unit, others of its processor read."""
    pairs = small_tile(layer.group)
    block_n = 1 << max(4, min(6, (16384 // layer.token_bytes).bit_length() - 1))
    block_bytes, queries = block_n * layer.token_bytes, pairs * padded(layer.key_dim) * layer.dtype.itemsize
    fitting = limits.shared_bytes // (queries + 2 * block_bytes + _RESERVED + _EXCHANGES)
    # A block takes half as long as one of other steps; joining few rows takes less than joining a large tile's.
    return Tiling(
        big_m=pairs,
        block_n=block_n,
        big_n=block_n,
        num_warps=2,
        small_ahead=2,
        big_ahead=2,
        scored_ahead=0,
        programs_per_sm=max(1, min(4, fitting)),
        unit_overhead=8,
        scored_overhead=24,
        part_cost=4,
    )


def _for_any(layer: Layer, kind: StepKind, limits: DeviceLimits) -> Tiling:
    prefills = kind is StepKind.PREFILL
    wide = layer.token_bytes > 512
    big_m = 16 if layer.dtype == torch.float32 else 128 if prefills and not wide else SCORED_PAIRS
    big_m = max(big_m, small_tile(layer.group))
    block_n = 16 if layer.token_bytes > 1024 else 32 if wide else 64
    heavy = big_m > 64 or wide
    # Two programs that do not fit a multiprocessor with these blocks may fit with shorter ones.
    shapes = [(1, block_n)] if heavy else [(2, block_n), (2, block_n // 2), (1, block_n)]
    for per_sm, keys in shapes:
        # Memory-bound loops prefer smaller blocks and more of them in flight.
        big_n = keys if prefills else min(keys, 32)
        small, big, scored = _blocks_ahead(layer, big_m, keys, big_n, per_sm, limits)
        if min(small, big, scored) >= 2:
            break
    # A single block in flight hides no latency, and each needs registers for its looked-up pages.
    big_ahead, scored_ahead = max(2, min(4, big)), max(2, min(4, scored))
    return Tiling(big_m, keys, big_n, 8 if heavy else 4, 2, big_ahead, scored_ahead, per_sm)


def _blocks_ahead(
    layer: Layer, big_m: int, block_n: int, big_n: int, per_sm: int, limits: DeviceLimits
) -> tuple[int, int, int]:
    """Blocks that fit the shared memory of a program: of small tiles, of large ones, of large ones with scores."""
    itemsize = layer.dtype.itemsize
    queries = padded(layer.key_dim) * itemsize
    room = limits.shared_bytes // per_sm - _RESERVED - _EXCHANGES
    # Products of 64 rows and more on Hopper keep one more block in shared memory while they run.
    kept = 1 if limits.capability >= 90 and big_m >= 64 and layer.dtype != torch.float32 else 0
    big = (room - big_m * queries) // (big_n * layer.token_bytes) - kept
    small = (room - small_tile(layer.group) * queries) // (block_n * layer.token_bytes)
    # With scores only values are kept there, and weights are handed over through shared memory.
    handed = (kept * padded(layer.value_dim) + big_m) * block_n * itemsize
    scored = (room - big_m * queries - handed) // (block_n * layer.token_bytes)
    return small, big, scored


def parts_together(pairs: int, layer: Layer, num_warps: int) -> int:
    """Parts that are asked for at a time as so many pairs of them are joined: as many as registers hold, 8 at most."""
    registers = -(-pairs * padded(layer.value_dim) // (32 * num_warps))
    return max(1, min(8, _REGISTERS_OF_PARTS // registers))


def padded(size: int) -> int:
    """The size of a tile's dimension: the next power of two, at least 16 as a dot product needs."""
    return max(16, triton.next_power_of_2(size))


VERSION = 4
"""Of the meaning of an entry; files of another version are not read."""

CACHE_VARIABLE = "SPARSESPEC_TUNING_CACHE"

SHIPPED = Path(__file__).with_name("tuned.json")

_RANGES = {
    "big_m": (16, 256),
    "block_n": (16, 256),
    "big_n": (16, 256),
    "num_warps": (1, 16),
    "small_ahead": (1, 16),
    "big_ahead": (1, 16),
    "scored_ahead": (0, 16),
    "programs_per_sm": (1, 16),
    "unit_overhead": (0, 1024),
    "scored_overhead": (0, 1024),
    "part_cost": (0, 1024),
}
_POWERS_OF_TWO = ("big_m", "block_n", "big_n", "num_warps")


def tiling_for(layer: Layer, kind: StepKind, limits: DeviceLimits) -> Tiling:
    """The tiles of a launch: measured ones if there are any, else the default."""
    key = entry_key(layer, kind, limits)
    found = _entries(cache_path()).get(key) or _entries(SHIPPED).get(key)
    if found is None or found.big_m < layer.group:
        return default_tiling(layer, kind, limits)
    return found


def entry_key(layer: Layer, kind: StepKind, limits: DeviceLimits) -> str:
    """What an entry was measured for."""
    dtype = str(layer.dtype).removeprefix("torch.")
    dims = f"group {layer.group}, dims {layer.key_dim} and {layer.value_dim}, {dtype}, page {layer.page_size}"
    return f"{limits.name}: {dims}, {kind.value} steps"


def cache_path() -> Path:
    """The user's file: the environment variable SPARSESPEC_TUNING_CACHE, or in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "sparsespec_compile" / "tiles.json"


def can_be_kept(tiling: Tiling) -> bool:
    """Whether a file may hold these tiles."""
    try:
        _checked(asdict(tiling))
    except ValueError:
        return False
    return True


def save(measured: dict[str, Tiling], path: Path) -> None:
    """Add entries to a file, replacing it in one step, so that a reader sees the old or the new one."""
    entries = {key: asdict(tiling) for key, tiling in {**_read(path), **measured}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"version": VERSION, "entries": dict(sorted(entries.items()))}, file, indent=2)
        file.write("\n")
    os.chmod(file.name, 0o644)  # temporary files are readable by their owner alone
    os.replace(file.name, path)
    _entries.cache_clear()


@lru_cache
def _entries(path: Path) -> dict[str, Tiling]:
    return _read(path)


def _read(path: Path) -> dict[str, Tiling]:
    """Entries of a file; none and a warning if it cannot be used."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, {VERSION} is read")
        return {key: _checked(entry) for key, entry in content["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{path} cannot be used ({type(error).__name__}: {error}); kernels take their default tiles. Delete it, or "
            "write it anew with `python -m sparsespec_compile.kernels.tuning`.",
            TuningCacheWarning,
            stacklevel=2,
        )
        return {}


def _checked(entry: dict[str, Any]) -> Tiling:
    """An entry as tiles, all values being integers that a kernel can be built with."""
    if set(entry) != {field.name for field in fields(Tiling)}:
        raise ValueError(f"an entry has the fields {sorted(entry)}")
    for name, value in entry.items():
        low, high = _RANGES[name]
        power = name not in _POWERS_OF_TWO or (isinstance(value, int) and value & (value - 1) == 0)
        if type(value) is not int or not low <= value <= high or not power:
            powers = ", powers of two" if name in _POWERS_OF_TWO else ""
            raise ValueError(f"{name} is {value!r}; allowed are {low} to {high}{powers}")
    if entry["block_n"] % entry["big_n"]:
        raise ValueError(f"big_n is {entry['big_n']} and block_n {entry['block_n']}; big_n may be as large at most")
    return Tiling(**entry)
