"""The pages of a pool: which are free, how many holders the others have, and which are found by the text they hold.

Equal prompts are prefilled once. A full page holds the K/V of `page_size` tokens, which depend on these tokens and on
all before them. Its key is therefore a digest of the text up to its end, chained from page to page. Pages are found
while a request holds them (n samples of one prompt) and after it has ended (few-shot prefixes, the next turn of a
chat), until the pool hands them out for another text. Only pages whose K/V are exact are kept: those of prompts, and of
text that was verified.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

from sparsespec_compile.kernels.ops import first_visible
from sparsespec_compile.passes.layout import KVLayout, LayerGroup
from sparsespec_compile.runtime.host.request import PageTable


class PagePool:
    """Hands out pages, by number, and takes them back. A page is free again when all of its holders have released it.

    A free page may be *kept*: its contents serve later requests for the same text (`PrefixCache`). Kept
    pages are handed out after all other free ones, the least recently released first.

    Args:
        pages: pages in the pool.

    Attributes:
        on_reuse: called with a kept page before it is handed out for other contents.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.on_reuse: Callable[[int], None] = lambda page: None
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._of_use: set[int] = set()
        self._kept: dict[int, None] = {}  # free pages of use, the least recently released first

    @property
    def free(self) -> int:
        """Pages without a holder, kept ones among them."""
        return len(self._free) + len(self._kept)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, with one holder each; None when fewer are free."""
        if count > self.free:
            return None
        while len(self._free) < count:
            page = next(iter(self._kept))
            self.on_reuse(page)
            self.discard(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that are held already, or kept."""
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)

    def held(self, page: int) -> bool:
        """Whether somebody holds a page."""
        return self._holders[page] > 0

    def keep(self, page: int) -> None:
        """Mark a held page as reusable: its contents are kept after its release."""
        self._of_use.add(page)

    def discard(self, page: int) -> None:
        """Mark the contents of a page as no longer reusable."""
        self._of_use.discard(page)
        if page in self._kept:
            del self._kept[page]
            self._free.append(page)

    def release(self, pages: Iterable[int]) -> None:
        """Take a holder from each page."""
        freed = []
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._of_use:
                self._kept[page] = None
            else:
                freed.append(page)
        self._free.extend(reversed(freed))

    def grow(self, count: int) -> None:
        """Add free pages, with the numbers after the last one."""
        self._free.extend(range(self.pages + count - 1, self.pages - 1, -1))
        self._holders.extend([0] * count)
        self.pages += count


_DIGEST_BYTES = 16


class PrefixCache:
    """The kept pages of a pool.

    Args:
        layout: the groups of layers; a page of text is one page of the pool in each group.
        pool: the pool.
    """

    def __init__(self, layout: KVLayout, pool: PagePool) -> None:
        self._layout = layout
        self._pool = pool
        self._pages: tuple[dict[bytes, int], ...] = tuple({} for _ in layout.groups)
        self._known_as: dict[int, tuple[int, bytes]] = {}  # group and key of a page
        pool.on_reuse = self._forget

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int]) -> None:
        """Add the keys of further full pages of a text to `keys`, which holds those of its first pages."""
        size = self._layout.page_size
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            before = keys[-1] if keys else b""
            page = array("q", tokens[start : start + size]).tobytes()
            keys.append(blake2b(before + page, digest_size=_DIGEST_BYTES).digest())

    def find(self, keys: Sequence[bytes], most: int) -> int:
        """How many of the first `most` pages of a text can be taken: all that the rows behind them read are there."""
        whole = min(most, len(keys))
        for known, group in zip(self._pages, self._layout.groups, strict=True):
            if not group.window:
                whole = next((nth for nth in range(whole) if keys[nth] not in known), whole)
        windowed = [
            (_runs(known, keys[:whole]), group)
            for known, group in zip(self._pages, self._layout.groups, strict=True)
            if group.window
        ]
        for count in range(whole, 0, -1):
            if all(runs[count - 1] >= count - self._first(group, count) for runs, group in windowed):
                return count
        return 0

    def take(self, keys: Sequence[bytes], count: int) -> tuple[PageTable, ...]:
        """Page tables of the first `count` pages of a text, which `find` has found; each page gets one more holder."""
        tables = []
        for known, group in zip(self._pages, self._layout.groups, strict=True):
            first = self._first(group, count)
            pages = [known[key] for key in keys[first:count]]
            self._pool.share(pages)
            tables.append(PageTable(first=first, pages=pages, tabled=first))
        return tuple(tables)

    def keep(self, keys: Sequence[bytes], tables: Sequence[PageTable], first: int, count: int) -> None:
        """Make the pages `first` to `count - 1` of a text known, as far as `tables` hold them."""
        for number, (known, table) in enumerate(zip(self._pages, tables, strict=True)):
            for nth in range(max(first, table.first), min(count, table.end)):
                page = table.pages[nth - table.first]
                # Two requests may have computed the same page in one iteration: the first one's is known. One that is
                # back from host memory holds a copy of what it has left behind, which the pool may take at any time.
                found = known.get(keys[nth], page)
                if found != page and not self._pool.held(found):
                    self._forget(found)
                    self._pool.discard(found)
                if known.setdefault(keys[nth], page) == page:
                    self._known_as[page] = (number, keys[nth])
                    self._pool.keep(page)

    def clear(self) -> None:
        """Forget all texts. Lookups find no page any more, and pages without a holder become ordinary free pages."""
        for page in list(self._known_as):
            self._forget(page)
            self._pool.discard(page)

    def _first(self, group: LayerGroup, count: int) -> int:
        """The first page of a group that rows after `count` pages still read."""
        return first_read(group, count * self._layout.page_size) // self._layout.page_size

    def _forget(self, page: int) -> None:
        number, key = self._known_as.pop(page)
        del self._pages[number][key]


def first_read(group: LayerGroup, position: int) -> int:
    """The first position that a row at `position`, and none behind it an earlier one, reads in a group of layers."""
    return max(0, first_visible(position, group.window, group.chunked))


def _runs(known: dict[bytes, int], keys: Sequence[bytes]) -> list[int]:
    """For each key, how many in a row up to it are known."""
    runs: list[int] = []
    for key in keys:
        runs.append((runs[-1] if runs else 0) + 1 if key in known else 0)
    return runs
