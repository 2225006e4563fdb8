"""What a device can do, the constants of the cost model: known, or measured once on the device itself.

What was measured is kept in the user's cache folder.
"""

import ctypes
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from sparsespec_compile.errors import CeilingsCacheWarning, CeilingsError


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """A device.

    The first two bound any program (speed of light); the others describe how near to them kernels come. All must be
    positive, overheads may be 0.

    Args:
        name: of the device, for people.
        read_bytes_per_s: fastest read of memory in order.
        flops_per_s: large matrix products in the model's dtype.
        gather_bytes_per_s: reads of single positions' keys and values, 512 bytes or so at a time.
        attention_flops_per_s: products of queries and keys, few rows of a request padded to a tile.
        gemm_overhead_s: what a projection takes above its bytes and FLOPs, its share of the elementwise kernels and
            the writing of keys and values between the projections included.
        attention_overhead_s: what an attention layer takes above its bytes and FLOPs.
        request_overhead_s: what each request adds to that.
        scoring_overhead_s: added where any request verifies drafts, since a verification returns scores.

    Raises:
        CeilingsError: for a figure that is not a finite positive number.
    """

    name: str
    read_bytes_per_s: float
    flops_per_s: float
    gather_bytes_per_s: float
    attention_flops_per_s: float
    gemm_overhead_s: float
    attention_overhead_s: float
    request_overhead_s: float
    scoring_overhead_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf") or (value == 0 and not field.name.endswith("overhead_s")):
                raise CeilingsError(f"{field.name} must be a finite positive number, got {value!r}.")


H200 = Ceilings(
    name="NVIDIA H200",
    read_bytes_per_s=4.3e12,
    flops_per_s=673e12,
    gather_bytes_per_s=3.8e12,
    attention_flops_per_s=500e12,
    gemm_overhead_s=9.5e-6,
    attention_overhead_s=6e-6,
    request_overhead_s=0.05e-6,
    scoring_overhead_s=20e-6,
)
"""One H200 SXM, bf16, torch 2.11, triton 3.6.

Reads: the fastest attention kernel that had been seen on the card when bars were set, 3 to 5% below the fastest since.
FLOPs: an 8192^3 product. The others are fitted: to a compiled step of Qwen3-8B without attention (4.9, 5.5, 5.8, 6.9,
8.3 ms at 2, 64, 122, 192, 256 rows), and to one of its layers of this project's attention
(benchmarks/results/h200-kernels.json)."""

KNOWN = (H200,)
"""Devices with measured ceilings."""


_VERSION = 1
"""Of what a file holds and how it is measured; files of another version are measured anew."""

_READ_BYTES = 2**30
_FREE_SHARE = 0.25
"""Memory that a measurement takes at most: 1 GiB, or this share of what is free."""

_PRODUCT_SIZE = 8192
_REPEATS = 5


def ceilings_of(device: "torch.device | str | Ceilings") -> Ceilings:
    """The ceilings of a device.

    A CUDA device of this machine that is not a known one is measured, which takes about a second, and the result is
    kept for this device, torch version and driver, in `ceilings` of the folder `sparsespec_compile` in XDG_CACHE_HOME
    (default ~/.cache).

    Args:
        device: a CUDA device of this machine, a name that contains that of a known device, or ceilings, which are
            returned.

    Raises:
        CeilingsError: nothing is known about the device, and it could not be measured.
    """
    if isinstance(device, Ceilings):
        return device
    present = str(device).partition(":")[0] == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name(device) if present else str(device)
    for known in KNOWN:
        if _is(known, name):
            return known
    if present:
        return measured_ceilings(name, lambda: _measure(torch.device(device), name))
    raise CeilingsError(
        f"No ceilings are known for {name!r}. Allowed: {', '.join(known.name for known in KNOWN)}, a CUDA device of "
        "this machine, which is measured, or a Ceilings(...) with what your device was measured to do."
    )


def _is(known: Ceilings, name: str) -> bool:
    """Whether a name contains that of a device as a word (GH200 is no H200) and means all of it, not a MIG slice."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "mig" not in words and known.name.removeprefix("NVIDIA ").lower() in words


def measured_ceilings(name: str, measure: Callable[[], Ceilings]) -> Ceilings:
    """The ceilings in the user's cache folder; `measure` gives them when there are none that can be read.

    Raises:
        CeilingsError: as `measure`.
    """
    try:
        path = _path(name)
        found = _read(path)
    except (OSError, RuntimeError) as error:  # no permission, or no home folder
        _warn(f"Ceilings of {name} cannot be read from the user's cache folder", error)
        return _measured_in_this_process(name, measure)
    if found is not None:
        return found
    ceilings = _measured_in_this_process(name, measure)
    try:
        _write(path, ceilings)
    except OSError as error:
        _warn(f"Ceilings of {name} cannot be kept in {path}", error)
    return ceilings


_measured: dict[str, Ceilings] = {}


def _measured_in_this_process(name: str, measure: Callable[[], Ceilings]) -> Ceilings:
    if name not in _measured:
        _measured[name] = measure()
    return _measured[name]


def _path(name: str) -> Path:
    """The file of a device: a new torch or driver may make it faster."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = f"{name} torch {torch.__version__} driver {_driver_version()}"
    return Path(folder) / "sparsespec_compile" / "ceilings" / (re.sub(r"[^A-Za-z0-9.+]+", "-", key) + ".json")


@lru_cache
def _driver_version() -> str:
    """CUDA's version as the driver gives it, such as 12040; "unknown" where there is none."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        return str(version.value) if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else "unknown"
    except (OSError, AttributeError):
        return "unknown"


def _read(path: Path) -> Ceilings | None:
    """The contents of a file; None, so that it is replaced, if it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text())
        return Ceilings(**content["ceilings"]) if content["version"] == _VERSION else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:  # CeilingsError and wrong JSON or UTF-8 are ValueErrors
        _warn(f"{path} holds no ceilings, and is replaced", error)
        return None


def _write(path: Path, ceilings: Ceilings) -> None:
    """Replace the file atomically: concurrent readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"version": _VERSION, "ceilings": asdict(ceilings)}, indent=2)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        written.write_text(content)
        os.replace(written, path)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"{what} ({type(error).__name__}: {error}).", CeilingsCacheWarning, stacklevel=3)


def _measure(device: torch.device, name: str) -> Ceilings:
    """Read bandwidth and 16-bit products of a CUDA device; other rates in proportion to an H200's, its overheads.

    Raises:
        CeilingsError: there is no memory for it.
    """
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    try:
        with torch.cuda.device(device), torch.inference_mode():
            available = int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
            values = torch.zeros(min(_READ_BYTES, available) // 4, dtype=torch.float32, device=device)
            read = values.numel() * 4 / _fastest(partial(torch.sum, values))
            size = min(_PRODUCT_SIZE, int((available / (3 * dtype.itemsize)) ** 0.5) // 128 * 128)
            left, right, out = (torch.zeros(size, size, dtype=dtype, device=device) for _ in range(3))
            flops = 2 * size**3 / _fastest(partial(torch.mm, left, right, out=out))
    except (RuntimeError, ZeroDivisionError) as error:
        raise CeilingsError(
            f"The ceilings of {name} could not be measured ({error}). Free memory on it, or give Ceilings(...)."
        ) from error
    return replace(
        H200,
        name=name,
        read_bytes_per_s=read,
        flops_per_s=flops,
        gather_bytes_per_s=read * H200.gather_bytes_per_s / H200.read_bytes_per_s,
        attention_flops_per_s=flops * H200.attention_flops_per_s / H200.flops_per_s,
    )


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, by device events."""
    run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPEATS)]
    for before, after in marks:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return min(before.elapsed_time(after) for before, after in marks) / 1e3
