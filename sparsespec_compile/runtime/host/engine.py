"""The owner of a model's state on the device: one loop that serves every caller, from any thread."""

import threading
import weakref
import zlib
from collections.abc import Collection, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, replace

import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineBusyError, EngineFailedError, PoolTooSmallError, SamplingError
from sparsespec_compile.runtime.build import (
    MemoryPlan,
    Target,
    build_runner,
    capacity_for,
    engine_capacity,
    pages_of,
)
from sparsespec_compile.runtime.device.captured_step import CapturedStep
from sparsespec_compile.runtime.device.devices import open_device
from sparsespec_compile.runtime.device.drafters import cycles_of, drafters_of
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.interface import Device
from sparsespec_compile.runtime.device.state import Capacity
from sparsespec_compile.runtime.device.weights import DraftGraph, WeightsRecord
from sparsespec_compile.runtime.host.client import Client, Output, Turns
from sparsespec_compile.runtime.host.cycle_chooser import CycleChooser, chooser_for
from sparsespec_compile.runtime.host.host_tier import HostTier, available_host_bytes
from sparsespec_compile.runtime.host.ranks import AgreedChooser, Agreement
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.session import Session
from sparsespec_compile.runtime.host.stats import Occupancy, Stats

_HOST_TIER_SHARE = 0.5
"""Of the free host memory, for requests that leave the device."""


class Engine:
    """Runs requests through the graph until their texts are complete.

    One thread at a time drives the engine (`Turns`): it carries out the commands that have come in (submit, cancel,
    close, stop) and then one iteration for the requests of all clients. Any thread may become the driver, for as long
    as it waits for an output of its own. So scheduler, KV cache and step are only ever touched by one thread. A command
    waits for one iteration, or for the building of the state and the capture of steps where another command asks for
    those.

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
        if config.draft_proposals == "auto" and target.iteration_time is None:
            config = replace(config, draft_proposals=0)  # rows of proposals are taken for nearly free, and may not be
        self.config = config
        self.stats = Stats(config.most_draft_tokens)
        self.memory_plan: MemoryPlan | None = None
        self._drafters = drafters_of(config)
        self._session: Session | None = None
        self._longest = 0  # tokens of the longest request for which a state was built
        # What it learns of device and texts is kept from call to call.
        self._chooser: CycleChooser | AgreedChooser | None = None
        self._turns = Turns(self._fail)  # `changed` guards what follows, and is notified of every change
        self._clients: list[Client] = []
        self._owners: dict[Request, Client] = {}
        self._counting = False  # whether `stats` are of clients that are open
        self._agreement = None if target.ranks is None else Agreement(target.ranks, config.rank_timeout)
        if self._agreement is not None:
            weakref.finalize(self, self._agreement.close)

    def client(self, *, open_ended: bool = False) -> Client:
        """A new client; it takes part once it has submitted a request."""
        return Client(self, open_ended=open_ended)

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
            self._agree_on(requests)
            session = self._session_for(requests)
            session.require_room(requests)
            if not self._counting:
                self.stats, self._counting = session.restart(), True
            with self._among_ranks():
                session.prepare(requests)
            with self._turns.changed:
                client.own(requests)
                self._owners.update(dict.fromkeys(requests, client))
            for request in requests:
                session.add(request)

        self._turns.require_outside()
        with self._turns.changed:  # from here on `stop` ends it
            joins = not client.closed and client not in self._clients
            if joins:
                self._clients.append(client)
        try:
            self._turns.command(action)
        except Exception:  # refused: a client that only a traceback still references must not count as open
            with self._turns.changed:
                if joins and not client.live and client in self._clients:
                    self._clients.remove(client)
                    self._counting = self._counting and bool(self._clients)
            raise

    def cancel(self, client: Client, requests: Sequence[Request]) -> None:
        """`Client.cancel`."""
        if self._turns.mine:  # called from within an iteration: the rest is done at its end
            for request in requests:
                if self._owners.get(request) is client:
                    request.cancel()
        self._turns.command(lambda: self._drop(client, requests))

    def close(self, client: Client) -> None:
        """`Client.close`."""
        with self._turns.changed:
            client.closed = True
            self._turns.changed.notify_all()
        if client in self._clients:
            self._turns.command(lambda: self._leave(client))
        if not self._turns.mine:
            self._device.current().wait(self._stream.record())

    def finish(self, client: Client) -> bool:
        """Close a client if it is done; returns whether it was."""
        with self._turns.changed:
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
        self._turns.leave(lambda: self._leave(client))

    def carry_out_commands(self) -> None:
        """Run the queued commands, if no other thread drives."""
        self._turns.command(lambda: None)

    def stop(self) -> None:
        """Close every open client, of any thread. Threads that wait for outputs return."""
        with self._turns.changed:
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

        self._turns.require_outside()
        self._turns.command(action)

    def forget_texts(self) -> None:
        """Let later requests find nothing of ended ones, as for measuring them: neither K/V nor n-grams."""

        def action() -> None:
            if self._session is not None:
                self._session.forget_prefixes()
                self._session.forget_ended_texts()

        self._turns.require_outside()
        self._turns.command(action)

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
        self._turns.require_outside()
        layout, stream = self.target.layout, self._device.current()
        pages = max(max_requests, 2) * len(layout.groups) * layout.pages_for(max(max_length, 2))
        capacity = capacity_for(self.config, self._drafters, max_requests, max_length, pages)
        built: list[tuple[StepRunner, MemoryPlan]] = []

        def action() -> None:  # between iterations, as it measures what a step takes
            with torch.inference_mode(False), stream.active(), self._among_ranks():
                config = replace(self.config, draft_proposals=0)  # each draft of a loop outside is a row of its own
                built.append(
                    build_runner(self.target, config, self._drafters, capacity, self._device, pages, self._agreement)
                )

        self._turns.command(action)
        ((runner, plan),) = built
        if runner.step.state.capacity.pages < capacity.pages:
            if self.target.drafts is not None:
                self.target.drafts.copies.give_back(runner.step)
            raise PoolTooSmallError(
                f"A step for {max_requests} texts of {max_length} tokens needs {capacity.pages} pages of KV, the "
                f"device has room for {runner.step.state.capacity.pages}. Lower max_requests or max_length."
            )
        self.memory_plan = plan
        return CapturedStep(runner, self._device, vocabulary)

    @property
    def drafts(self) -> DraftGraph | None:
        """The graph for iterations of nothing but drafts; None where the state, once there is one, left it out."""
        session = self._session
        return self.target.drafts if session is None else session.step.drafts

    @property
    def occupancy(self) -> Occupancy:
        """What the engine holds at present, from any thread."""
        session = self._session
        return Occupancy() if session is None else session.occupancy

    def _take_turns(self, client: Client, *, take: bool) -> Output | None:
        me = threading.get_ident()
        self._turns.require_outside()
        while True:
            try:
                with self._turns.changed:
                    while True:
                        if take and client.failure is not None:
                            raise client.failure
                        if client.closed:
                            return None
                        output = client.take() if take else None
                        if output is not None or (take and not client.waits and not client.open_ended):
                            return output
                        if self._turns.driver is None and (client.waits or self._turns.commanded):
                            self._turns.driver = me
                            break
                        self._turns.changed.wait()
                self._iterate()
                if not take:
                    return None
            finally:
                self._turns.hand_over(me)

    def _iterate(self) -> None:
        """Carry out the commands that have come in, and run an iteration. By the driver."""
        session = None
        try:
            self._turns.run_commands()
            session = self._session
            if session is None and self._owners:
                raise EngineFailedError("Cleaning up after a failed iteration was interrupted. Generate again.")
            if session is None or not session.busy:
                return
            with self._among_ranks():
                outputs = session.advance()
            with self._turns.changed:
                for output in outputs:
                    owner = self._owners.get(output.request)
                    if owner is not None:
                        owner.deliver(output)
                        if output.ended:
                            del self._owners[output.request]
            self._turns.run_commands()  # those of what the iteration called
        except BaseException as error:
            self._fail(error)
            raise

    def _session_for(self, requests: Sequence[Request]) -> Session:
        longest = max(request.max_length for request in requests)
        sized_by_model = self.config.max_length is None and self.config.pool_tokens is None
        if self._session is not None and not self._owners and sized_by_model and self._session.room < longest:
            # Rotary models may exceed their positions. The state cannot change while other requests use it.
            self._drop_session()
        if self._session is None:
            # Tensors that are created in inference mode could not be written to outside of it later.
            with torch.inference_mode(False), self._stream.active(), self._among_ranks():
                self._session = self._new_session(max(self._longest, longest), requests)
            self._longest = max(self._longest, longest)
        return self._session

    def _drop_session(self) -> None:
        """Give the state back; nothing runs."""
        if self._session is not None:
            self._session.shut_down()
            if self.target.drafts is not None:
                self.target.drafts.copies.give_back(self._session.step)
        self._session = self.memory_plan = None

    def _new_session(self, longest: int, requests: Sequence[Request]) -> Session:
        config, target = self.config, self.target
        capacity = engine_capacity(target, config, self._drafters, self._device, longest)
        asked = pages_of(target.layout, config, (request.max_length for request in requests))
        capacity = Capacity(*self._least(*astuple(capacity)))
        runner, self.memory_plan = build_runner(
            target, config, self._drafters, capacity, self._device, asked, self._agreement
        )
        pool = runner.step.state.pool
        host_pages = 0
        if config.host_pool_tokens is not None:
            host_pages = config.host_pool_tokens // config.page_size * len(self.target.layout.groups)
        elif self._device.memory is not None:  # else the pool lies in host memory itself
            host_pages = int(available_host_bytes() * _HOST_TIER_SHARE) // (pool.shape[1] * pool.itemsize)
        drafts = runner.step.drafts
        predicted = drafts.iteration_time if drafts is not None and drafts.iteration_time else target.iteration_time
        if self._chooser is None:
            self._chooser = chooser_for(config, predicted)
            if self._chooser is not None and self._agreement is not None:
                self._chooser = AgreedChooser(self._chooser, self._agreement, cycles_of(config))
        (host_pages,) = self._least(host_pages)
        tier = HostTier(self._stream, pool, host_pages, together=self._agreement is not None)
        weights = WeightsRecord(self.target.weights)
        return Session(config, runner, self._stream, tier, self._drafters, weights, self._chooser, self._agreement)

    def _drop(self, client: Client, requests: Collection[Request]) -> None:
        with self._turns.changed:
            client.forget(requests)
            owned = [request for request in requests if self._owners.get(request) is client]
            for request in owned:
                del self._owners[request]
            self._turns.changed.notify_all()
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
            with self._turns.changed:
                self._clients.remove(client)
                self._counting = self._counting and bool(self._clients)

    def _among_ranks(self) -> AbstractContextManager[None]:
        """The context for work in which ranks that share the model may wait for each other."""
        return nullcontext() if self._agreement is None else self._agreement.iteration()

    def _least(self, *numbers: int) -> list[int]:
        """The minimum over all ranks, of each number."""
        return list(numbers) if self._agreement is None else self._agreement.least(*numbers)

    def _agree_on(self, requests: Sequence[Request]) -> None:
        """Make sure that all ranks were given these requests, in the same iteration, and take rank 0's seeds."""
        if self._agreement is None:
            return
        self._agreement.require()
        if any(request.processors is not None and request.processors.by_caller for request in requests):
            raise SamplingError(
                "Functions of the caller's own (logits_processor, prefix_allowed_tokens_fn) are not supported where "
                "ranks share a model: nothing tells whether those of all ranks do the same. Use one device, or the "
                "settings of SamplingParams."
            )
        told = zlib.crc32(repr([request.asked for request in requests]).encode())
        self._agreement.agree(
            "requests (their number, what they ask for, the iteration)",
            [len(requests), told, self._agreement.iterations],
        )
        seeds = self._agreement.share([request.params.seed for request in requests])
        for request, seed in zip(requests, seeds, strict=True):
            request.params = replace(request.params, seed=seed)

    def _fail(self, error: BaseException) -> None:
        """Drop all requests after an interrupted iteration: host and device may disagree about them."""
        if self._agreement is not None:
            self._agreement.fail(f"rank {self._agreement.ranks.rank} failed by {_told(error)}")
        session, self._session = self._session, None
        with self._turns.changed:
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


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
