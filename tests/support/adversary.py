"""A device that does everything as late, as early and as interleaved as CUDA may, on a CPU.

Work is a queue of closures for each stream. How far the streams have come is up to chance whenever the host calls, and
to necessity when it waits. Copies read and write host buffers when they run. Host memory that nothing was written to is
full of values that no result can be right with.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from sparsespec_compile.runtime.device.devices import CpuDevice

_GARBAGE = 2**30
"""An integer that is no token, row or slot."""

_PACES = (0.0, 0.02, 0.3, 0.9)
"""How probable it is that a stream does one more piece of work, whenever the host calls."""

_NEW_PACE = 0.03
"""How probable it is that a stream takes another pace at such a call: once in some iterations."""


class AdversarialEvent:
    """Done when its stream has come so far."""

    def __init__(self, stream: "AdversarialStream") -> None:
        self.stream = stream
        self.passed = False

    @property
    def done(self) -> bool:
        self.stream.device.drift()
        return self.passed

    def wait(self) -> None:
        self.stream.run_to(self)
        self.stream.device.drift()


class AdversarialStream:
    """A queue of work and of events to wait for.

    Attributes:
        number: of the device's streams in the order in which they were made; 0 is the caller's.
    """

    def __init__(self, device: "AdversarialDevice", number: int) -> None:
        self.device = device
        self.number = number
        self.pace = device.any_pace()
        self._queue: deque[Callable[[], None] | AdversarialEvent] = deque()

    def run(self, work: Callable[[], None]) -> None:
        self.enqueue(work)

    def copy(self, *pairs: tuple[Tensor, Tensor]) -> None:
        for target, source in pairs:
            self.enqueue(partial(target.copy_, source))

    def record(self) -> AdversarialEvent:
        event = AdversarialEvent(self)
        self.enqueue(partial(setattr, event, "passed", True))
        return event

    def wait(self, event: AdversarialEvent) -> None:
        self.enqueue(event)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The body runs behind everything enqueued so far, and at once: it builds what the host uses then."""
        self.record().wait()
        with self._at_work():
            yield

    def enqueue(self, work: Callable[[], None] | AdversarialEvent) -> None:
        self._queue.append(work)
        self.device.drift()

    @property
    def behind(self) -> int:
        """Pieces of work that have not run."""
        return len(self._queue)

    def run_to(self, event: AdversarialEvent) -> None:
        while not event.passed:
            self._run_one()

    def may_run(self) -> bool:
        """Whether there is work that waits for no other stream."""
        return bool(self._queue) and (not isinstance(self._queue[0], AdversarialEvent) or self._queue[0].passed)

    def _run_one(self) -> None:
        work = self._queue.popleft()
        if isinstance(work, AdversarialEvent):
            work.stream.run_to(work)
        else:
            with self._at_work():
                work()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        before, self.device.working = self.device.working, True
        try:
            yield
        finally:
            self.device.working = before

    def drift(self, chance: random.Random) -> None:
        while self.may_run() and chance.random() < self.pace:
            self._run_one()


class AdversarialGraphs:
    """Captures work by keeping it."""

    def __init__(self, device: "AdversarialDevice") -> None:
        self._device = device

    def capture(self, work: Callable[[], None], warm_ups: int) -> "AdversarialGraph":
        assert self._device.working, "captured on no stream: its runs are not ordered with the steps under way"
        for _ in range(warm_ups):
            work()
        return AdversarialGraph(work)


class AdversarialGraph:
    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


class AdversarialDevice(CpuDevice):
    """See `sparsespec_compile.runtime.device.interface.Device`.

    Args:
        seed: of all its decisions.
        captures: whether it captures graphs.

    Attributes:
        working: whether what runs now is a stream's work.
    """

    asynchronous = True

    def __init__(self, seed: int, *, captures: bool = False) -> None:
        self._chance = random.Random(seed)
        self._captures = captures
        self._streams: list[AdversarialStream] = []
        self._paused = False
        self.working = False
        self._callers = self.stream()

    def stream(self) -> AdversarialStream:
        self._streams.append(AdversarialStream(self, len(self._streams)))
        return self._streams[-1]

    def current(self) -> AdversarialStream:
        return self._callers

    def graphs(self) -> AdversarialGraphs | None:
        return AdversarialGraphs(self) if self._captures else None

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        fill = math.nan if dtype.is_floating_point else _GARBAGE
        with torch.inference_mode(False):
            return torch.full(shape, fill, dtype=dtype)

    def host_block(self, shape: tuple[int, ...], dtype: torch.dtype) -> "Future[Tensor]":
        return _Later(self, partial(self.host_buffer, shape, dtype))

    def drift(self) -> None:
        """Whatever the streams may do by themselves."""
        if self._paused:
            return
        for stream in self._chance.sample(self._streams, len(self._streams)):
            if self._chance.random() < _NEW_PACE:
                stream.pace = self.any_pace()
            stream.drift(self._chance)

    def pause(self) -> None:
        """From now on do only what is waited for."""
        self._paused = True

    def any_pace(self) -> float:
        return self._chance.choice(_PACES)

    def chance(self) -> bool:
        return self._chance.random() < 0.3


class _Later(Future[Tensor]):
    """Done some time after it was asked for."""

    def __init__(self, device: AdversarialDevice, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self._device = device
        self._make = make

    def done(self) -> bool:
        return super().done() or self._device.chance()

    def result(self, timeout: float | None = None) -> Tensor:
        if not super().done():
            self.set_result(self._make())
        return super().result(timeout)


def random_proposals(chance: random.Random, draft_tokens: int | str, drafter: str) -> int | str:
    """`SpecConfig.draft_proposals` that go with these settings; often 0."""
    if isinstance(draft_tokens, str) or draft_tokens < 2 or drafter == "ngram":
        return chance.choice([0, "auto", "auto"])
    return min(chance.choice([0, 0, 1, 2, 5]), draft_tokens - 1)
