"""The CPU as a device: one memory, and work is done when it is enqueued."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.runtime.device.interface import Device, Event

_ALIGNMENT = 64
"""Bytes: torch's own alignment on CPUs."""


class CpuEvent:
    """A point that was passed when it was recorded."""

    done = True

    def wait(self) -> None:
        """Return at once."""


class CpuStream:
    """Runs work at once."""

    def __init__(self, device: "CpuDevice") -> None:
        self.device: Device = device

    def run(self, work: Callable[[], None]) -> None:
        """Call `work`."""
        work()

    def copy(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Copy at once."""
        for target, source in pairs:
            target.copy_(source)

    def record(self) -> CpuEvent:
        """An event that is done."""
        return CpuEvent()

    def wait(self, event: Event) -> None:
        """Return at once: every event of a CPU is done."""

    def active(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()


class CpuDevice:
    """See `interface.Device`."""

    torch_device = torch.device("cpu")
    asynchronous = False
    memory = None

    def stream(self) -> CpuStream:
        """A stream; all of them are alike."""
        return CpuStream(self)

    def current(self) -> CpuStream:
        """As `stream`."""
        return CpuStream(self)

    def graphs(self) -> None:
        """Nothing can be captured."""

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros whose pages the system provides when they are first written; torch's own are written at once."""
        size = math.prod(shape) * dtype.itemsize
        memory = np.zeros(size + _ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Ordinary memory."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device="cpu")

    def host_block(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Future[Tensor]":
        """Ordinary memory, taken at once."""
        block: Future[Tensor] = Future()
        try:
            block.set_result(self.host_buffer(shape, dtype))
        except (RuntimeError, MemoryError, OSError) as error:
            block.set_exception(error)
        return block
