"""Which tiles a launch takes: those measured on this device, those measured by us on a device like it, or the default.

The choice is made from shapes alone and stays the same within a process, so that captured steps never measure anything
and equal calls give equal bits. ``python -m sparsespec_compile.kernels.tuning`` measures, and writes the user's file.
"""

import json
import os
import tempfile
import warnings
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..device import DeviceLimits
from ..errors import TuningCacheWarning
from ..step_kind import StepKind
from .tiling import Layer, Tiling, default_tiling

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
    os.chmod(file.name, 0o644)  # a temporary file is for its owner alone
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
