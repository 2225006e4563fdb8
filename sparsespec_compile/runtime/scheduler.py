"""Who runs, and who does what in an iteration.

Drafting, verifying and prefilling requests share a batch (paper, unified batch scheduling). What a request does follows
from its admission and its phase alone, never from what was accepted: an iteration is planned while earlier ones run.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.phases import Phases
from sparsespec_compile.runtime.request import FinishReason, Place, Request
from sparsespec_compile.runtime.residency import Residency
from sparsespec_compile.runtime.work import Work


@dataclass(frozen=True)
class Limits:
    """What an iteration may hold.

    Attributes:
        slots: requests that hold a slot together.
        draft_tokens: drafts of a full cycle at most. 0 = plain decoding.
        prefill_chunk: prompt tokens of one iteration, all requests together.
        scored: requests that can give out scores in one iteration; 0 = none ever does.
    """

    slots: int
    draft_tokens: int
    prefill_chunk: int
    scored: int


class Scheduler:
    """Admits requests first in, first out, and plans their work.

    Attributes:
        waiting: requests without a slot, in the order in which they came.
        running: requests with a slot, the oldest first.
        iteration: number of the next iteration.
        draft_tokens: drafts of a full cycle, k, from 0 to the limit; see `set_draft_tokens`.
    """

    def __init__(self, limits: Limits, residency: Residency, phases: Phases) -> None:
        self.limits = limits
        self.residency = residency
        self.phases = phases
        self.iteration = 0
        self.draft_tokens = limits.draft_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self._scored = 0
        self._kept = 0

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self.running or self.waiting)

    def admit(self) -> list[Request]:
        """Move waiting requests into free slots, in order, as long as there is room for their pages."""
        admitted = []
        while self.waiting and self._free_slots and self.residency.admits(self.waiting[0], self.running):
            request = self.waiting.popleft()
            request.slot = self._free_slots.pop()
            self.running.append(request)
            admitted.append(request)
        return admitted

    def plan(self) -> list[tuple[Request, Work]]:
        """The work of the next iteration; empty when no request can do anything until pages have moved."""
        self.residency.begin_iteration(self.running)
        here = [request for request in self.running if request.place is Place.DEVICE]
        prompts = [request for request in here if request.prefilling]
        # Requests that verify come first, and could fill the score buffer in every iteration: no prompt would end.
        ending = any(len(r.prompt) - r.prefilled <= self.limits.prefill_chunk for r in prompts)
        self._scored, self._kept = 0, int(ending and self.limits.scored > 1)
        phase = self.phases.at(self.iteration)
        work = [(r, item) for r in here if not r.prefilling and (item := self._decode(r, phase)) is not None]
        work.extend(self._prefill(prompts))
        self.iteration += bool(work)
        return work

    def set_draft_tokens(self, draft_tokens: int) -> None:
        """Give cycles another number of drafts; those under way end sooner or later than they would have."""
        if draft_tokens != self.draft_tokens:
            self.draft_tokens = draft_tokens
            decoding = [request for request in self.running if request.phase is not None]
            self.phases.spread(draft_tokens, decoding, self.iteration)

    def release(self, request: Request) -> None:
        """Take back the slot and the pages of a request that ended."""
        self._release(request)
        self.phases.rebalance(self.running)

    def cancel(self, request: Request) -> None:
        """Take a request back wherever it is."""
        request.finish_reason = FinishReason.CANCELLED
        if request in self.running:
            self.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def give_up(self) -> Request:
        """End the youngest request on the device, for the others to go on; call it when nothing else can move."""
        youngest = [request for request in self.running if request.place is Place.DEVICE][-1]
        youngest.finish_reason = FinishReason.MEMORY
        self.release(youngest)
        return youngest

    def clear(self) -> None:
        """Drop every request, running or waiting."""
        self.waiting.clear()
        self.residency.clear()
        for request in list(self.running):
            self._release(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = -1
        self.residency.release(request)

    def _decode(self, request: Request, phase: int) -> Work | None:
        drafts, most = request.drafted, self.draft_tokens
        scores = self.limits.scored > 0 and most > 0
        stale = scores and not request.fresh  # no drafts before a verification has renewed its pillars
        # A cycle begun when there were more drafts may finish as it was meant to.
        longest = self.limits.draft_tokens
        due = phase == request.phase or drafts >= longest or stale
        full = scores and self._scored >= self.limits.scored - self._kept
        if due and full and drafts < longest and not stale:
            due = False
        if not self.residency.covers(request, min(request.max_length, request.reach + drafts + 1)):
            return None
        if not due:
            request.drafted += 1
            return Work(request.slot, Mode.DRAFT, rows=1, offset=drafts, logits=1)
        rows = drafts + 1
        # Where the score buffer is full, the old pillars serve for one cycle more.
        scored = self._take_scores(rows) if scores and not full else 0
        request.drafted, request.unread = 0, request.unread + rows
        request.fresh = scored > 0 or (scores and request.fresh)
        return Work(request.slot, Mode.VERIFY, rows, logits=rows, scored=scored, whole_cycle=drafts == most > 0)

    def _prefill(self, prompts: list[Request]) -> Iterator[tuple[Request, Work]]:
        left = self.limits.prefill_chunk
        for request in prompts:
            first = request.prefilled
            rows = min(left, len(request.prompt) - first)
            last = first + rows == len(request.prompt)
            waits = last and self.draft_tokens and self.limits.scored and self._scored == self.limits.scored
            if rows == 0 or waits:
                continue
            if not self.residency.covers(request, first + rows):
                continue
            left -= rows
            request.prefilled = first + rows
            tokens = request.prompt[first : first + rows]
            if not last:
                yield request, Work(request.slot, Mode.PREFILL, rows=rows, offset=first, tokens=tokens)
                continue
            request.phase = self.phases.choose(self.running, self.iteration)
            self.phases.rebalance(self.running)
            scored = self._take_scores(min(self.draft_tokens + 1, rows)) if self.draft_tokens else 0
            request.fresh = scored > 0
            yield request, Work(request.slot, Mode.PREFILL, rows, first, tokens, logits=1, scored=scored)

    def _take_scores(self, rows: int) -> int:
        if self.limits.scored == 0:
            return 0
        self._scored += 1
        return rows
