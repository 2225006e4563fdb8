"""The callers of an engine: their requests, the queues of their outputs, and which of their threads drives it."""

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sparsespec_compile.errors import EngineBusyError, EngineFailedError
from sparsespec_compile.runtime.host.request import Request

if TYPE_CHECKING:
    from sparsespec_compile.runtime.host.engine import Engine

_EXIT_SECONDS = 30.0
"""The interpreter's end waits so long for a background thread's iteration."""


class Output(NamedTuple):
    """The tokens of one request that became final in an iteration.

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
        open_ended: whether the iterator waits for further requests, until the client is closed, instead of ending.
        closed: whether the client was closed, or stopped by `Engine.stop`.
        failure: why the engine dropped this client's requests; None = it did not.
    """

    def __init__(self, engine: "Engine", *, open_ended: bool = False) -> None:
        self._engine = engine
        self.open_ended = open_ended
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
    """A daemon thread that drives an engine while a client has requests: texts progress without a waiting caller.

    Args:
        engine: what to drive.
        client: whose requests keep the thread at work; it ends when the client is closed.
    """

    def __init__(self, engine: "Engine", client: Client) -> None:
        self._engine = engine
        self._client = client
        self._thread = threading.Thread(target=self._run, name="sparsespec-engine", daemon=True)
        # A daemon thread that is inside torch when the interpreter shuts down crashes the process.
        atexit.register(self._end)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._engine.drive(self._client):
                pass
            self._engine.carry_out_commands()
        except Exception:
            if self._client.failure is None:  # else the thread that waits for the client's outputs raises it
                raise
        finally:
            atexit.unregister(self._end)

    def _end(self) -> None:
        self._engine.abandon(self._client)
        self._thread.join(_EXIT_SECONDS)


class Turns:
    """One thread at a time drives: what it does, no other thread does.

    A command of another thread is queued, and the driver carries it out between two iterations. Without a driver, the
    thread drives for as long as its command takes.

    Args:
        failed: a method that the driver calls with what interrupted a command. Its object may hold this one.

    Attributes:
        changed: guards `driver`, and is notified whenever it or the outcome of a command has changed.
        driver: identifier of the thread that drives; None = none does.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self.changed = threading.Condition()
        self.driver: int | None = None
        self._failed = weakref.WeakMethod(failed)
        self._commands: deque[_Command] = deque()

    @property
    def mine(self) -> bool:
        """Whether the calling thread drives."""
        return self.driver == threading.get_ident()

    @property
    def commanded(self) -> bool:
        """Whether commands were not carried out yet."""
        return bool(self._commands)

    def require_outside(self) -> None:
        """Raises EngineBusyError in the thread that drives, as in what an iteration calls."""
        if self.mine:
            raise EngineBusyError(
                "This was called from within an iteration, by something that it calls, such as a tokenizer's decode. "
                "Call it from outside of it."
            )

    def command(self, action: Callable[[], None]) -> None:
        """Carry `action` out between two iterations, and raise its error.

        From within an iteration, as by a tokenizer's decode, it is queued and done at the iteration's end.
        """
        command, me = _Command(action), threading.get_ident()
        self._commands.append(command)
        if self.mine:
            return
        try:
            with self.changed:
                while not command.done and self.driver is not None:
                    self.changed.wait()
                if not command.done:
                    self.driver = me
            if self.mine:
                self._carry_out(me)
        finally:
            self.hand_over(me)
        if command.error is not None:
            raise command.error

    def leave(self, action: Callable[[], None]) -> None:
        """Queue `action`, without waiting for it; carry it out if nobody drives. Its error is nobody's."""
        self._commands.append(_Command(action))
        me = threading.get_ident()
        with self.changed:
            self.changed.notify_all()
            if self.driver is not None:
                return  # it is done at the end of the iteration
            self.driver = me
        self._carry_out(me)

    def run_commands(self) -> None:
        """Carry out all commands that have come in. By the driver."""
        while self._commands:
            self._commands[0].run()
            self._commands.popleft()
            with self.changed:
                self.changed.notify_all()

    def hand_over(self, me: int) -> None:
        """Let another thread drive, if this one does."""
        if self.driver == me:
            self.driver = None  # without the lock, which an interrupt might keep from being taken
        with self.changed:
            self.changed.notify_all()

    def _carry_out(self, me: int) -> None:
        """Carry out all commands, as the driver, and hand over."""
        try:
            self.run_commands()
        except BaseException as error:
            failed = self._failed()
            if failed is not None:
                failed(error)
            raise
        finally:
            self.hand_over(me)


class _Command:
    """An action to run between two iterations, and its outcome."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.done = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the action. An `Exception` is kept for the thread that queued the command; anything else propagates."""
        try:
            self._action()
        except Exception as error:
            self.error = error
        except BaseException:
            self.error = EngineFailedError("The thread that carried this call out was interrupted. Call again.")
            raise
        finally:
            self.done = True
