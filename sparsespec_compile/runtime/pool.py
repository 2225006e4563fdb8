"""Which pages of a pool are free."""


class PageAllocator:
    """Hands out pages, by number, and takes them back.

    Args:
        pages: pages in the pool.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None when fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        """Take back what `allocate` gave."""
        self._free.extend(reversed(pages))

    def grow(self, count: int) -> None:
        """Add pages, with the numbers after the last one."""
        self._free.extend(range(self.pages + count - 1, self.pages - 1, -1))
        self.pages += count
