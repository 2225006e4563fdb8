"""The devices that steps run on: a CUDA GPU, and the CPU.

The CPU has one memory, and work is done when it is enqueued.
"""

import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.kernels.launch import SharedCounters
from sparsespec_compile.runtime.device.interface import Device, Event


class CudaEvent:
    """A point in a CUDA stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    @property
    def done(self) -> bool:
        """Whether the stream has passed it."""
        return self.event.query()

    def wait(self) -> None:
        """Block the host until then."""
        self.event.synchronize()


class CudaStream:
    """A CUDA stream. What runs on it also finds its device to be the current one."""

    def __init__(self, device: "CudaDevice", stream: torch.cuda.Stream) -> None:
        self.device: Device = device
        self._stream = stream

    def run(self, work: Callable[[], None]) -> None:
        """Call `work`, whose operations are enqueued."""
        with torch.cuda.stream(self._stream):
            work()

    def copy(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Enqueue the copies."""
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def record(self) -> CudaEvent:
        """An event that completes after everything enqueued so far."""
        return CudaEvent(self._stream.record_event())

    def wait(self, event: Event) -> None:
        """Enqueue a wait."""
        self._stream.wait_event(cast(CudaEvent, event).event)

    def active(self) -> AbstractContextManager[None]:
        """Make it the current stream, and its device the current device."""
        return torch.cuda.stream(self._stream)


_ALLOCATOR = threading.RLock()
"""Held while steps are captured, or memory is measured or given back: torch allows one of these at a time."""


class CudaGraphs:
    """Captures CUDA graphs on a stream of its own, into one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._counters = SharedCounters()  # graphs that share memory never overlap
        self._memory: Any = None  # what `CUDAGraph.pool` gives: torch has no public name for its type

    def capture(self, work: Callable[[], None], warm_ups: int) -> torch.cuda.CUDAGraph:
        """See `interface.Graphs`."""
        current, stream = torch.cuda.current_stream(self._device), self._stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream), self._counters.in_use():
            for _ in range(warm_ups):
                work()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Torch's own capture stream belongs to the device that captured first, and its default mode lets any other
        # thread's call break a capture.
        capture = torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local")
        with _ALLOCATOR, self._counters.in_use(), capture:
            work()
        self._memory = graph.pool()
        return graph


class CudaMemory:
    """Memory of a GPU, as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """See `interface.Memory`."""
        with _ALLOCATOR:
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self._device)[0]

    def taken_by(self, work: Callable[[], None]) -> int:
        """See `interface.Memory`."""
        with _ALLOCATOR:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            work()
            return torch.cuda.max_memory_allocated(self._device) - before


class CudaDevice:
    """See `interface.Device`."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.memory = CudaMemory(device)
        self._host_memory = ThreadPoolExecutor(1, thread_name_prefix="sparsespec-host-memory")

    def stream(self) -> CudaStream:
        """A stream without implicit synchronisation, also with the default stream."""
        return CudaStream(self, torch.cuda.Stream(self.torch_device))

    def current(self) -> CudaStream:
        """The current stream of the calling thread on this device."""
        return CudaStream(self, torch.cuda.current_stream(self.torch_device))

    def graphs(self) -> CudaGraphs:
        """What captures CUDA graphs."""
        return CudaGraphs(self.torch_device)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros in the GPU's memory."""
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned memory from torch's allocator, which keeps it until the copies that use it have run."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)

    def host_block(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Future[Tensor]":
        """Pinned memory, touched and pinned by a thread: it takes as long as a step."""
        return self._host_memory.submit(self._pin, shape, dtype)

    def _pin(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with torch.cuda.device(self.torch_device):  # a thread begins on the first device
            return pinned(shape, dtype)


def pinned(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory of their own, pinned for all devices as long as the tensor itself lives, its views aside.

    Raises:
        RuntimeError: the driver pins no more memory.
        OSError, MemoryError: the system gives no more memory.
    """
    count = math.prod(size) * dtype.itemsize
    memory = mmap.mmap(-1, count)  # it shares no page with other memory, and a fork copies none
    tensor = torch.frombuffer(memory, dtype=dtype).view(*size)
    tensor.zero_()
    address = tensor.data_ptr()
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, count, 0)))
    # The memory is an argument so that it outlives the pinning.
    weakref.finalize(tensor, _unpin, address, memory).atexit = False  # at interpreter exit the driver may be gone
    return tensor


def _unpin(address: int, memory: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


_ALIGNMENT = 64
"""Bytes: torch's own alignment on CPUs."""


class CpuEvent:
    """An event that is complete as soon as it is recorded."""

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


def open_device(device: torch.device) -> Device:
    """The implementation for tensors on `device`, a CUDA GPU or the CPU."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
