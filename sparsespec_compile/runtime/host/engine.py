"""The owner of a model's state on the device: one loop that serves every caller, from any thread."""

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence

import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineBusyError, EngineFailedError, PoolTooSmallError
from sparsespec_compile.runtime.build import MemoryPlan, Target, build_runner, capacity_for, engine_capacity
from sparsespec_compile.runtime.device import open_device
from sparsespec_compile.runtime.device.captured_step import CapturedStep
from sparsespec_compile.runtime.device.drafters import drafters_of
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.interface import Device
from sparsespec_compile.runtime.host.client import Client, Output
from sparsespec_compile.runtime.host.cycle_chooser import CycleChooser, chooser_for
from sparsespec_compile.runtime.host.host_tier import HostTier, available_host_bytes
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.session import Session
from sparsespec_compile.runtime.host.stats import Stats

_HOST_TIER_SHARE = 0.5
"""Of the free host memory, for requests that leave the device."""


class _Command:
    """Something to be done between two iterations, and how it ended."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.done = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it. An `Exception` belongs to whoever gave the command; anything else goes on to the caller."""
        try:
            self._action()
        except Exception as error:
            self.error = error
        except BaseException:
            self.error = EngineFailedError("The thread that carried this call out was interrupted. Call again.")
            raise
        finally:
            self.done = True


class Engine:
    """Runs requests through the graph until their texts are complete.

    One thread at a time drives the engine: it carries out the commands that have come in (submit, cancel, close, stop)
    and then one iteration for the requests of all clients. Any thread may become the driver, for as long as it waits
    for an output of its own. A command of another thread is queued and carried out by the driver between two
    iterations; without a driver, the thread carries it out itself. So scheduler, KV cache and step are only ever
    touched by one thread. A command waits for one iteration, or for the building of the state and the capture of steps
    where another command asks for those.

    The state on the device is built for the first request, by the configuration and the device's memory, and kept
    until `release`.

    Steps, uploads and downloads run on a stream of the engine's own, whatever stream is current in the calling thread.
    It waits for the caller's stream where requests are submitted, since the caller may just have changed the model's
    parameters, and the caller's stream waits for it where a client is closed, since a step that is still under way
    reads them. Results are read on the host. State is allocated on the engine's stream, so its memory is not used again
    before the steps that use it have run.

    Args:
        target: what runs.
        config: how.
        device: what it runs on; None = the implementation for `target.device`.
    """

    def __init__(self, target: Target, config: SpecConfig, device: Device | None = None) -> None:
        self.target = target
        self._device = open_device(target.device) if device is None else device
        self._stream = self._device.stream()
        self.config = config
        self.stats = Stats(config.most_draft_tokens)
        self.memory_plan: MemoryPlan | None = None
        self._drafters = drafters_of(config)
        self._session: Session | None = None
        self._longest = 0  # tokens of the longest request for which a state was built
        self._chooser: CycleChooser | None = None  # what it learns of device and texts is kept from call to call
        self._turn = threading.Condition()  # guards what follows, and is notified of every change
        self._driver: int | None = None  # identifier of the thread that drives
        self._commands: deque[_Command] = deque()
        self._clients: list[Client] = []
        self._owners: dict[Request, Client] = {}
        self._counting = False  # whether `stats` are of clients that are open

    def client(self) -> Client:
        """A new client; it takes part once it has submitted a request."""
        return Client(self)

    def run(self, requests: Sequence[Request]) -> Generator[Output, None, None]:
        """Yield outputs whenever tokens of a request become final; at the end every request is finished.

        Closing the iterator, or an exception at any place, gives back all slots and pages.

        Raises:
            As `Client.submit`, and `EngineFailedError` when another caller's iteration failed.
        """
        with self.client() as client:
            try:
                client.submit(requests)
            except EngineBusyError:
                if not client.closed:
                    raise
                return  # `stop` was faster
            yield from client

    def submit(self, client: Client, requests: Sequence[Request]) -> None:
        """`Client.submit`."""
        if not requests:
            return
        submitted = self._device.current().record()

        def action() -> None:
            if client.closed:
                raise EngineBusyError("This generation has ended; start another one for more prompts.")
            self._stream.wait(submitted)
            session = self._session_for(requests)
            session.require_room(requests)
            if not self._counting:
                self.stats, self._counting = session.restart(), True
            session.prepare(len(requests))
            with self._turn:
                client.own(requests)
                self._owners.update(dict.fromkeys(requests, client))
            for request in requests:
                session.add(request)

        self._require_outside()
        with self._turn:  # from here on `stop` ends it
            if not client.closed and client not in self._clients:
                self._clients.append(client)
        self._command(action)

    def cancel(self, client: Client, requests: Sequence[Request]) -> None:
        """`Client.cancel`."""
        if self._driver == threading.get_ident():  # called by what an iteration calls: the rest is done at its end
            for request in requests:
                if self._owners.get(request) is client:
                    request.cancel()
        self._command(lambda: self._drop(client, requests))

    def close(self, client: Client) -> None:
        """`Client.close`."""
        with self._turn:
            client.closed = True
            self._turn.notify_all()
        if client in self._clients:
            self._command(lambda: self._leave(client))
        if self._driver != threading.get_ident():
            self._device.current().wait(self._stream.record())

    def finish(self, client: Client) -> bool:
        """Close a client if it is done; whether it was."""
        with self._turn:
            if not client.done:
                return False
            client.closed = True
        self.close(client)
        return True

    def abandon(self, client: Client) -> None:
        """Close a client without waiting for a driver: for finalizers, which run at any point of any thread."""
        if client.closed:
            return
        client.closed = True
        self._commands.append(_Command(lambda: self._leave(client)))
        me = threading.get_ident()
        with self._turn:
            self._turn.notify_all()
            if self._driver is not None:
                return  # it is done at the end of the iteration
            self._driver = me
        self._carry_out(me)

    def carry_out_commands(self) -> None:
        """Carry out what was commanded and not done yet, if no other thread drives."""
        self._command(lambda: None)

    def stop(self) -> None:
        """Close every client that is open, whoever has it. Threads that wait for outputs return."""
        with self._turn:
            clients = list(self._clients)
        for client in clients:
            self.close(client)

    def release(self) -> None:
        """Give the state's memory back. Compiled code is kept; the next request allocates the state anew.

        Raises:
            EngineBusyError: a client is open.
        """

        def action() -> None:
            if self._clients:
                raise EngineBusyError(
                    f"{len(self._clients)} generation(s) of this model are unfinished. Exhaust or close them, or end "
                    "them with stop(), before release()."
                )
            self._drop_session()
            self._longest = 0
            if self._device.memory is not None:
                self._device.memory.free()  # torch keeps no cache of it either

        self._require_outside()
        self._command(action)

    def next_output(self, client: Client) -> Output | None:
        """The client's next output, for which this thread drives the engine if no other does; None when none will come.

        Raises:
            EngineFailedError: an iteration failed in another thread, which dropped this client's requests.
            EngineBusyError: called from within an iteration, as by a tokenizer's `decode`.
            Whatever failed in an iteration of this thread.
        """
        return self._take_turns(client, take=True)

    def drive(self, client: Client) -> bool:
        """Run one iteration, or wait for one or for a request of the client; False once the client is closed."""
        self._take_turns(client, take=False)
        return not client.closed

    def capture(self, max_requests: int, max_length: int, vocabulary: int | None = None) -> CapturedStep:
        """A step with a state of its own, for a loop outside of this engine; see `CapturedStep`."""
        self._require_outside()
        layout, stream = self.target.layout, self._device.current()
        pages = max(max_requests, 2) * len(layout.groups) * layout.pages_for(max(max_length, 2))
        capacity = capacity_for(self.config, self._drafters, max_requests, max_length, pages)
        built: list[tuple[StepRunner, MemoryPlan]] = []

        def action() -> None:  # between iterations, as it measures what a step takes
            with torch.inference_mode(False), stream.active():
                built.append(build_runner(self.target, self.config, self._drafters, capacity, self._device))

        self._command(action)
        ((runner, plan),) = built
        if runner.step.state.capacity.pages < capacity.pages:
            raise PoolTooSmallError(
                f"A step for {max_requests} texts of {max_length} tokens needs {capacity.pages} pages of KV, the "
                f"device has room for {runner.step.state.capacity.pages}. Lower max_requests or max_length."
            )
        self.memory_plan = plan
        return CapturedStep(runner, self._device, vocabulary)

    @property
    def pool_share(self) -> float:
        """Share of the pool's pages in use, 0.0 to 1.0."""
        session = self._session
        return 0.0 if session is None else session.pool_share

    def _take_turns(self, client: Client, *, take: bool) -> Output | None:
        me = threading.get_ident()
        self._require_outside()
        while True:
            try:
                with self._turn:
                    while True:
                        if take and client.failure is not None:
                            raise client.failure
                        if client.closed:
                            return None
                        output = client.take() if take else None
                        if output is not None or (take and not client.waits):
                            return output
                        if self._driver is None and (client.waits or self._commands):
                            self._driver = me
                            break
                        self._turn.wait()
                self._iterate()
                if not take:
                    return None
            finally:
                self._hand_over(me)

    def _iterate(self) -> None:
        """Carry out the commands that have come in, and run an iteration. By the driver."""
        session = None
        try:
            self._run_commands()
            session = self._session
            if session is None and self._owners:
                raise EngineFailedError("Cleaning up after a failed iteration was interrupted. Generate again.")
            if session is None or not session.busy:
                return
            outputs = session.advance()
            with self._turn:
                for output in outputs:
                    owner = self._owners.get(output.request)
                    if owner is not None:
                        owner.deliver(output)
                        if output.ended:
                            del self._owners[output.request]
            self._run_commands()  # those of what the iteration called
        except BaseException as error:
            self._fail(error)
            raise

    def _command(self, action: Callable[[], None]) -> None:
        """Carry `action` out between two iterations, and raise its error.

        From within an iteration, as by a tokenizer's decode, it is queued and done at the iteration's end.
        """
        command, me = _Command(action), threading.get_ident()
        self._commands.append(command)
        if self._driver == me:
            return
        try:
            with self._turn:
                while not command.done and self._driver is not None:
                    self._turn.wait()
                if not command.done:
                    self._driver = me
            if self._driver == me:
                self._carry_out(me)
        finally:
            self._hand_over(me)
        if command.error is not None:
            raise command.error

    def _carry_out(self, me: int) -> None:
        """Carry out all commands, as the driver, and hand over."""
        try:
            self._run_commands()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._hand_over(me)

    def _require_outside(self) -> None:
        if self._driver == threading.get_ident():
            raise EngineBusyError(
                "This was called from within an iteration, by something that it calls, such as a tokenizer's decode. "
                "Call it from outside of it."
            )

    def _run_commands(self) -> None:
        while self._commands:
            self._commands[0].run()
            self._commands.popleft()
            with self._turn:
                self._turn.notify_all()

    def _hand_over(self, me: int) -> None:
        if self._driver == me:
            self._driver = None  # without the lock, which an interrupt might keep from being taken
        with self._turn:
            self._turn.notify_all()

    def _session_for(self, requests: Sequence[Request]) -> Session:
        longest = max(request.max_length for request in requests)
        sized_by_model = self.config.max_length is None and self.config.pool_tokens is None
        if self._session is not None and not self._owners and sized_by_model and self._session.room < longest:
            # Rotary models go on behind their positions. While others generate, their state cannot change.
            self._drop_session()
        if self._session is None:
            # In inference mode the state would be made so that no later call outside of it could write to it.
            with torch.inference_mode(False), self._stream.active():
                self._session = self._new_session(max(self._longest, longest))
            self._longest = max(self._longest, longest)
        return self._session

    def _drop_session(self) -> None:
        """Give the state back; nothing runs."""
        if self._session is not None:
            self._session.shut_down()
        self._session = self.memory_plan = None

    def _new_session(self, longest: int) -> Session:
        config = self.config
        capacity = engine_capacity(self.target, config, self._drafters, self._device, longest)
        runner, self.memory_plan = build_runner(self.target, config, self._drafters, capacity, self._device)
        pool = runner.step.state.pool
        host_pages = 0
        if config.host_pool_tokens is not None:
            host_pages = config.host_pool_tokens // config.page_size * len(self.target.layout.groups)
        elif self._device.memory is not None:  # else the pool lies in host memory itself
            host_pages = int(available_host_bytes() * _HOST_TIER_SHARE) // (pool.shape[1] * pool.itemsize)
        self._chooser = self._chooser or chooser_for(config, self.target.iteration_time)
        tier = HostTier(self._stream, pool, host_pages)
        return Session(config, runner, self._stream, tier, self._drafters, self._chooser)

    def _drop(self, client: Client, requests: Collection[Request]) -> None:
        with self._turn:
            client.forget(requests)
            owned = [request for request in requests if self._owners.get(request) is client]
            for request in owned:
                del self._owners[request]
            self._turn.notify_all()
        for request in owned:
            if self._session is not None:
                self._session.cancel(request)

    def _leave(self, client: Client) -> None:
        if client not in self._clients:
            return
        try:
            if self._session is not None and len(self._clients) == 1:
                self._session.settle()
            self._drop(client, client.live)
        finally:
            with self._turn:
                self._clients.remove(client)
                self._counting = self._counting and bool(self._clients)

    def _fail(self, error: BaseException) -> None:
        """Drop everything after an iteration ended in the middle: what host and device know may differ by now."""
        session, self._session = self._session, None
        with self._turn:
            for client in self._clients:
                client.closed = True
                client.forget(client.live)
                client.failure = EngineFailedError(
                    f"An iteration that this generation shared failed in thread {threading.current_thread().name!r} "
                    f"({type(error).__name__}: {error}), and its texts were dropped. Generate them again."
                )
                client.failure.__cause__ = error
            self._clients.clear()
            self._owners.clear()
            self._counting = False
        if session is not None:
            session.reset()
            self._session = session  # not if the reset was interrupted: the next request builds a new one
