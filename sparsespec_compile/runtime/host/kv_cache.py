"""The KV cache: which request holds which pages, on the device and in host memory.

A page of the pool belongs to one group of layers (`KVLayout.groups`) and is counted: requests whose texts begin alike
hold the same pages (`PrefixCache`). A request has a page table for each group. It takes pages as its text grows, and in
groups with a window it gives back the pages that no later row can see.

Without a host tier a request is admitted when the pool could hold it and all others at their largest. With one, many
more are admitted; when the pool runs low, the youngest request leaves for host memory whole, and requests return first
in, first out (paper, dynamic KV manager).
"""

from collections import deque
from collections.abc import Iterable, Sequence

from sparsespec_compile.passes.layout import KVLayout, LayerGroup
from sparsespec_compile.runtime.device.inputs import PageUpdate
from sparsespec_compile.runtime.host.host_tier import HostTier, Transfer
from sparsespec_compile.runtime.host.page_pool import PagePool, PrefixCache, first_read
from sparsespec_compile.runtime.host.request import PageTable, Place, Request

_UNREAD_CYCLES = 4
"""Cycles of tokens by which a row may stand beyond what the host knows to be verified: of two iterations under way, of
the one that is planned, and of drafts."""

_DIGESTED_TOKENS = 2**15
"""Prompt tokens whose pages get keys in one iteration, one prompt more or less: some 3 ms."""

_RESERVED_CYCLES = 3
"""Cycles of tokens that a request on the device may add while another one leaves."""


class KVCacheManager:
    """Pages of the requests that hold a slot.

    Args:
        layout: the groups of layers.
        pages: pages of the pool.
        tier: where requests go when the pool is full.
        updates: page-table entries that one iteration can change.
        cycle_tokens: tokens that a cycle can add to a request, k + 1.
        prefill_chunk: prompt tokens that one iteration can add to a request.
        prefix_caching: whether requests whose texts begin alike share pages.

    Attributes:
        pool: the pool's pages, counted.
        updates: page-table entries that the iteration under way changes.
        taken: requests that were given the K/V of their first `prefilled` prompt tokens in the iteration under way.
        pages_offloaded: pages that were sent to host memory.
    """

    def __init__(
        self,
        layout: KVLayout,
        pages: int,
        tier: HostTier,
        *,
        updates: int,
        cycle_tokens: int,
        prefill_chunk: int,
        prefix_caching: bool = True,
    ) -> None:
        self.pool = PagePool(pages)
        self.tier = tier
        self.updates: list[PageUpdate] = []
        self.taken: list[Request] = []
        self.pages_offloaded = 0
        self._layout = layout
        self._most_updates = updates
        self._cycle_tokens = cycle_tokens
        self._prefill_chunk = prefill_chunk
        self._moving: dict[Transfer, Request] = {}
        self._offloaded: deque[Request] = deque()
        self._prefixes = PrefixCache(layout, self.pool) if prefix_caching else None
        self._weights = 0  # number of changes
        self._digested = 0  # prompt tokens whose pages got keys in the iteration under way

    @property
    def moving(self) -> bool:
        """Whether requests are on their way to or from host memory, or host memory on its way to hold them."""
        return bool(self._moving) or self.tier.growing

    def fits(self, request: Request) -> bool:
        """Whether the pool can hold the request at its largest, alone."""
        return self.largest(request) <= self.pool.pages

    def largest(self, request: Request) -> int:
        """Pages that a request may hold at a time from now on."""
        return sum(self._at_most(request, group, request.max_length) for group in self._layout.groups)

    def admit(self, request: Request, residents: Iterable[Request]) -> bool:
        """Admit a request if there is room for one more beside `residents`; returns whether it was admitted."""
        if self.tier.capacity == 0:
            admitted = sum(map(self.largest, residents)) + self.largest(request) <= self.pool.pages
        else:
            admitted = not self._offloaded and self._has_room(request, list(residents))
        if admitted:
            request.place = Place.DEVICE
            request.page_tables = tuple(PageTable() for _ in self._layout.groups)
            request.weights = self._weights
        return admitted

    def begin_iteration(self, residents: list[Request]) -> None:
        """Finish what has arrived, bring requests back, send requests away while the pool runs low.

        Args:
            residents: requests with a slot, the oldest first.
        """
        self.updates, self.taken, self._digested = [], [], 0
        for transfer in self.tier.advance():
            self._arrive(transfer)
        if self.tier.capacity == 0:
            return
        here = [request for request in residents if request.place is Place.DEVICE]
        reserve = sum(map(self._missing, here))
        self._bring_back(here, reserve)
        leaving = sum(len(t.device_pages) for t in self._moving if t.to_host)
        while len(here) > 1 and self.pool.free + leaving < reserve:
            youngest = here.pop()
            if not self._send_away(youngest):
                break
            leaving += youngest.pages_held
            reserve -= self._missing(youngest)

    def take_prefix(self, request: Request, coming: set[bytes]) -> bool:
        """Give a request whose prompt was not begun the pages that hold the beginning of it already.

        The last k + 1 tokens are always computed, so that pillars are chosen by the scores of these rows.

        Args:
            request: on the device; its prompt is still to be sent, or in part.
            coming: keys of the pages that prompts before it are about to compute; this one's are added.

        Returns:
            False when another prompt is about to compute its next page: the request must wait to share it. Or the pages
            of so many prompts got keys in this iteration that it must wait for its own.
        """
        if self._prefixes is None:
            return True
        keys = request.page_keys
        if request.awaited in coming:
            return False
        if not keys and self._digested >= _DIGESTED_TOKENS:
            return False
        known = len(keys)
        self._prefixes.extend_keys(keys, request.prompt)
        self._digested += (len(keys) - known) * self._layout.page_size
        if not request.prefilled:
            most = max(0, len(request.prompt) - self._cycle_tokens) // self._layout.page_size
            found = self._prefixes.find(keys, most)
            if found < most and keys[found] in coming:
                request.awaited = keys[found]
                return False
            if found:
                request.page_tables = self._prefixes.take(keys, found)
                request.prefilled = request.stats.cached_tokens = found * self._layout.page_size
                self.taken.append(request)
        coming.update(keys[request.prefilled // self._layout.page_size :])
        return True

    def keep_prefix(self, request: Request, tokens: int) -> None:
        """Publish the pages of a request's first `tokens` tokens, whose K/V are exact from the next iteration on."""
        if self._prefixes is None or request.weights != self._weights:
            return
        pages = tokens // self._layout.page_size
        if len(request.page_keys) < pages:
            self._prefixes.extend_keys(request.page_keys, (request.prompt + request.output)[:tokens])
        self._prefixes.keep(request.page_keys, request.page_tables, request.kept_pages, pages)
        request.kept_pages = pages

    def forget_prefixes(self) -> None:
        """Make all pages computed so far unfindable, as after a change of the weights."""
        self._weights += 1
        if self._prefixes is not None:
            self._prefixes.clear()

    def cover(self, request: Request, tokens: int) -> bool:
        """Give `request` pages for the positions below `tokens` that its rows may read or write, and table them.

        Returns:
            False when the pool or the iteration's page-table entries do not suffice: the request must sit this
            iteration out.
        """
        needed = self._layout.pages_for(tokens)
        covered = True
        for number, (table, group) in enumerate(zip(request.page_tables, self._layout.groups, strict=True)):
            if needed > table.tabled:
                covered = self._extend(request, number, table, group, needed) and covered
        return covered

    def release(self, request: Request) -> None:
        """Take back a request's pages, now or, if they are on the way, when they arrive."""
        if request in self._offloaded:
            self._offloaded.remove(request)
        if request.place is Place.DEVICE:
            self.keep_prefix(request, request.cached)
            self.pool.release(reversed(request.all_pages()))  # the end of a text is evicted before its beginning
        elif request.place is Place.HOST:
            self.tier.release(request.all_pages())
        elif request.place is not Place.NOWHERE:
            return  # both copies are needed until the transfer ends
        _forget(request)

    def clear(self) -> None:
        """Forget everything that is on the way or in host memory."""
        self.tier.clear()
        for transfer in self._moving:
            self.pool.release(transfer.device_pages)
        for request in [*self._moving.values(), *self._offloaded]:
            _forget(request)
        self._moving.clear()
        self._offloaded.clear()

    def _extend(self, request: Request, number: int, table: PageTable, group: LayerGroup, needed: int) -> bool:
        """Hold and table the pages of one group up to `needed`, as far as pages and entries suffice."""
        # Rows are at position `request.cached` or later, and attend this far back.
        self.pool.release(table.drop_before(first_read(group, request.cached) // self._layout.page_size))
        missing = needed - table.end
        if missing > 0:
            pages = self.pool.allocate(missing)
            if pages is None:
                return False
            table.pages.extend(pages)
        last = min(needed, table.tabled + self._most_updates - len(self.updates))
        self.updates += [
            PageUpdate(request.slot, page, table.pages[page - table.first], number)
            for page in range(table.tabled, last)
        ]
        table.tabled = last
        return last == needed

    def _at_most(self, request: Request, group: LayerGroup, tokens: int) -> int:
        """Pages of a group that a request may hold at a time while its text has up to `tokens` tokens."""
        whole = self._layout.pages_for(min(tokens, request.max_length))
        if not group.window:
            return whole
        ahead = _UNREAD_CYCLES * self._cycle_tokens
        if request.prefilling:
            ahead = max(ahead, min(self._prefill_chunk, len(request.prompt)))
        return min(whole, self._layout.pages_for(group.window + ahead) + 1)  # the window begins within a page

    def _has_room(self, request: Request, held: list[Request]) -> bool:
        """Whether one more may be admitted beside those that are, with a host tier."""
        sizes = [self.largest(request), *map(self.largest, held)]
        # Requests move whole: all but the one that stays, and what does not fit beside it.
        if sum(sizes) > self.pool.pages and sum(sizes) + max(sizes) > self.pool.pages + self.tier.capacity:
            return False
        soon = len(request.prompt) + self._cycle_tokens
        first = sum(self._at_most(request, group, soon) for group in self._layout.groups)
        return first + sum(map(self._missing, held)) <= self.pool.free

    def _missing(self, request: Request) -> int:
        """Pages to keep free for a request on the device: for its prompt, and for its growth while another leaves."""
        soon = max(request.reach, len(request.prompt)) + _RESERVED_CYCLES * self._cycle_tokens
        return sum(
            max(0, self._at_most(request, group, soon) - len(table.pages))
            for table, group in zip(request.page_tables, self._layout.groups, strict=True)
        )

    def _send_away(self, request: Request) -> bool:
        transfer = self.tier.offload(request.all_pages())
        if transfer is None:
            return False
        request.place = Place.LEAVING
        self.pages_offloaded += request.pages_held
        self._moving[transfer] = request
        self._offloaded.append(request)
        return True

    def _bring_back(self, here: list[Request], reserve: int) -> None:
        while self._offloaded and self._offloaded[0].place is Place.HOST:
            request = self._offloaded[0]
            room = reserve + self._missing(request) if here else 0
            if request.pages_held + room > self.pool.free:
                return
            self._offloaded.popleft()
            pages = self.pool.allocate(request.pages_held) or []
            self._moving[self.tier.restore(request.all_pages(), pages)] = request
            request.place = Place.RETURNING

    def _arrive(self, transfer: Transfer) -> None:
        request = self._moving.pop(transfer)
        if transfer.to_host:
            self.pool.release(transfer.device_pages)
            request.place, pages = Place.HOST, transfer.host_pages
        else:
            self.tier.release(transfer.host_pages)
            request.place, pages = Place.DEVICE, transfer.device_pages
        _lay_out(request.page_tables, pages)
        request.kept_pages = 0  # other pages hold its text now, of which nobody knows
        if request.slot < 0:  # it ended, or was cancelled, on the way
            self.release(request)
        elif request.place is Place.DEVICE:
            self.keep_prefix(request, request.cached)


def most_pages(layout: KVLayout, length: int, cycle_tokens: int, prefill_chunk: int) -> int:
    """Pages that a request of up to `length` tokens may hold at a time, all groups together."""
    ahead = max(_UNREAD_CYCLES * cycle_tokens, min(prefill_chunk, length))
    whole = layout.pages_for(length)
    return sum(min(whole, layout.pages_for(g.window + ahead) + 1) if g.window else whole for g in layout.groups)


def _lay_out(tables: Sequence[PageTable], pages: list[int]) -> None:
    """Replace the pages of a request's tables, in the order of `Request.all_pages`, and mark them for upload."""
    at = 0
    for table in tables:
        count = len(table.pages)
        table.pages = pages[at : at + count]
        table.tabled = table.first
        at += count


def _forget(request: Request) -> None:
    request.place, request.page_tables, request.kept_pages = Place.NOWHERE, (), 0
