"""Which pages of the KV pool are free."""

from collections import deque


class PageAllocator:
    """Hands out the pages of a pool, by number, and takes them back.

    Args:
        pages: pages in the pool.
        page_size: tokens in a page.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self._free = deque(range(pages))

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int) -> list[int] | None:
        """Pages for `tokens` tokens of one request, or None when too few are free."""
        needed = self.pages_for(tokens)
        if needed > len(self._free):
            return None
        return [self._free.popleft() for _ in range(needed)]

    def release(self, pages: list[int]) -> None:
        """Take back what `allocate` gave."""
        self._free.extend(pages)
