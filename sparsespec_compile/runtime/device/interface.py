"""What the runtime asks of a device: streams, events, host buffers, graphs and memory.

The runtime issues device work through these protocols alone. There are three implementations: CUDA, CPU, which does
everything at once, and one for tests that runs work as late, as early and as interleaved as CUDA may
(`tests/support/adversary.py`).

Order, which all implementations keep and on which the runtime may rely:

- Work of one stream runs in the order in which it was enqueued. Work of two streams is ordered by events alone.
- The host knows that work has run only once it has waited for an event recorded behind it, or has seen it `done`.
- A copy reads its source and writes its target when it runs, not when it is enqueued. A host buffer must not be written
  or read by the host in between.
"""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream."""

    @property
    def done(self) -> bool:
        """Whether the stream has passed this point; does not wait."""

    def wait(self) -> None:
        """Block the host until the stream has passed this point."""


class Stream(Protocol):
    """A queue of device work."""

    @property
    def device(self) -> "Device":
        """The device that it belongs to."""

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue the device operations that `work` issues. It must not depend on values that the device computes."""

    def copy(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """Enqueue copies, each (target, source). Host memory must be a `Device.host_buffer` or `Device.host_block`."""

    def record(self) -> Event:
        """An event that completes after everything enqueued so far."""

    def wait(self, event: Event) -> None:
        """Let work that is enqueued from now on run after `event`, an event of this device; the host does not wait."""

    def active(self) -> AbstractContextManager[None]:
        """Make this the calling thread's current stream.

        For building state: tensors that the body allocates on the device belong to this stream. Their memory is used
        again only after the work that was enqueued on this stream before they were freed.
        """


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Issue the work once more, on the current stream."""


class Graphs(Protocol):
    """Captures work. All graphs of one object share the memory of their intermediate results: they never overlap."""

    def capture(self, work: Callable[[], None], warm_ups: int) -> Graph:
        """Run `work` on the device `warm_ups` times, behind the current stream's work, then capture it without a run.

        Raises:
            torch.OutOfMemoryError: the device has no memory for its intermediate results.
        """


class Memory(Protocol):
    """The device's own memory."""

    def free(self) -> int:
        """Bytes that can be allocated, those that torch caches without use included."""

    def taken_by(self, work: Callable[[], None]) -> int:
        """Run `work`; the most bytes that it takes at a time beyond what is allocated now."""


class Device(Protocol):
    """A device. All methods may be called from any thread."""

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def asynchronous(self) -> bool:
        """Whether streams run beside the host."""

    @property
    def memory(self) -> Memory | None:
        """Its memory; None where tensors lie in the memory of the host, which sets no limit of its own."""

    def stream(self) -> Stream:
        """A new stream."""

    def current(self) -> Stream:
        """The calling thread's current stream: the one that the user's own operations run on."""

    def graphs(self) -> Graphs | None:
        """What captures work; None where nothing can be captured."""

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros on the device, set on the current stream. In host memory pages are taken when they are first written.

        Raises:
            torch.OutOfMemoryError, MemoryError: there is no memory.
        """

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised host memory that copies run from and to. It may be dropped while a copy is under way.

        It can be written to inside of inference mode and outside, wherever it was made.
        """

    def host_block(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Future[Tensor]":
        """Much host memory, otherwise as `host_buffer`'s, taken without holding up the device's work.

        Every copy from or to it must have run before it is dropped. The future's exception is RuntimeError, OSError or
        MemoryError when the system or the driver gives no more.
        """
