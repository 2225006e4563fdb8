"""A caller's side of the engine: its requests, and the outputs that wait for it."""

import atexit
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sparsespec_compile.runtime.host.request import Request

if TYPE_CHECKING:
    from sparsespec_compile.runtime.host.engine import Engine

_EXIT_SECONDS = 30.0
"""The interpreter's end waits so long for a background thread's iteration."""


class Output(NamedTuple):
    """What became final of one request in an iteration.

    Attributes:
        request: whose tokens these are.
        tokens: the new ones; none when the request ended without one.
        ended: whether this is the request's last output.
    """

    request: Request
    tokens: list[int]
    ended: bool


class Client:
    """Submits requests to an engine and takes their outputs. Get it from `Engine.client`.

    Every method may be called from any thread. Iterating drives the engine: the thread that waits for an output runs
    the iterations of all clients until it has one, unless another thread already does. Requests of several clients
    share batches.

    A `with` block, or `close`, ends whatever is unfinished. The iterator ends when every submitted request is finished
    and its outputs were taken; requests submitted later continue it.

    Attributes:
        closed: whether the client was closed, or stopped by `Engine.stop`.
        failure: why the engine dropped this client's requests; None = it did not.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._outputs: deque[Output] = deque()
        self._live: set[Request] = set()
        self.closed = False
        self.failure: Exception | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests.

        Raises:
            PoolTooSmallError: a request can never fit. None of them was queued.
            MemoryPlanError: the device's memory cannot hold the engine's state.
            EngineBusyError: the client is closed.
        """
        self._engine.submit(self, requests)

    def cancel(self, requests: Sequence[Request]) -> None:
        """End requests where they stand; outputs that were not taken yet are dropped.

        Finished requests, and those of other clients, are left alone.
        """
        self._engine.cancel(self, requests)

    def close(self) -> None:
        """End everything that is unfinished. Threads that wait for an output return. Further calls do nothing."""
        self._engine.close(self)

    def __iter__(self) -> Iterator[Output]:
        return self

    def __next__(self) -> Output:
        output = self._engine.next_output(self)
        if output is None:
            raise StopIteration
        return output

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The engine calls the rest, holding its lock.

    def own(self, requests: Sequence[Request]) -> None:
        """Expect outputs of these requests."""
        self._live.update(requests)

    def deliver(self, output: Output) -> None:
        """Take an output of a request, unless it was cancelled."""
        if output.request in self._live:
            self._outputs.append(output)
            if output.ended:
                self._live.discard(output.request)

    def forget(self, requests: Collection[Request]) -> None:
        """Drop requests and their outputs."""
        dropped = set(requests)
        self._live -= dropped
        self._outputs = deque(output for output in self._outputs if output.request not in dropped)

    def take(self) -> Output | None:
        """The oldest output; None when there is none."""
        return self._outputs.popleft() if self._outputs else None

    @property
    def live(self) -> list[Request]:
        """Requests whose last output has not arrived."""
        return list(self._live)

    @property
    def waits(self) -> bool:
        """Whether an output will arrive."""
        return bool(self._live)

    @property
    def done(self) -> bool:
        """Whether no output is there and none will arrive."""
        return not self._live and not self._outputs


class BackgroundDriver:
    """A daemon thread that keeps an engine going while a client has requests, so that nobody need wait for outputs.

    Args:
        engine: what to drive.
        client: whose requests keep the thread at work; it ends when the client is closed.
    """

    def __init__(self, engine: "Engine", client: Client) -> None:
        self._engine = engine
        self._client = client
        self._thread = threading.Thread(target=self._run, name="sparsespec-engine", daemon=True)
        # A daemon thread that the interpreter's end meets inside of torch takes the process down.
        atexit.register(self._end)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._engine.drive(self._client):
                pass
            self._engine.carry_out_commands()
        except Exception:
            if self._client.failure is None:  # else whoever waits for the client's outputs is told
                raise
        finally:
            atexit.unregister(self._end)

    def _end(self) -> None:
        self._engine.abandon(self._client)
        self._thread.join(_EXIT_SECONDS)
