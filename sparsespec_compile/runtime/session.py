"""The loop: requests in, final tokens out.

The host plans and enqueues an iteration while the one before runs, and reads results one iteration late (paper, delayed
verification). No request sits an iteration out for that: what it does next does not depend on what was accepted.
"""

import math
import time
from collections.abc import Iterator
from functools import partial

from sparsespec_compile.errors import EngineBusyError
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.capture import StepRunner
from sparsespec_compile.runtime.cycle_chooser import CycleChooser
from sparsespec_compile.runtime.device.interface import Stream
from sparsespec_compile.runtime.frames import Flight
from sparsespec_compile.runtime.inputs import InputPacker
from sparsespec_compile.runtime.request import Request
from sparsespec_compile.runtime.scheduler import Scheduler
from sparsespec_compile.runtime.stats import StatsRecorder
from sparsespec_compile.runtime.step import Variant
from sparsespec_compile.runtime.work import Work, promise_of

_CHOICE_EVERY = 16
"""Iterations between two choices of the cycle."""

Output = tuple[Request, list[int]]
"""A request and tokens of it that are final; no tokens when it ended without a new one."""


class Session:
    """Runs requests until their texts are complete. One at a time works on a state.

    Args:
        scheduler: who runs.
        runner: the step.
        stream: what it runs on.
        recorder: counts what happens.
        chooser: chooses the cycle as requests run; None = it stays as it is.
        overlap: whether an iteration is enqueued before the results of the one before are read.

    Attributes:
        closed: whether it was ended for good.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        stream: Stream,
        recorder: StatsRecorder,
        chooser: CycleChooser | None = None,
        *,
        overlap: bool,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._stream = stream
        self._recorder = recorder
        self._chooser = chooser
        self._landed_at = math.nan
        self._inputs = runner.step.inputs
        self._packer = InputPacker(self._inputs.sizes)
        self.closed = False
        self._added: dict[Request, float] = {}
        if chooser is not None:
            chooser.began()
            scheduler.set_cycle(chooser.current)
        self._flight = Flight(stream, self._inputs.flat, runner.step.results, depth=2 if overlap else 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest request that fits, prompt and new ones together."""
        state = self._runner.step.state
        return min(state.capacity.tokens, state.capacity.pages * state.layout.page_size)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self._scheduler.busy or len(self._flight) > 0

    @property
    def pool_share(self) -> float:
        """Share of the pool's pages in use."""
        allocator = self._scheduler.residency.allocator
        return 1 - allocator.free / max(allocator.pages, 1)

    def add(self, request: Request) -> None:
        """Queue a request; it must fit the state's capacity. EngineBusyError when the session was closed."""
        if self.closed:
            raise EngineBusyError("This generation was ended; start another one for more prompts.")
        self._added[request] = time.perf_counter()
        self._scheduler.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request where it stands; its output so far stays."""
        if not request.finished:
            self._scheduler.cancel(request)
            self._clock(request, first=False)

    def advance(self) -> Iterator[Output]:
        """Enqueue one iteration and read the results of the one that has been under way longest, if it is time."""
        started = time.perf_counter()
        for request in self._scheduler.admit():
            self._packer.admit(request.slot, request.max_length, request.params)
        work = self._scheduler.plan()
        if work or self._scheduler.residency.updates:
            self._enqueue(work)
        self._recorder.stats.host_seconds += time.perf_counter() - started
        if len(self._flight) == self._flight.depth or (not work and len(self._flight)):
            yield from self._land()
        elif not work and self._scheduler.busy:
            yield from self._unblock()

    def close(self) -> None:
        """Drop every request and give back all slots and pages. Nothing is busy any more; further calls do nothing."""
        if self.closed:
            return
        self.closed = True
        stats, residency = self._recorder.stats, self._scheduler.residency
        stats.pages_offloaded = residency.pages_offloaded
        stats.pages_held = residency.allocator.pages - residency.allocator.free + residency.tier.held
        while len(self._flight):
            self._flight.give_back(self._flight.land())
        self._scheduler.clear()

    def _enqueue(self, work: list[tuple[Request, Work]]) -> None:
        promise = promise_of((item for _, item in work), self._runner.step.reads_scores)
        variant = Variant(_wants_logprobs(work), promise)
        rows, logits = self._packer.pack([item for _, item in work], self._scheduler.residency.updates)
        frame = self._flight.take()
        frame.work, frame.cycle = work, self._scheduler.cycle
        frame.upload(self._packer.flat, self._inputs.flat)
        self._stream.run(partial(self._runner, rows, logits, variant))
        frame.download(self._runner.step.results, logprobs=variant.logprobs)

    def _land(self) -> Iterator[Output]:
        frame = self._flight.land()
        logprobs = _wants_logprobs(frame.work)
        asked = time.perf_counter()
        tokens, all_logprobs = frame.read(logprobs=logprobs)
        answered = time.perf_counter()
        self._recorder.begin_iteration(sum(item.rows for _, item in frame.work), frame.cycle)
        outputs = []
        for request, item in frame.work:
            if request.finished:
                continue  # it ended in an earlier iteration, which was read after this one had been enqueued
            if item.mode == Mode.DRAFT:
                self._recorder.record_draft(request, item)
                continue
            count, *drawn = tokens[item.slot]
            cached = request.cached
            added = request.append(drawn[:count], all_logprobs[item.slot] if request.logprobs else [])
            if item.mode == Mode.VERIFY:
                request.unread -= item.rows
                if self._chooser is not None and count:
                    # The end of a text cuts its last cycle off; nothing says that the next draft was wrong.
                    right = min(count - 1, len(added))
                    self._chooser.verified(frame.cycle, right if request.finished else item.rows - 1, right)
            self._recorder.record(request, item, cached, len(added), cut=len(added) < count)
            self._clock(request, first=len(request.output) == len(added))
            if request.finished:
                self._scheduler.release(request)
            if added:
                outputs.append((request, added))
        self._choose_drafts(frame.work)
        self._flight.give_back(frame)
        self._recorder.stats.waited_seconds += answered - asked
        self._recorder.stats.host_seconds += time.perf_counter() - answered
        yield from outputs

    def _choose_drafts(self, work: list[tuple[Request, Work]]) -> None:
        """Tell the chooser how long the iteration took, and let it choose, every so often."""
        if self._chooser is None:
            return
        now = time.perf_counter()
        seconds, self._landed_at = now - self._landed_at, now
        decoding = [request.reach for request in self._scheduler.running if request.phase is not None]
        steady = len(self._flight) == self._flight.depth - 1
        if steady and not any(item.mode == Mode.PREFILL for _, item in work) and not math.isnan(seconds):
            self._chooser.took(seconds, decoding)
        if self._recorder.stats.iterations % _CHOICE_EVERY == 0:
            self._scheduler.set_cycle(self._chooser.choose(decoding))

    def _clock(self, request: Request, *, first: bool) -> None:
        if first and request.output:
            request.stats.first_token_seconds = time.perf_counter() - self._added[request]
        if request.finished:
            request.stats.seconds = time.perf_counter() - self._added.pop(request)

    def _unblock(self) -> Iterator[Output]:
        """Nothing can be planned and nothing is under way: wait for pages to move, or end a request."""
        residency = self._scheduler.residency
        if residency.moving:
            residency.tier.wait()
        else:
            request = self._scheduler.give_up()
            self._clock(request, first=False)
            yield request, []


def _wants_logprobs(work: list[tuple[Request, Work]]) -> bool:
    return any(request.logprobs for request, _ in work)
