"""Who holds which pages: growth as texts grow, offload when the pool runs out, return first in, first out.

With a host tier, requests take pages as they need them, and many are admitted; when the pool runs low, the youngest
leaves for host memory whole. Without one, a request holds pages for its longest text from its admission on, since
nothing could make room later.
"""

from collections import deque
from collections.abc import Iterable

from sparsespec_compile.runtime.host_tier import HostTier, Transfer
from sparsespec_compile.runtime.pool import PageAllocator
from sparsespec_compile.runtime.request import Place, Request
from sparsespec_compile.runtime.work import PageUpdate


class Residency:
    """Pages of the requests that hold a slot.

    Args:
        allocator: the pool's pages.
        tier: where requests go when the pool is full.
        page_size: tokens in a page.
        updates: page-table entries that one iteration can change.
        cycle_tokens: tokens that a cycle can add to a request, k + 1.
        groups: groups of layers, G. Pages are taken and moved in sets of one for each group: set i of the allocator is
            the pool's pages G * i + g.

    Attributes:
        updates: page-table entries that the iteration under way changes.
        pages_offloaded: pages that were sent to host memory.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        tier: HostTier,
        *,
        page_size: int,
        updates: int,
        cycle_tokens: int,
        groups: int = 1,
    ) -> None:
        self.allocator = allocator
        self.tier = tier
        self.updates: list[PageUpdate] = []
        self.pages_offloaded = 0
        self._page_size = page_size
        self._most_updates = updates
        self._cycle_tokens = cycle_tokens
        self._groups = groups
        self._tabled: dict[Request, int] = {}
        self._moving: dict[Transfer, Request] = {}
        self._offloaded: deque[Request] = deque()

    @property
    def moving(self) -> bool:
        """Whether requests are on their way to or from host memory, or host memory on its way to hold them."""
        return bool(self._moving) or self.tier.growing

    def admits(self, request: Request, residents: Iterable[Request]) -> bool:
        """Whether there is room for one more; takes its pages, all of them when there is no host tier."""
        longest = self.pages_for(request.max_length)
        if self.tier.capacity == 0:
            pages = self.allocator.allocate(longest)
            request.pages = pages or []
            admitted = pages is not None
        else:
            admitted = not self._offloaded and self._fits(request, longest, list(residents))
        if admitted:
            request.place = Place.DEVICE
            self._tabled[request] = 0
        return admitted

    def begin_iteration(self, residents: list[Request]) -> None:
        """Finish what has arrived, bring requests back, send requests away while the pool runs low.

        Args:
            residents: requests with a slot, the oldest first.
        """
        self.updates = []
        for transfer in self.tier.advance():
            self._arrive(transfer)
        if self.tier.capacity == 0:
            return
        here = [request for request in residents if request.place is Place.DEVICE]
        reserve = sum(map(self._missing, here))
        self._bring_back(here, reserve)
        leaving = sum(len(t.device_pages) for t in self._moving if t.to_host)
        while len(here) > 1 and self.allocator.free + leaving < reserve:
            youngest = here.pop()
            if not self._send_away(youngest):
                break
            leaving += len(youngest.pages)
            reserve -= self._missing(youngest)

    def covers(self, request: Request, tokens: int) -> bool:
        """Give `request` pages for its first `tokens` positions and put them in its page table.

        Returns:
            False when the pool or the iteration's page-table entries do not suffice: the request must sit this
            iteration out.
        """
        needed = self.pages_for(tokens)
        if needed <= self._tabled[request]:
            return True
        if needed > len(request.pages):
            pages = self.allocator.allocate(needed - len(request.pages))
            if pages is None:
                return False
            request.pages = request.pages + pages
        known = self._tabled[request]
        last = min(needed, known + (self._most_updates - len(self.updates)) // self._groups)
        self.updates += [
            PageUpdate(request.slot, page, request.pages[page] * self._groups + group, group)
            for page in range(known, last)
            for group in range(self._groups)
        ]
        self._tabled[request] = max(known, last)
        return self._tabled[request] >= needed

    def release(self, request: Request) -> None:
        """Take back a request's pages, now or, if they are on the way, when they arrive."""
        self._tabled.pop(request, None)
        if request in self._offloaded:
            self._offloaded.remove(request)
        if request.place is Place.DEVICE:
            self.allocator.release(request.pages)
        elif request.place is Place.HOST:
            self.tier.release(request.pages)
        elif request.place is not Place.NOWHERE:
            return  # both copies are needed until the transfer ends
        request.place, request.pages = Place.NOWHERE, []

    def clear(self) -> None:
        """Forget everything that is on the way or in host memory."""
        self.tier.clear()
        for request in [*self._moving.values(), *self._offloaded]:
            request.place, request.pages = Place.NOWHERE, []
        for transfer in self._moving:
            self.allocator.release(transfer.device_pages)
        self._moving.clear()
        self._offloaded.clear()
        self._tabled.clear()

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self._page_size)

    def _fits(self, request: Request, longest: int, held: list[Request]) -> bool:
        """Whether one more may be admitted beside those that are, with a host tier."""
        lengths = [longest, *(self.pages_for(other.max_length) for other in held)]
        pool, tier = self.allocator.pages, self.tier.capacity
        # Requests move whole: all but the one that stays, and what does not fit beside it.
        if sum(lengths) > pool and sum(lengths) + max(lengths) > pool + tier:
            return False
        first = self.pages_for(min(len(request.prompt) + self._cycle_tokens, request.max_length))
        return first + sum(map(self._missing, held)) <= self.allocator.free

    def _missing(self, request: Request) -> int:
        """Pages to keep free for a request on the device: what it may take while another one leaves.

        Its whole prompt, and some cycles more than it may hold now.
        """
        soon = max(request.reach, len(request.prompt)) + 3 * self._cycle_tokens
        return max(0, self.pages_for(min(soon, request.max_length)) - len(request.pages))

    def _send_away(self, request: Request) -> bool:
        transfer = self.tier.offload(request.pages)
        if transfer is None:
            return False
        request.place = Place.LEAVING
        self.pages_offloaded += len(request.pages)
        self._moving[transfer] = request
        self._offloaded.append(request)
        return True

    def _bring_back(self, here: list[Request], reserve: int) -> None:
        while self._offloaded and self._offloaded[0].place is Place.HOST:
            request = self._offloaded[0]
            room = reserve + self._missing(request) if here else 0
            if len(request.pages) + room > self.allocator.free:
                return
            self._offloaded.popleft()
            pages = self.allocator.allocate(len(request.pages)) or []
            self._moving[self.tier.restore(request.pages, pages)] = request
            request.place = Place.RETURNING

    def _arrive(self, transfer: Transfer) -> None:
        request = self._moving.pop(transfer)
        if transfer.to_host:
            self.allocator.release(transfer.device_pages)
            request.place, request.pages = Place.HOST, transfer.host_pages
        else:
            self.tier.release(transfer.host_pages)
            request.place, request.pages = Place.DEVICE, transfer.device_pages
        if request.slot < 0:  # it ended, or was cancelled, on the way
            self.release(request)
        else:
            self._tabled[request] = 0
