"""The loop: requests in, final tokens out.

The host plans and enqueues an iteration while the previous one runs, and reads results one iteration late (paper,
delayed verification). No request sits an iteration out for that: what it does next does not depend on what was
accepted.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineStalledError, PoolTooSmallError
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.drafters import Drafter, cycles_of
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.inputs import InputPacker
from sparsespec_compile.runtime.device.interface import Stream
from sparsespec_compile.runtime.device.state import State
from sparsespec_compile.runtime.device.step import Variant
from sparsespec_compile.runtime.device.work import Work, promise_of
from sparsespec_compile.runtime.host.client import Output
from sparsespec_compile.runtime.host.cycle_chooser import CycleChooser
from sparsespec_compile.runtime.host.frames import Flight
from sparsespec_compile.runtime.host.host_tier import HostTier
from sparsespec_compile.runtime.host.kv_cache import KVCacheManager
from sparsespec_compile.runtime.host.phases import GROUPED_ROWS, Phases
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.scheduler import Limits, Scheduler
from sparsespec_compile.runtime.host.stats import Stats, StatsRecorder

_CHOICE_EVERY = 16
"""Iterations between two choices of the cycle."""

_STALLED_ITERATIONS = 2000
"""Iterations in a row without a token, a prompt's row or a page on its way, after which something must be wrong."""


class Session:
    """Runs requests until their texts are complete. One thread at a time uses it: the engine's driver.

    Args:
        config: the settings.
        runner: the step, over the state that requests share.
        stream: what it runs on.
        tier: where requests go when the pool is full.
        drafters: whose state the step keeps up.
        chooser: chooses the cycle as requests run; None = it stays as it is.
    """

    def __init__(
        self,
        config: SpecConfig,
        runner: StepRunner,
        stream: Stream,
        tier: HostTier,
        drafters: Sequence[Drafter],
        chooser: CycleChooser | None = None,
    ) -> None:
        self._config = config
        self._runner = runner
        self._stream = stream
        self._tier = tier
        self._drafters = tuple(drafters)
        self._chooser = chooser
        self._inputs = runner.step.inputs
        self._packer = InputPacker(self._inputs.sizes)
        self._recorder = StatsRecorder(runner.step.state.layout, config)
        self._flight = Flight(stream, self._inputs.flat, runner.step.results, depth=2 if config.overlap else 1)
        self._scheduler = self._new_scheduler()
        self._landed_at = math.nan
        self._idle_iterations = 0
        self._added: dict[Request, float] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self._scheduler.busy or len(self._flight) > 0

    @property
    def pool_share(self) -> float:
        """Share of the pool's pages in use."""
        pool = self._scheduler.kv_cache.pool
        return 1 - pool.free / max(pool.pages, 1)

    def restart(self) -> Stats:
        """Count anew, for requests to come; nothing is running. Returns the new counts, which go on changing."""
        self._recorder = StatsRecorder(self.state.layout, self._config)
        self._landed_at, self._idle_iterations = math.nan, 0
        self._scheduler.kv_cache.pages_offloaded = 0
        if self._chooser is not None:
            self._chooser.began()
            self._scheduler.set_cycle(self._chooser.current)
        return self._recorder.stats

    def require_room(self, requests: Sequence[Request]) -> None:
        """Raises PoolTooSmallError for a request that the state can never hold."""
        kv_cache = self._scheduler.kv_cache
        # With sliding windows the most pages are not those of the longest text: chunks of long prompts count too.
        largest = max(requests, key=kv_cache.largest)
        if not kv_cache.fits(largest):
            remedy = "free memory of the device, raise SpecConfig.memory_fraction or lower max_requests"
            if self._config.pool_tokens is not None:
                remedy = "raise SpecConfig.pool_tokens"
            raise PoolTooSmallError(
                f"A request of {largest.max_length} tokens, prompt and max_new_tokens, needs "
                f"{kv_cache.largest(largest)} pages of KV, the pool holds {kv_cache.pool.pages}. Lower max_new_tokens, "
                f"shorten the prompt, or {remedy}."
            )
        longest = max(request.max_length for request in requests)
        if longest > self.room:
            raise PoolTooSmallError(
                f"A request of {longest} tokens, prompt and max_new_tokens, is longer than the {self.room} that the "
                "engine's state has room for. Lower max_new_tokens, shorten the prompt, or raise SpecConfig.max_length "
                "or pool_tokens. (A text beyond the model's positions may start while no other is running.)"
            )

    def prepare(self, requests: int) -> None:
        """Capture the steps that so many more requests will need, where steps are captured.

        Raises:
            PoolTooSmallError: there is no memory for them.
        """
        waiting = len(self._scheduler.running) + len(self._scheduler.waiting)
        slots = min(self._scheduler.limits.slots, waiting + requests)
        with self._stream.active():  # captures clear the steps' inputs, behind the steps under way
            self._runner.prepare(slots, decoding_rows(slots, self._config))

    def add(self, request: Request) -> None:
        """Queue a request for which there is room."""
        self._added[request] = time.perf_counter()
        self._scheduler.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request where it stands; its output so far stays."""
        if request in self._added:
            request.cancel()
            self._scheduler.cancel(request)
            self._clock(request, first=False)

    def advance(self) -> list[Output]:
        """Enqueue one iteration and read the results of the one that has been under way longest, if it is time.

        Raises:
            EngineStalledError: nothing has come forward for too many iterations.
        """
        started = time.perf_counter()
        for request in self._scheduler.admit():
            self._packer.admit(request.slot, request.max_length, request.params)
        work = self._scheduler.plan()
        outputs: list[Output] = []
        if work or self._scheduler.kv_cache.updates:
            outputs += self._enqueue(work)
        self._recorder.stats.pages_offloaded = self._scheduler.kv_cache.pages_offloaded
        self._recorder.stats.host_seconds += time.perf_counter() - started
        if len(self._flight) == self._flight.depth or (not work and len(self._flight)):
            outputs += self._land()
        elif not work and self._scheduler.busy:
            outputs += self._unblock()
        self._watch(work, outputs)
        return outputs

    @property
    def state(self) -> State:
        """The state that requests share."""
        return self._runner.step.state

    @property
    def room(self) -> int:
        """Tokens of the longest text that the state has room for."""
        return self.state.capacity.tokens

    def settle(self) -> None:
        """Finish after the last request: write the pages still in use into the counts, then give all of them back."""
        stats, kv_cache = self._recorder.stats, self._scheduler.kv_cache
        stats.pages_held = kv_cache.pool.pages - kv_cache.pool.free + kv_cache.tier.held
        for request in list(self._added):
            self.cancel(request)
        while len(self._flight):
            self._land()
        kv_cache.clear()

    def reset(self) -> None:
        """Drop every request and forget what was under way, as after an iteration that failed in the middle."""
        self._flight = Flight(self._stream, self._inputs.flat, self._runner.step.results, depth=self._flight.depth)
        self._scheduler.clear()
        self._scheduler = self._new_scheduler()
        self._added.clear()

    def shut_down(self) -> None:
        """Wait for everything that was enqueued, before the memory of state and host tier is given back."""
        self._stream.record().wait()
        self._tier.clear()

    def _new_scheduler(self) -> Scheduler:
        config, state = self._config, self.state
        # Drafters that read no scores take no room in their buffer.
        reads_scores = any(drafter.reads_scores for drafter in self._drafters)
        scored = state.capacity.score_slots if reads_scores else state.capacity.slots
        slots = min(state.capacity.slots, config.max_requests)  # a state has room for two at least
        limits = Limits(slots, cycles_of(config)[-1], config.prefill_chunk, scored)
        kv_cache = KVCacheManager(
            state.layout,
            state.capacity.pages,
            self._tier,
            updates=self._inputs.sizes.updates,
            cycle_tokens=config.most_draft_tokens + 1,
            prefill_chunk=config.prefill_chunk,
        )
        phases = Phases(limits.cycle.passes, config.schedule, scored)
        scheduler = Scheduler(limits, kv_cache, phases)
        if self._chooser is not None:
            scheduler.set_cycle(self._chooser.current)
        return scheduler

    def _watch(self, work: list[tuple[Request, Work]], outputs: list[Output]) -> None:
        prefilled = any(item.mode == Mode.PREFILL for _, item in work)
        if outputs or prefilled or self._scheduler.kv_cache.moving or not self._scheduler.busy:
            self._idle_iterations = 0
            return
        self._idle_iterations += 1
        if self._idle_iterations >= _STALLED_ITERATIONS:
            raise EngineStalledError(
                f"No token became final in {self._idle_iterations} iterations, with {len(self._scheduler.running)} "
                f"requests running and {len(self._scheduler.waiting)} waiting. This is a fault of the engine: please "
                "report it with the settings. The model can be used again."
            )

    def _enqueue(self, work: list[tuple[Request, Work]]) -> list[Output]:
        promise = promise_of((item for _, item in work), self._runner.step.reads_scores)
        wants_logprobs = any(request.logprobs for request, _ in work)
        variant = Variant(wants_logprobs, promise)
        rows, logits = self._packer.pack([item for _, item in work], self._scheduler.kv_cache.updates)
        frame = self._flight.take()
        frame.work, frame.cycle = work, self._scheduler.cycle
        frame.upload(self._packer.flat, self._inputs.flat)
        failed: list[Output] = []
        try:
            self._stream.run(partial(self._runner, rows, logits, variant))
        except PoolTooSmallError as error:
            if not wants_logprobs:
                raise
            # There is no memory for a step that gives log-probabilities: only the requests that want them end.
            failed = [self._fail(request, error) for request, _ in work if request.logprobs and not request.finished]
            variant = replace(variant, logprobs=False)
            self._stream.run(partial(self._runner, rows, logits, variant))
        frame.download(self._runner.step.results, logprobs=variant.logprobs)
        frame.logprobs = variant.logprobs
        return failed

    def _fail(self, request: Request, error: Exception) -> Output:
        request.fail(error)
        self._scheduler.release(request)
        self._clock(request, first=False)
        return Output(request, [], True)

    def _land(self) -> list[Output]:
        frame = self._flight.land()
        asked = time.perf_counter()
        tokens, all_logprobs = frame.read(logprobs=frame.logprobs)
        answered = time.perf_counter()
        self._recorder.begin_iteration(sum(item.rows for _, item in frame.work), frame.cycle)
        outputs: list[Output] = []
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
            if added or request.finished:
                outputs.append(Output(request, added, request.finished))
        self._choose_drafts(frame.work)
        self._flight.give_back(frame)
        self._recorder.stats.waited_seconds += answered - asked
        self._recorder.stats.host_seconds += time.perf_counter() - answered
        return outputs

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
        if self._recorder.stats.iterations % _CHOICE_EVERY == 1:
            self._scheduler.set_cycle(self._chooser.choose(decoding))

    def _clock(self, request: Request, *, first: bool) -> None:
        if first and request.output:
            request.stats.first_token_seconds = time.perf_counter() - self._added[request]
        if request.finished:
            request.stats.seconds = time.perf_counter() - self._added.pop(request)

    def _unblock(self) -> list[Output]:
        """Nothing can be planned and nothing is under way: wait for pages to move, or end a request."""
        kv_cache = self._scheduler.kv_cache
        if kv_cache.moving:
            kv_cache.tier.wait()
        else:
            request = self._scheduler.give_up()
            if request is not None:
                self._clock(request, first=False)
                return [Output(request, [], True)]
        return []


def decoding_rows(slots: int, config: SpecConfig) -> int:
    """Rows of an iteration in which every slot decodes, and as many as may verify; half while their number changes."""
    most = config.most_draft_tokens
    if not cycles_of(config)[-1].passes:
        return slots * (most + 1)  # without draft iterations all verify
    together = slots if config.schedule == "in_phase" else -(-slots // (most + 1))
    if config.schedule == "grouped":
        together = min(slots, max(together, GROUPED_ROWS // (most + 1)))
    return slots + most * (max(together, slots // 2) if config.draft_tokens == "auto" else together)
