"""Which pages of a pool are free, and how many hold each of the others."""

from collections.abc import Iterable


class PagePool:
    """Hands out pages, by number, and takes them back. A page is free again when all of its holders have released it.

    Args:
        pages: pages in the pool.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages without a holder."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` free pages, with one holder each; None when fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that have one already."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take a holder from each page."""
        freed = []
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                freed.append(page)
        self._free.extend(reversed(freed))

    def grow(self, count: int) -> None:
        """Add free pages, with the numbers after the last one."""
        self._free.extend(range(self.pages + count - 1, self.pages - 1, -1))
        self._holders.extend([0] * count)
        self.pages += count
