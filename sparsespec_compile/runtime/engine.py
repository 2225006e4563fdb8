"""Builds what requests run on, to their size, and keeps it from call to call."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineBusyError, PoolTooSmallError
from sparsespec_compile.runtime.build import Target, build_runner, capacity_for
from sparsespec_compile.runtime.capture import StepRunner
from sparsespec_compile.runtime.captured_step import CapturedStep
from sparsespec_compile.runtime.cycle_chooser import CycleChooser, chooser_for
from sparsespec_compile.runtime.device import open_device
from sparsespec_compile.runtime.device.interface import Device
from sparsespec_compile.runtime.drafters import cycles_of, drafters_of
from sparsespec_compile.runtime.host_tier import HostTier, available_host_bytes
from sparsespec_compile.runtime.memory_plan import MemoryPlan
from sparsespec_compile.runtime.phases import GROUPED_ROWS, Phases
from sparsespec_compile.runtime.pool import PageAllocator
from sparsespec_compile.runtime.request import Request
from sparsespec_compile.runtime.residency import Residency
from sparsespec_compile.runtime.scheduler import Limits, Scheduler
from sparsespec_compile.runtime.session import Output, Session
from sparsespec_compile.runtime.state import Capacity, State
from sparsespec_compile.runtime.stats import Stats, StatsRecorder

_TOKENS_MULTIPLE = 256  # the longest request is rounded up to this, so that similar calls share their state
_HOST_MEMORY_SHARE = 0.5  # of the free host memory, for requests that leave the device


@dataclass(frozen=True)
class Needs:
    """What a set of requests asks of a state.

    Attributes:
        requests: how many there are.
        longest: prompt and new tokens of the longest.
        pages: pages for the longest texts of as many as can hold a slot.
    """

    requests: int
    longest: int
    pages: int


class Engine:
    """Runs requests through the graph until their texts are complete.

    The state on the device is built for the first call and kept; a call that needs more gets one that serves both.

    Steps, uploads and downloads run on a stream of the engine's own, whatever stream is current in the calling thread.
    It waits for the caller's stream where a session begins, since the caller may just have changed the model's
    parameters, and the caller's stream waits for it where the session ends, since a step that is still under way reads
    them. Results are read on the host. State is allocated on the engine's stream, so its memory is not used again
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
        self._runner: StepRunner | None = None
        self._tier: HostTier | None = None
        self._asked: Capacity | None = None
        self._active: Session | None = None
        self._chooser: CycleChooser | None = None  # what it learns of device and texts is kept from call to call

    def run(self, requests: Sequence[Request]) -> Generator[Output, None, None]:
        """Yield (request, tokens) whenever tokens of a request become final; at the end every request is finished.

        Closing the iterator, or an exception at any place, gives back all slots and pages: the engine stays usable.

        Raises:
            PoolTooSmallError: a request needs more tokens than the pool holds. Nothing was run.
            EngineBusyError: an earlier iterator of this engine is neither exhausted nor closed.
        """
        if not requests:
            return
        with self.session(self.needs([request.max_length for request in requests])) as session:
            for request in requests:
                session.add(request)
            while session.busy:
                yield from session.advance()

    @contextmanager
    def session(self, needs: Needs) -> Generator[Session, None, None]:
        """A session for requests of at most these needs; leaving it drops what is unfinished.

        Raises:
            PoolTooSmallError: the pool cannot hold the longest request.
            MemoryPlanError: the device's memory cannot hold the state.
            EngineBusyError: another session of this engine is open.
        """
        if self._active is not None:
            raise EngineBusyError(
                "This model is already generating. Exhaust or close the earlier generation first, end it with stop(), "
                "or optimize the model once more for generations that run side by side."
            )
        self._stream.wait(self._device.current().record())
        runner, tier = self._prepared(needs)
        recorder = StatsRecorder(self.target.layout, self.config)
        self.stats = recorder.stats
        self._chooser = self._chooser or chooser_for(self.config, self.target.iteration_time)
        scheduler = self._scheduler(runner, tier)
        session = Session(scheduler, runner, self._stream, recorder, self._chooser, overlap=self.config.overlap)
        self._active = session
        try:
            yield session
        finally:
            session.close()
            self._device.current().wait(self._stream.record())
            if self._active is session:
                self._active = None

    def stop(self) -> None:
        """End the session that is open, if one is, wherever its iterator is kept."""
        if self._active is not None:
            self._active.close()
            self._active = None

    def capture(self, max_requests: int, max_length: int, vocabulary: int | None = None) -> CapturedStep:
        """A step with a state of its own, for a loop outside of this engine; see `CapturedStep`."""
        pages = max(max_requests, 2) * -(-max_length // self.config.page_size)
        capacity = capacity_for(self.config, self._drafters, max_requests, max_length, pages)
        with torch.inference_mode(False):
            runner, plan = build_runner(self.target, self.config, self._drafters, capacity, self._device)
        if runner.step.state.capacity.pages < capacity.pages:
            raise PoolTooSmallError(
                f"A step for {max_requests} texts of {max_length} tokens needs {capacity.pages} pages of KV, the "
                f"device has room for {runner.step.state.capacity.pages}. Lower max_requests or max_length."
            )
        self.memory_plan = plan
        return CapturedStep(runner, self._device, vocabulary)

    def needs(self, lengths: Sequence[int]) -> Needs:
        """The needs of requests with these prompt and new tokens together."""
        page = self.config.page_size
        slots = min(self.config.max_requests, len(lengths))
        pages = sum(sorted((-(-length // page) for length in lengths), reverse=True)[:slots])
        return Needs(len(lengths), max(lengths), pages)

    def _prepared(self, needs: Needs) -> tuple[StepRunner, HostTier]:
        """Step and host tier over a state that serves `needs`, built anew only when the present one is too small."""
        capacity = self._capacity(needs)
        present = self._asked  # what the state was built for; its pool may have got fewer pages
        if self._runner is None or self._tier is None or present is None or not present.covers(capacity):
            if self._tier is not None:
                self._stream.record().wait()
                self._tier.wait()  # its memory is unpinned with it
            self._runner = self._tier = self._asked = None  # the old ones make room before the new ones are allocated
            # In inference mode the state would be made so that no later call outside of it could write to it.
            with torch.inference_mode(False), self._stream.active():
                larger = capacity if present is None else capacity.union(present)
                runner, self.memory_plan = build_runner(self.target, self.config, self._drafters, larger, self._device)
                runner.prepare(_decoding_rows(larger.slots, self.config))
                tier = HostTier(self._stream, runner.step.state.pool, self._host_pages(runner.step.state))
                self._runner, self._tier, self._asked = runner, tier, larger
        self._check_pool(needs.longest, self._runner.step.state)
        return self._runner, self._tier

    def _capacity(self, needs: Needs) -> Capacity:
        slots = min(self.config.max_requests, 1 << (needs.requests - 1).bit_length())
        tokens = -(-needs.longest // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
        pages = needs.pages if self.config.pool_tokens is None else self.config.pool_tokens // self.config.page_size
        return capacity_for(self.config, self._drafters, slots, tokens, pages)

    def _check_pool(self, longest: int, state: State) -> None:
        config = self.config
        held = state.capacity.pages * config.page_size
        if config.pool_tokens is not None:
            held = config.pool_tokens // config.page_size * config.page_size
        if longest > held:
            raise PoolTooSmallError(
                f"A request needs {longest} tokens (prompt and max_new_tokens together), the KV pool holds "
                f"{held}. Lower max_new_tokens, shorten the prompt, or raise SpecConfig.pool_tokens"
                + ("." if config.pool_tokens is not None else " above what fits the device's free memory.")
            )

    def _scheduler(self, runner: StepRunner, tier: HostTier) -> Scheduler:
        config, state = self.config, runner.step.state
        # Drafters that read no scores take no room in their buffer.
        reads_scores = any(drafter.reads_scores for drafter in self._drafters)
        scored = state.capacity.score_slots if reads_scores else state.capacity.slots
        slots = min(state.capacity.slots, config.max_requests)  # a state has room for two at least
        limits = Limits(slots, cycles_of(config)[-1], config.prefill_chunk, scored)
        residency = Residency(
            PageAllocator(state.capacity.pages),
            tier,
            page_size=config.page_size,
            updates=runner.step.inputs.sizes.updates,
            cycle_tokens=config.most_draft_tokens + 1,
        )
        phases = Phases(limits.cycle.passes, config.schedule, scored)
        return Scheduler(limits, residency, phases)

    def _host_pages(self, state: State) -> int:
        if self.config.host_pool_tokens is not None:
            return self.config.host_pool_tokens // self.config.page_size
        if self._device.memory is None:  # the pool lies in host memory
            return 0
        return int(available_host_bytes() * _HOST_MEMORY_SHARE) // (state.pool.shape[1] * state.pool.itemsize)


def _decoding_rows(slots: int, config: SpecConfig) -> int:
    """Rows of an iteration in which every slot decodes, and as many as may verify; half while their number changes."""
    most = config.most_draft_tokens
    together = slots if config.schedule == "in_phase" else -(-slots // (most + 1))
    if config.schedule == "grouped":
        together = min(slots, max(together, GROUPED_ROWS // (most + 1)))
    return slots + most * (max(together, slots // 2) if config.draft_tokens == "auto" else together)
