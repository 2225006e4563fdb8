"""The loop: requests in, final tokens out.

The host plans and enqueues an iteration while the previous one runs, and reads results one iteration late (paper,
delayed verification). No request sits an iteration out for that: what it does next does not depend on what was
accepted.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineStalledError, PoolTooSmallError
from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.drafters import Drafter, NgramDrafter, cycles_of
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.inputs import InputPacker, Work
from sparsespec_compile.runtime.device.interface import Stream
from sparsespec_compile.runtime.device.processing import NOTHING, no_token_left
from sparsespec_compile.runtime.device.state import State
from sparsespec_compile.runtime.device.step import NO_TOKEN, Step
from sparsespec_compile.runtime.device.weights import WeightsRecord
from sparsespec_compile.runtime.host.client import Output
from sparsespec_compile.runtime.host.cycle_chooser import CycleChooser, Foresight, Pace
from sparsespec_compile.runtime.host.frames import Flight
from sparsespec_compile.runtime.host.host_tier import HostTier
from sparsespec_compile.runtime.host.kv_cache import KVCacheManager
from sparsespec_compile.runtime.host.phases import GROUPED_ROWS, Phases
from sparsespec_compile.runtime.host.ranks import AgreedChooser, Agreement
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.scheduler import Limits, Scheduler
from sparsespec_compile.runtime.host.stats import Occupancy, Stats, StatsRecorder

_LOOKING, _FIRST_LOOKS = 0.01, 0.03
"""Share of the decoding time in which the host may look n-grams up in texts, and seconds before that. One look takes
milliseconds, as long as a GPU takes for an iteration of one request, which would then wait for the host."""

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
        weights: notices that K/V computed before are no longer the model's.
        chooser: chooses the cycle as requests run; None = it stays as it is.
        agreement: with the ranks that share the model; None = it is whole.
    """

    def __init__(
        self,
        config: SpecConfig,
        runner: StepRunner,
        stream: Stream,
        tier: HostTier,
        drafters: Sequence[Drafter],
        weights: WeightsRecord,
        chooser: CycleChooser | AgreedChooser | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self._config = config
        self._runner = runner
        self._stream = stream
        self._tier = tier
        self._drafters = tuple(drafters)
        self._weights = weights
        self._chooser = chooser
        self._agreement = agreement
        self._ngrams = next((drafter for drafter in drafters if isinstance(drafter, NgramDrafter)), None)
        self._foresight = Foresight(config.most_draft_tokens)
        self._inputs = runner.step.inputs
        self._packer = InputPacker(self._inputs.sizes)
        self._recorder = StatsRecorder(runner.step.state.layout, config)
        self._flight = Flight(stream, self._inputs.flat, runner.step.results, depth=2 if config.overlap else 1)
        self._scheduler = self._new_scheduler()
        self._landed_at = math.nan
        self._idle_iterations = 0
        self._pace = Pace()
        self._decoded = self._looked = 0.0  # seconds of iterations, and of looks at texts
        self._added: dict[Request, float] = {}
        self._processed_slots: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return self._scheduler.busy or len(self._flight) > 0

    @property
    def occupancy(self) -> Occupancy:
        """What there is at present; may be read while another thread drives."""
        scheduler, page = self._scheduler, self.state.pool
        pool, cycle = scheduler.kv_cache.pool, scheduler.cycle
        return Occupancy(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pool_share=1 - pool.free / max(pool.pages, 1),
            host_bytes=self._tier.held * page.shape[1] * page.itemsize,
            cycle=(cycle.name, cycle.drafts),
        )

    def restart(self) -> Stats:
        """Begin new counts, while nothing is running. Returns them; they go on changing."""
        self._recorder = StatsRecorder(self.state.layout, self._config)
        self._landed_at, self._idle_iterations = math.nan, 0
        self._scheduler.kv_cache.pages_offloaded = 0
        self._pace = Pace()
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
            remedy = "raise SpecConfig.max_length or pool_tokens."
            if self.room == self._config.max_length:
                remedy = f"raise SpecConfig.max_length, which is {self.room}."
            elif self._config.max_length is None:
                remedy += " (A text beyond the model's positions may start while no other is running.)"
            raise PoolTooSmallError(
                f"A request of {longest} tokens, prompt and max_new_tokens, is longer than the {self.room} that the "
                f"engine's state has room for. Lower max_new_tokens, shorten the prompt, or {remedy}"
            )

    def prepare(self, requests: Sequence[Request]) -> None:
        """Prepare for further requests: capture the steps that they will need, where steps are captured.

        Raises:
            PoolTooSmallError: there is no memory for them.
        """
        self._follow_weights()
        waiting = len(self._scheduler.running) + len(self._scheduler.waiting)
        slots = min(self._scheduler.limits.slots, waiting + len(requests))
        with self._stream.active():  # captures clear the steps' inputs, after the steps under way
            filters = any(request.needs_whole_rows for request in requests)
            processing = [request.processing for request in requests if request.processing is not None]
            self._runner.prepare(decoding_rows(slots, self._config), filters=filters, processing=processing)

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
            EngineStalledError: too many iterations have made no progress.
        """
        started = time.perf_counter()
        for request in self._scheduler.admit():
            self._packer.admit(request.slot, request.max_length, request.params)
            self._place_processing(request)
            request.stats.admitted_seconds = started - self._added[request]
        work = self._scheduler.plan()
        self._place_taken()
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
    def step(self) -> Step:
        """What its iterations run."""
        return self._runner.step

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

    def forget_prefixes(self) -> None:
        """Let no page be found by later requests."""
        self._scheduler.kv_cache.forget_prefixes()

    def forget_ended_texts(self) -> None:
        """Let n-grams be searched in no text that has ended."""
        free = self._scheduler.free_slots
        with self._stream.active():
            self.state.length[torch.tensor(free, device=self.state.device)] = 0

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
            prefix_caching=config.prefix_caching,
        )
        phases = Phases(limits.cycle, config.schedule, scored)
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

    def _follow_weights(self) -> None:
        """Make pages of other weights unfindable, and copies of them anew, where weights have changed.

        Between generations their bits are compared. While requests run, versions of tensors are, for pages alone.
        """
        running, drafts = self._scheduler.busy, self._runner.step.drafts
        copies = None if drafts is None or running else drafts.copies
        if not self._config.prefix_caching:
            if copies is not None:  # to copy takes as long as to compare
                copies.outdate()
            return
        unknown = not self._weights.known  # copies may be those of another session, made of other weights
        with nullcontext() if running else self._stream.active():
            changed = self._weights.changed(look_inside=not running)
        if self._agreement is not None:  # weights of which one rank alone holds what has changed
            changed = self._agreement.least(int(not changed)) == [0]
        if changed:
            self.forget_prefixes()
        if copies is not None and (changed or unknown):
            copies.outdate()

    def _place_taken(self) -> None:
        """Place the prompt tokens whose K/V are there already; the others come with their rows."""
        for request in self._scheduler.kv_cache.taken:
            count = request.stats.cached_tokens
            tokens = self._stream.device.host_buffer((count,), torch.int64)
            tokens.copy_(torch.tensor(request.prompt[:count], device="cpu"))
            self._stream.copy((self.state.tokens[request.slot, :count], tokens))
            self._recorder.stats.cached_tokens += count

    def _place_processing(self, request: Request) -> None:
        """Place what is done to its logits; a slot whose former owner asked for something must do nothing again."""
        if request.processing is None and request.slot not in self._processed_slots:
            return
        row = (request.processing or NOTHING).row()
        values = self._stream.device.host_buffer(row.shape, torch.int32)
        values.numpy()[:] = row
        self._stream.copy((self.state.processing[request.slot], values))
        (self._processed_slots.discard if request.processing is None else self._processed_slots.add)(request.slot)

    def _enqueue(self, work: list[tuple[Request, Work]]) -> list[Output]:
        cycle = self._scheduler.cycle
        wants_logprobs = any(request.logprobs for request, _ in work)
        variant = self._runner.step.variant(
            [item for _, item in work],
            cycle,
            logprobs=wants_logprobs,
            filters=any(request.needs_whole_rows for request, _ in work),
            processing=[request.processing for request, _ in work if request.processing is not None],
        )
        of_slot = {item.slot: request.processors for request, item in work if request.processors is not None}
        rows, logits = self._packer.pack([item for _, item in work], self._scheduler.kv_cache.updates)
        if self._agreement is not None:
            self._agreement.planned(self._packer.flat)
        frame = self._flight.take()
        frame.work, frame.cycle = work, cycle
        frame.upload(self._packer.flat, self._inputs.flat)
        drafts = self._runner.step.drafts
        if variant.draft_weights and drafts is not None:
            drafts.copies.follow(self._stream)
        failed: list[Output] = []
        try:
            self._stream.run(partial(self._runner, rows, logits, variant, of_slot))
        except PoolTooSmallError as error:
            more = variant.logprobs or variant.processed
            if not more or self._agreement is not None:  # other ranks may have had the memory
                raise
            # There is no memory for a step that gives log-probabilities or processes logits: the requests that want it
            # end, and no others.
            wanting = [request for request, _ in work if request.logprobs or request.processing is not None]
            failed = [self._fail(request, error) for request in wanting if not request.finished]
            variant = replace(variant, logprobs=False, processed=False, no_repeats=False)
            self._stream.run(partial(self._runner, rows, logits, variant, of_slot))
        step = self._runner.step
        frame.download(step.results, logprobs=variant.logprobs, drafted=step.proposals > 0)
        frame.logprobs, frame.draft_weights = variant.logprobs, variant.draft_weights
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
        drafted = frame.drafted()
        answered = time.perf_counter()
        rows = sum(item.rows for _, item in frame.work)
        self._recorder.begin_iteration(rows, frame.cycle, draft_weights=frame.draft_weights)
        outputs: list[Output] = []
        for request, item in frame.work:
            if request.finished:
                continue  # it ended in an earlier iteration, which was read after this one had been enqueued
            if item.mode == Mode.DRAFT:
                self._recorder.record_draft(request, request.told_drafted if item.offset < 0 else item.offset)
                now_drafted = drafted[item.slot] if item.offset < 0 else item.offset + 1
                if item.offset < 0:
                    self._judged_proposals(request, item, now_drafted)
                request.told_drafted = now_drafted
                continue
            request.told_drafted = 0
            count, *drawn = tokens[item.slot]
            cached = request.cached
            failed = _undrawn(request, drawn[:count])
            sound = drawn[: count if failed is None else failed[0]]
            added = request.append(sound, all_logprobs[item.slot] if request.logprobs else [])
            if failed is not None and not request.finished:
                request.fail(failed[1])
            judged = drafted[item.slot] if item.offset < 0 else item.rows - 1
            if item.mode == Mode.VERIFY:
                request.unread -= item.rows
                if self._chooser is not None and count and item.drafter is not None:
                    # The end of a text cuts its last cycle off; nothing says that the next draft was wrong.
                    right = min(count - 1, len(added))
                    self._chooser.verified(item.drafter, right if request.finished else judged, right)
            self._recorder.record(request, item, cached, len(added), judged, cut=len(added) < count)
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

    def _judged_proposals(self, request: Request, item: Work, drafted: int) -> None:
        """Tell the chooser how many proposals were right in an iteration after which there are so many drafts."""
        before = request.told_drafted
        # The device drops rows for more drafts than a cycle may have, and beyond the end of the text.
        rows = min(item.rows, item.most - before, request.max_length - 1 - request.cached - before)
        if self._chooser is not None and self._ngrams is not None and rows > 1:
            self._chooser.verified(self._ngrams, rows - 1, drafted - before - 1)

    def _choose_drafts(self, work: list[tuple[Request, Work]]) -> None:
        """Report the iteration's time to the chooser, and now and then apply its choice."""
        if self._chooser is None:
            return
        now = time.perf_counter()
        seconds, self._landed_at = now - self._landed_at, now
        decoding = [request.reach for request in self._scheduler.running if request.phase is not None]
        steady = len(self._flight) == self._flight.depth - 1
        if steady and not any(item.mode == Mode.PREFILL for _, item in work) and not math.isnan(seconds):
            self._chooser.took(seconds, decoding)
        if not math.isnan(seconds):
            self._decoded += seconds
        if self._pace.other_load(len(decoding)):
            self._chooser.began()
        iteration = self._recorder.stats.iterations
        if self._pace.due(iteration, len(decoding)):
            self._foresee()
            chosen = self._chooser.choose(decoding)
            self._pace.chose(iteration, len(decoding), chosen, changed=chosen != self._scheduler.cycle)
            self._scheduler.set_cycle(chosen)

    def _foresee(self) -> None:
        """Report to the chooser how many n-gram drafts would be accepted, while another drafter is in use."""
        if self._chooser is None or self._ngrams is None or self._scheduler.cycle.drafter == self._ngrams:
            return
        if self._looked > _LOOKING * self._decoded + _FIRST_LOOKS:
            return
        began = time.perf_counter()
        decoding = [request for request in self._scheduler.running if request.output]
        for drafts, accepted in self._foresight.look(decoding):
            self._chooser.verified(self._ngrams, drafts, accepted)
        self._looked += time.perf_counter() - began

    def _clock(self, request: Request, *, first: bool) -> None:
        if first and request.output:
            request.stats.first_token_seconds = time.perf_counter() - self._added[request]
        if request.finished:
            request.stats.seconds = time.perf_counter() - self._added.pop(request)

    def _unblock(self) -> list[Output]:
        """Resolve a standstill, with nothing planned or in flight: wait for pages to move, or end a request."""
        kv_cache = self._scheduler.kv_cache
        if kv_cache.moving:
            kv_cache.tier.wait()
        else:
            request = self._scheduler.give_up()
            if request is not None:
                self._clock(request, first=False)
                return [Output(request, [], True)]
        return []


def _undrawn(request: Request, tokens: Sequence[int]) -> tuple[int, Exception] | None:
    """The first of these final tokens of a request that could not be drawn, and why; None = all could."""
    first = len(request.prompt) + len(request.output)
    if request.processors is not None:
        failed = request.processors.failed(first, first + len(tokens))
        return None if failed is None else (failed[0] - first, failed[1])
    if request.processing is not None and NO_TOKEN in tokens:
        place = list(tokens).index(NO_TOKEN)
        return place, no_token_left(first + place, -math.inf)
    return None


def decoding_rows(slots: int, config: SpecConfig) -> dict[Promise, Sequence[int]]:
    """Numbers of rows that iterations may have in which up to `slots` requests decode, by what they promise.

    As many verify as their phases hold, half of the slots while their number changes. Where all verify, or all judge
    proposals, "auto" counts the iterations that take hardly longer than those of one row each: others may never occur.
    """
    rows: dict[Promise, set[int]] = {promise: set() for promise in Promise}
    auto = config.draft_tokens == "auto"
    for cycle in cycles_of(config):
        drafts, promise = cycle.drafts, Promise.NO_SCORES
        if cycle.drafter.reads_scores:
            promise = Promise.ONLY_VERIFICATIONS_SCORED
        if cycle.passes:
            together = slots if config.schedule == "in_phase" else -(-slots // (cycle.passes + 1))
            if config.schedule == "grouped":
                together = min(slots, max(together, GROUPED_ROWS // (drafts + 1)))
            most = slots + drafts * (max(together, slots // 2) if auto else together)
            rows[promise].update(range(1, most + 1))
            if cycle.proposals:
                judged = slots * cycle.pass_rows
                rows[Promise.SMALL_TILES].update(range(1, (min(judged, GROUPED_ROWS) if auto else judged) + 1))
        elif drafts and not auto:
            rows[promise].update(range(1, slots * (drafts + 1) + 1))
        elif drafts and slots * (drafts + 1) <= GROUPED_ROWS:
            rows[promise].add(slots * (drafts + 1))
    rows[Promise.SMALL_TILES].update(range(1, slots + 1))
    return {promise: sorted(numbers) for promise, numbers in rows.items() if numbers}
