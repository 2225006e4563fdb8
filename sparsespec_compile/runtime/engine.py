"""The loop: requests in, final tokens out."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import EngineBusyError, PoolTooSmallError
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.runtime.drafters import choose_policy
from sparsespec_compile.runtime.plan import make_plan
from sparsespec_compile.runtime.pool import PageAllocator
from sparsespec_compile.runtime.request import Request
from sparsespec_compile.runtime.sampling import sample
from sparsespec_compile.runtime.scheduler import Scheduler
from sparsespec_compile.runtime.state import Capacity, State
from sparsespec_compile.runtime.stats import Stats, StatsRecorder
from sparsespec_compile.runtime.step import Forward, Sampler, Step

_FREE_MEMORY_SHARE = (
    0.8  # of the GPU's free memory, for a pool without a given size; the rest is for scores and activations
)
_TOKENS_MULTIPLE = 256  # the longest request is rounded up to this, so that similar calls share their state


@dataclass(frozen=True)
class Target:
    """What the engine runs: the rewritten graph and what is known about it.

    Attributes:
        forward: the graph, see `step.Forward`.
        layout: its layers and their place in the pool.
        dtype: of keys and values.
        device: where it runs.
        sampler: draws the tokens; `sampling.sample` or a compiled form of it.
    """

    forward: Forward
    layout: KVLayout
    dtype: torch.dtype
    device: torch.device
    sampler: Sampler = sample


class Engine:
    """Runs requests through the graph until their texts are complete.

    The state on the device is built for the first call and kept; a call that needs more gets a larger one.
    """

    def __init__(self, target: Target, config: SpecConfig) -> None:
        self.target = target
        self.config = config
        self.stats = Stats(config.draft_tokens)
        self._policy = choose_policy(config)
        self._state: State | None = None
        self._busy = False

    def run(self, requests: Sequence[Request]) -> Generator[tuple[Request, list[int]], None, None]:
        """Yield (request, tokens) whenever tokens of a request become final; at the end every request is finished.

        Closing the iterator, or an exception at any place, gives back all slots and pages: the engine stays usable.

        Raises:
            PoolTooSmallError: a request needs more tokens than the pool holds. Nothing was run.
            EngineBusyError: an earlier iterator of this engine is neither exhausted nor closed.
        """
        if self._busy:
            raise EngineBusyError(
                "This model is already generating. Exhaust or close the earlier generation first, or optimize the "
                "model once more for generations that run side by side."
            )
        if not requests:
            return
        state = self._state_for(requests)
        step = Step(self.target.forward, state, self._policy, self.config.draft_tokens, self.target.sampler)
        scheduler = Scheduler(
            state.capacity.slots,
            PageAllocator(state.capacity.pages, self.config.page_size),
            draft_tokens=self.config.draft_tokens,
            prefill_chunk=self.config.prefill_chunk,
            score=self._policy is not None,
        )
        scheduler.waiting.extend(requests)
        recorder = StatsRecorder(self.target.layout, self.config)
        self.stats = recorder.stats
        self._busy = True
        try:
            while scheduler.busy:
                yield from self._iterate(scheduler, state, step, recorder)
        finally:
            scheduler.clear()
            self._busy = False

    def _iterate(
        self, scheduler: Scheduler, state: State, step: Step, recorder: StatsRecorder
    ) -> Iterator[tuple[Request, list[int]]]:
        for request in scheduler.admit():
            state.admit(request.slot, request.prompt, request.max_length, request.pages, request.params)
        running = {request.slot: request for request in scheduler.running}
        cached = {slot: request.cached for slot, request in running.items()}
        work = scheduler.plan()
        results = step(
            make_plan(work, state.capacity.slots, state.device),
            noise=any(not request.params.greedy for request in running.values()),
            sort=any(request.params.filters for request in running.values()),
        ).tolist()
        recorder.stats.iterations += 1
        for item in work:
            request = running[item.slot]
            count, *tokens = results[item.slot]
            added = request.append(tokens[:count])
            recorder.record(request, item, cached[item.slot], len(added), cut=len(added) < count)
            if request.finished:
                scheduler.release(request)
            if added:
                yield request, added

    def _state_for(self, requests: Sequence[Request]) -> State:
        needed = self._capacity_for(requests)
        if self._state is None or not self._state.capacity.covers(needed):
            self._state = None  # the old one makes room before the new one is allocated
            self._state = self._build_state(needed)
        return self._state

    def _build_state(self, capacity: Capacity) -> State:
        try:
            # Tensors made in inference mode could not be written to outside of it, in a later call.
            with torch.inference_mode(False):
                return State(self.target.layout, capacity, self.target.dtype, self.target.device)
        except RuntimeError as error:  # torch's out-of-memory errors, on CPU and CUDA
            raise PoolTooSmallError(
                f"No memory for the state of {capacity.slots} requests of up to {capacity.tokens} tokens and a KV pool "
                f"of {capacity.pages * self.config.page_size} tokens. Lower SpecConfig.max_requests or pool_tokens, or "
                "max_new_tokens."
            ) from error

    def _capacity_for(self, requests: Sequence[Request]) -> Capacity:
        config = self.config
        slots = min(config.max_requests, len(requests))
        longest = max(request.max_length for request in requests)
        tokens = -(-longest // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
        pages = self._pages_for((request.max_length for request in requests), slots)
        if longest > pages * config.page_size:
            raise PoolTooSmallError(
                f"A request needs {longest} tokens (prompt and max_new_tokens together), the KV pool holds "
                f"{pages * config.page_size}. Lower max_new_tokens, shorten the prompt, or raise SpecConfig.pool_tokens"
                + ("." if config.pool_tokens is not None else " above what fits the device's free memory.")
            )
        return Capacity(slots, tokens, pages, pillars=min(config.budget(tokens), tokens))

    def _pages_for(self, lengths: Iterable[int], slots: int) -> int:
        """Pages of the pool: as configured, or what the longest requests need together as far as memory goes."""
        config = self.config
        if config.pool_tokens is not None:
            return config.pool_tokens // config.page_size
        needed = sum(sorted((-(-length // config.page_size) for length in lengths), reverse=True)[:slots])
        if self.target.device.type != "cuda":
            return needed
        held = self._state.capacity.pages if self._state is not None else 0
        page_bytes = self.target.layout.elements_per_page * self.target.dtype.itemsize
        free_bytes = torch.cuda.mem_get_info(self.target.device)[0]
        return min(needed, held + int(free_bytes * _FREE_MEMORY_SHARE) // page_bytes)
