"""Who runs, and who does what in an iteration.

Drafting, verifying and prefilling requests share a batch (paper, unified batch scheduling). Each request verifies in
the iterations of its phase, one of k + 1; a request that starts takes the phase with the fewest requests, so that every
iteration carries about the same mix. The first cycle is as short as its phase makes it.
"""

from collections import Counter, deque
from collections.abc import Iterator

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.plan import Work
from sparsespec_compile.runtime.pool import PageAllocator
from sparsespec_compile.runtime.request import Request


class Scheduler:
    """Admits requests first in, first out, and plans their work.

    Args:
        slots: requests that run together.
        allocator: the pool's pages; a request holds enough for its longest text from its admission on.
        draft_tokens: drafts of a full cycle, k. 0 = plain decoding.
        prefill_chunk: prompt tokens of one iteration, all requests together.
        score: whether verifications give out scores or lengths for the next pillars.
    """

    def __init__(
        self, slots: int, allocator: PageAllocator, *, draft_tokens: int, prefill_chunk: int, score: bool
    ) -> None:
        self.allocator = allocator
        self.draft_tokens = draft_tokens
        self.prefill_chunk = prefill_chunk
        self.score = score
        self.iteration = 0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = deque(range(slots))

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self.running or self.waiting)

    def admit(self) -> list[Request]:
        """Move waiting requests into free slots, in order, as long as pages last."""
        admitted = []
        while self.waiting and self._free_slots:
            pages = self.allocator.allocate(self.waiting[0].max_length)
            if pages is None:
                break
            request = self.waiting.popleft()
            request.slot, request.pages = self._free_slots.popleft(), pages
            self.running.append(request)
            admitted.append(request)
        return admitted

    def plan(self) -> list[Work]:
        """The work of the next iteration; advances the requests' phases."""
        work = [self._decode(request) for request in self.running if not request.prefilling]
        work.extend(self._prefill())
        self.iteration += 1
        return work

    def release(self, request: Request) -> None:
        """Take back the slot and the pages of a running request."""
        if request.slot < 0:
            return
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self.allocator.release(request.pages)
        request.slot, request.pages = -1, []

    def clear(self) -> None:
        """Drop every request, running or waiting."""
        self.waiting.clear()
        for request in list(self.running):
            self.release(request)

    def _decode(self, request: Request) -> Work:
        drafts = request.drafted
        if self._phase_now() == request.phase:
            request.drafted = 0
            scored = drafts + 1 if self.score else 0
            return Work(request.slot, Mode.VERIFY, rows=drafts + 1, logits=drafts + 1, scored=scored)
        request.drafted += 1
        return Work(request.slot, Mode.DRAFT, rows=1, offset=drafts, logits=1)

    def _prefill(self) -> Iterator[Work]:
        left = self.prefill_chunk
        for request in self.running:
            if not request.prefilling or left == 0:
                continue
            rows = min(left, len(request.prompt) - request.prefilled)
            left -= rows
            request.prefilled += rows
            if request.prefilling:
                yield Work(request.slot, Mode.PREFILL, rows=rows)
                continue
            request.phase = self._lightest_phase()
            scored = self.draft_tokens + 1 if self.score else 0
            yield Work(request.slot, Mode.PREFILL, rows=rows, logits=1, scored=scored)

    def _phase_now(self) -> int:
        return self.iteration % (self.draft_tokens + 1)

    def _lightest_phase(self) -> int:
        """The phase with the fewest requests; among equals the one that leaves the longest first cycle."""
        load = Counter(request.phase for request in self.running if request.phase is not None)
        phases = self.draft_tokens + 1
        farthest_first = [(self._phase_now() - back) % phases for back in range(phases)]
        return min(farthest_first, key=lambda phase: load[phase])
