"""Which requests run, and what each does in an iteration.

Drafting, verifying and prefilling requests share a batch (paper, unified batch scheduling). What a request does follows
from its admission and its phase alone, never from what was accepted: an iteration is planned while earlier ones run.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.device.inputs import Work
from sparsespec_compile.runtime.host.kv_cache import KVCacheManager
from sparsespec_compile.runtime.host.phases import Phases
from sparsespec_compile.runtime.host.request import FinishReason, Place, Request


@dataclass(frozen=True)
class Limits:
    """What an iteration may hold.

    Attributes:
        slots: requests that hold a slot together.
        cycle: the longest cycle, and the first unless "auto" sets another one.
        prefill_chunk: prompt tokens of one iteration, all requests together.
        scored: requests whose index a verification can renew in one iteration.
    """

    slots: int
    cycle: Cycle
    prefill_chunk: int
    scored: int


class Scheduler:
    """Admits requests first in, first out, and plans their work.

    Attributes:
        waiting: requests without a slot, in the order in which they came.
        running: requests with a slot, the oldest first.
        iteration: number of the next iteration.
        cycle: what requests do from one verification to the next; see `set_cycle`.
    """

    def __init__(self, limits: Limits, kv_cache: KVCacheManager, phases: Phases) -> None:
        self.limits = limits
        self.kv_cache = kv_cache
        self.phases = phases
        self.iteration = 0
        self.cycle = limits.cycle
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._scored = 0
        self._kept = 0
        self._uneven = False

    @property
    def free_slots(self) -> list[int]:
        """Slots without a request."""
        return list(self._free_slots)

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self.running or self.waiting)

    def admit(self) -> list[Request]:
        """Move waiting requests into free slots, in order, as long as there is room for their pages."""
        admitted = []
        while self.waiting and self._free_slots and self.kv_cache.admit(self.waiting[0], self.running):
            request = self.waiting.popleft()
            request.slot = self._free_slots.pop()
            self.running.append(request)
            admitted.append(request)
        return admitted

    def plan(self) -> list[tuple[Request, Work]]:
        """The work of the next iteration; empty when no request can do anything until pages have moved."""
        if self._uneven:
            self._uneven = self.phases.rebalance(self.running)
        self.kv_cache.begin_iteration(self.running)
        here = [request for request in self.running if request.place is Place.DEVICE]
        prompts = [request for request in here if request.prefilling]
        # Requests that verify come first, and could fill the score buffer in every iteration: no prompt would end.
        ending = any(len(r.prompt) - r.prefilled <= self.limits.prefill_chunk for r in prompts)
        self._scored, self._kept = 0, int(ending and self.limits.scored > 1)
        decoding = [request for request in here if not request.prefilling]
        due = {request for request in decoding if self._due(request)}
        alone = not due and not prompts
        work = [(r, item) for r in decoding if (item := self._decode(r, r in due, alone)) is not None]
        work.extend(self._prefill(prompts))
        following = self.phases.at(self.iteration + 1)
        if self.cycle.proposals and all(request.phase != following for request in decoding):
            # The next iteration may hold nothing but drafts.
            work = [(request, item._replace(proposes=True)) for request, item in work]
        self.iteration += bool(work)
        return work

    def set_cycle(self, cycle: Cycle) -> None:
        """Change the cycle of all requests; cycles under way become shorter or longer."""
        if cycle != self.cycle:
            self.cycle = cycle
            decoding = [request for request in self.running if request.phase is not None]
            self.phases.spread(cycle, decoding, self.iteration)

    def release(self, request: Request) -> None:
        """Take back the slot and the pages of a request that ended."""
        self._release(request)
        self._uneven = True

    def cancel(self, request: Request) -> None:
        """Remove a request that has ended, whether it was running or waiting."""
        if request in self.running:
            self.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def give_up(self) -> Request | None:
        """End the youngest request on the device, for the others to go on; call it when nothing else can move.

        None where there is none: pages of a request that was cancelled on the way have just come free, for others.
        """
        here = [request for request in self.running if request.place is Place.DEVICE]
        if not here:
            return None
        youngest = here[-1]
        youngest.finish_reason = FinishReason.MEMORY
        self.release(youngest)
        return youngest

    def clear(self) -> None:
        """Drop every request, running or waiting."""
        self.waiting.clear()
        self.kv_cache.clear()
        for request in list(self.running):
            self._release(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = -1
        self.kv_cache.release(request)

    def _due(self, request: Request) -> bool:
        """Whether it verifies in the next iteration, unless the score buffer is full."""
        return self.phases.at(self.iteration) == request.phase or self._must(request)

    def _must(self, request: Request) -> bool:
        """Whether it cannot draft in the next iteration."""
        # A cycle begun when there were more drafts may finish as it was meant to.
        over = request.passes >= max(self.limits.cycle.passes, self.cycle.passes)
        # No drafts before a verification has renewed its pillars.
        return over or (self.cycle.drafter.keeps_index and not request.fresh)

    def _decode(self, request: Request, due: bool, alone: bool) -> Work | None:
        """A request's work; `alone`: whether the iteration holds nothing but drafts, and so may judge proposals.

        Beside verifications rows are not free, and no copies of weights are read.
        """
        cycle, passes, drafts = self.cycle, request.passes, request.drafted
        scores = cycle.drafter.keeps_index
        full = scores and self._scored >= self.limits.scored - self._kept
        if due and full and not self._must(request):
            due = False
        rows, pass_rows = (drafts or cycle.proposed) + 1, cycle.pass_rows if alone else 1
        # Where proposals were judged, the device alone knows how many drafts there are.
        counted = request.counted and (due or pass_rows == 1)
        made = drafts + 1 if counted else max(drafts, min(drafts + pass_rows, cycle.drafts))
        if not self.kv_cache.cover(request, min(request.max_length, request.reach + (rows if due else made))):
            return None
        if not due:
            request.passes, request.drafted, request.counted, request.drafter = passes + 1, made, counted, cycle.drafter
            offset = drafts if counted else -1
            return Work(request.slot, Mode.DRAFT, pass_rows, offset, logits=pass_rows, most=cycle.drafts)
        # Where the score buffer is full, the old pillars serve for one cycle more.
        scored = self._take_scores(rows) if scores and not full else 0
        # In the first cycle of a drafter that proposes, the tokens after the newest one are not drafts yet.
        drafter = request.drafter if drafts or request.drafter == cycle.drafter else None
        whole = drafter == cycle.drafter and passes == cycle.passes and 0 < (drafts or cycle.proposed) <= cycle.drafts
        request.passes, request.drafted, request.counted, request.drafter = 0, 0, True, cycle.drafter
        request.unread += rows
        request.fresh = scored > 0 or (scores and request.fresh)
        offset = 0 if counted else -1
        return Work(request.slot, Mode.VERIFY, rows, offset, (), rows, scored, drafter, whole)

    def _prefill(self, prompts: list[Request]) -> Iterator[tuple[Request, Work]]:
        left = self.limits.prefill_chunk
        coming: set[bytes] = set()
        for request in prompts:
            if not left:  # what others have computed is looked for when it is this one's turn
                return
            if not self.kv_cache.take_prefix(request, coming):
                continue
            first = request.prefilled
            rows = min(left, len(request.prompt) - first)
            last = first + rows == len(request.prompt)
            waits = last and self.cycle.drafter.keeps_index and self._scored == self.limits.scored
            if rows == 0 or waits:
                continue
            if not self.kv_cache.cover(request, first + rows):
                continue
            left -= rows
            request.prefilled = first + rows
            self.kv_cache.keep_prefix(request, request.prefilled)
            tokens = request.prompt[first : first + rows]
            if not last:
                yield request, Work(request.slot, Mode.PREFILL, rows=rows, offset=first, tokens=tokens)
                continue
            request.phase = self.phases.choose(self.running, self.iteration)
            self._uneven = True
            scored = self._take_scores(min(self.cycle.drafts + 1, rows)) if self.cycle.drafter.keeps_index else 0
            request.fresh, request.drafter = scored > 0, self.cycle.drafter
            yield request, Work(request.slot, Mode.PREFILL, rows, first, tokens, logits=1, scored=scored)

    def _take_scores(self, rows: int) -> int:
        self._scored += 1
        return rows
