"""What a launch goes by beside its tensors: the device's limits, the kind of step, and counters of its programs.

A launcher sees sizes and no values, which lie on the device. Sizes tell a step that prefills from others. That every
request drafts, or who gives out scores, they do not tell, so whoever knows it promises it. The kind of a
step and its promise decide on tiles and on what a kernel can do.

By the counters, the programs of a launch find out which of them ends last.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import KernelUnavailableError


@dataclass(frozen=True)
class DeviceLimits:
    """Size of a device.

    Attributes:
        name: as the driver gives it.
        capability: compute capability, 90 for 9.0.
        multiprocessors: how many it has.
        shared_bytes: shared memory of one of them. A program takes 1 KiB more of it than its own tiles.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int


INTERPRETER = DeviceLimits("interpreter", 90, 5, 228 * 1024)
"""The device that Triton's interpreter plays: few multiprocessors, so that small tests split work between programs."""


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of the device that tensors are on."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )


FP8_CAPABILITY = 89
"""From here on a device converts to and from fp8."""


def refuse_fp8(weight: torch.Tensor) -> None:
    """Refuse a weight in fp8 on a device that cannot convert it.

    Raises:
        KernelUnavailableError: that is so.
    """
    limits = device_limits(weight.device)
    if weight.dtype == torch.float8_e4m3fn and limits.capability < FP8_CAPABILITY:
        raise KernelUnavailableError(
            f"weights are {weight.dtype} and {limits.name} has compute capability {limits.capability / 10}; fp8 needs "
            f"{FP8_CAPABILITY / 10} at least: take torch.int8"
        )


LARGE_STEP_PAIRS = 16384
LARGE_STEP_ROWS = 16
"""Packed (row, query head) pairs, and rows for each request slot, from which on a step is taken for one that prefills:
computing bounds it, not memory. A step in which all slots verify has fewer rows for each."""


class StepKind(Enum):
    """Steps that deserve tiles of their own."""

    SMALL_TILES = "small-tiles"
    """Drafts, and one row of each other request, and no scores."""
    UNSCORED = "unscored"
    """Without scores, and neither of the others."""
    MIXED = "mixed"
    """Whatever is none of the others."""
    PREFILL = "prefill"
    """Mostly rows of prompts, as far as sizes tell."""


class Promise(IntEnum):
    """What a step does not need, each including the ones before it; kernels that need not do it are faster.

    If a step breaks its promise, its rows are still right but take longer, and scores that it promised not to ask for
    are not written.
    """

    NOTHING = 0
    ONLY_VERIFICATIONS_SCORED = 1
    """Prompts give out no scores, and verifications of ``ops.scored_rows_at_most`` rows at most."""
    NO_SCORES = 2
    """Nobody gives out scores."""
    SMALL_TILES = 3
    """Nor does any request need large tiles: it drafts, or has a single row."""


_promised: ContextVar[Promise] = ContextVar("promised", default=Promise.NOTHING)


_memo: ContextVar[dict[Any, Any] | None] = ContextVar("memo", default=None)


@contextmanager
def promised(promise: Promise) -> Iterator[None]:
    """Within this context steps keep the promise, and no tensor of a step changes unseen by torch."""
    token, memo = _promised.set(promise), _memo.set({})
    try:
        yield
    finally:
        _promised.reset(token)
        _memo.reset(memo)


def step_memo() -> dict[Any, Any] | None:
    """Where the layers of a step keep what they share, gone at the end of ``promised``; None outside of it."""
    return _memo.get()


def present_promise() -> Promise:
    """What is promised at the moment."""
    return _promised.get()


def kind_of_step(rows: int, q_heads: int, requests: int) -> StepKind:
    """The kind of a step of so many packed rows and request slots: all that a captured step may go by but promises."""
    if present_promise() is Promise.SMALL_TILES:
        return StepKind.SMALL_TILES
    if rows * q_heads >= LARGE_STEP_PAIRS and rows >= LARGE_STEP_ROWS * requests:
        return StepKind.PREFILL
    return StepKind.UNSCORED if present_promise() is Promise.NO_SCORES else StepKind.MIXED


CAPTURED_CALLS = 4096
"""Calls in CUDA graphs that get counters of their own, for each device and number of programs; 4 to 9 MB."""

_lock = threading.Lock()
_of_stream: dict[tuple[torch.device, int, int], Tensor] = {}
_for_captures: dict[tuple[torch.device, int], list[Tensor]] = {}
_stocks: list[Tensor] = []
"""What the counters for captures are parts of. Graphs know addresses only, so nothing else keeps this memory."""

_of_thread = threading.local()


class SharedCounters:
    """Counters of launches that never overlap, as those of graphs that are replayed one after the other.

    Their memory is given back with this object, which must outlive the graphs.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[torch.device, int], Tensor] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Launches of this thread take these counters. Run what will be captured in here before it is captured."""
        before, _of_thread.shared = getattr(_of_thread, "shared", None), self
        try:
            yield
        finally:
            _of_thread.shared = before

    def take(self, device: torch.device, programs: int) -> Tensor:
        """int32 [programs]. What is first asked for in a capture belongs to its graph, which clears it itself."""
        if (device, programs) in self._counters:
            return self._counters[device, programs]
        made = torch.zeros(programs, dtype=torch.int32, device=device)
        if not _capturing(device):
            self._counters[device, programs] = made
        return made


def counters(device: torch.device, programs: int) -> Tensor:
    """int32 [programs], all 0 when the launch starts; the kernel leaves them so.

    Within `SharedCounters.in_use` those. Else launches on one stream, which run one after the other, share theirs, and
    a captured call, which may be replayed on any stream at any time, never shares: it takes counters that were set to 0
    before and that nobody else will get. Should those run out, or a device see its first call within a capture, the
    graph clears its own: right, and a microsecond or two slower in each replay.
    """
    shared: SharedCounters | None = getattr(_of_thread, "shared", None)
    if shared is not None:
        return shared.take(device, programs)
    if device.type != "cuda":
        return torch.zeros(programs, dtype=torch.int32, device=device)
    with _lock:
        if _capturing(device):
            free = _for_captures.get((device, programs))
            return free.pop() if free else torch.zeros(programs, dtype=torch.int32, device=device)
        key = (device, torch.cuda.current_stream(device).cuda_stream, programs)
        if key not in _of_stream:
            _of_stream[key] = torch.zeros(programs, dtype=torch.int32, device=device)
        if key[::2] not in _for_captures:
            stock = torch.zeros(CAPTURED_CALLS, programs, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
            _stocks.append(stock)
            _for_captures[key[::2]] = list(stock.unbind())
        return _of_stream[key]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
