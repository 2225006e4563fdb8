"""Pages of requests that had to leave the device, in pinned host memory.

Whole requests move, page by page, on a stream of their own, so that steps go on meanwhile; nothing is recomputed
(paper, dynamic KV manager). A page holds all layers' K/V of its tokens and moves in one copy. Memory is taken as it is
needed, up to a cap; a background thread pins it ahead of the next offload, and an offload that finds none retries in
the next iteration.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor

from sparsespec_compile.runtime.device.interface import Event, Stream
from sparsespec_compile.runtime.host.page_pool import PagePool

_BLOCK_BYTES = 2**24
"""Host memory is taken in blocks of at most this size, or of one page, which never move."""

_NO_MEMORY = (RuntimeError, MemoryError, OSError)
"""What is raised for memory that cannot be had; CUDA's error for what it cannot pin is the first."""

_COPIES_AT_ONCE = 64
"""Pages whose copies are enqueued between two steps: the host must get back to planning."""


def available_host_bytes(root: Path = Path("/")) -> int:
    """Host memory available without swapping, page cache included, within the limit of the control group.

    Where the system does not say how much is free, as macOS, all memory that there is.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    information = root / "proc/meminfo"
    if not information.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in information.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = root / "sys/fs/cgroup"
    limit, used, parts = group / "memory.max", group / "memory.current", group / "memory.stat"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        counts = dict(line.split() for line in parts.read_text().splitlines()) if parts.exists() else {}
        cached = int(counts.get("inactive_file", 0))  # the page cache counts as used, but makes room
        available = min(available, int(limit.read_text()) - int(used.read_text()) + cached)
    return max(available, 0)


_SEEN = 8
"""Iterations after which a transfer is waited for, where ranks must agree on it."""


class Transfer:
    """Pages on their way, in one direction.

    Attributes:
        device_pages, host_pages: the n-th page of the one is copied from or to the n-th of the other.
        to_host: the direction.
    """

    def __init__(self, device_pages: list[int], host_pages: list[int], fence: Event, *, to_host: bool) -> None:
        self.device_pages = device_pages
        self.host_pages = host_pages
        self.to_host = to_host
        self.seen = 0  # times that completion was polled
        self._sent = 0
        self._fence = fence
        self._end: Event | None = None

    @property
    def enqueued(self) -> bool:
        """Whether every copy was handed to the device."""
        return self._sent == len(self.device_pages)


class HostTier:
    """Moves pages between a pool and host memory.

    Args:
        steps: the stream of the steps that read and write the pool.
        pool: [pages, elements], what moves together in a row.
        pages: pages of host memory at most; 0 = there is no host tier.
        together: whether ranks that share a model must see the same pages arrive in the same iteration. Then transfers
            are complete so many calls of `advance` after they began, and host memory is waited for.

    Attributes:
        capacity: pages that host memory can hold; falls to what is there when the system gives no more.
    """

    def __init__(self, steps: Stream, pool: Tensor, pages: int, *, together: bool = False) -> None:
        self.capacity = pages
        self._together = together
        self._steps = steps
        self._copies = steps.device.stream()
        self._pool = pool
        self._block_pages = max(1, min(pages, _BLOCK_BYTES // (pool.shape[1] * pool.itemsize)))
        self._blocks: list[Tensor] = []
        self._coming: Future[Tensor] | None = None
        self._free = PagePool(0)
        self._longest = 0
        self._moving: deque[Transfer] = deque()

    @property
    def held(self) -> int:
        """Pages of host memory in use."""
        return self._free.pages - self._free.free

    def offload(self, device_pages: list[int]) -> Transfer | None:
        """Begin to copy pages to host memory, after all steps enqueued so far.

        Returns:
            None when host memory cannot hold them, or, while it is `growing`, not yet.
        """
        host_pages = self._reserve(len(device_pages))
        return None if host_pages is None else self._begin(device_pages, host_pages, to_host=True)

    def restore(self, host_pages: list[int], device_pages: list[int]) -> Transfer:
        """Begin to copy pages back, after all steps enqueued so far."""
        return self._begin(device_pages, host_pages, to_host=False)

    @property
    def growing(self) -> bool:
        """Whether more host memory is on the way."""
        return self._coming is not None

    def release(self, host_pages: list[int]) -> None:
        """Take back pages of host memory."""
        self._free.release(host_pages)

    def advance(self) -> Iterator[Transfer]:
        """Enqueue further copies; yields the completed transfers, in the order in which they began."""
        if self._steps.device.asynchronous:
            self._grow(self._longest)  # ahead of the next offload
        some = self._steps.device.asynchronous and not self._together
        room = _COPIES_AT_ONCE if some else sum(len(t.device_pages) for t in self._moving)
        for transfer in self._moving:
            if room and not transfer.enqueued:
                room -= self._copy(transfer, room)
        while self._moving and self._complete(self._moving[0]):
            yield self._moving.popleft()

    def wait(self) -> None:
        """Wait until what was enqueued is copied, and host memory that is on the way is there."""
        self._copies.record().wait()
        self._add_block(wait=True)

    def clear(self) -> None:
        """Forget all transfers and free all host pages; the memory itself is kept."""
        self.wait()
        self._longest = 0
        self._moving.clear()
        self._free = PagePool(self._free.pages)

    def _begin(self, device_pages: list[int], host_pages: list[int], *, to_host: bool) -> Transfer:
        # Steps under way still write: a leaving request's own tokens, or, into pages that a request which has just
        # ended gave back, tokens that are never read.
        transfer = Transfer(device_pages, host_pages, self._steps.record(), to_host=to_host)
        self._moving.append(transfer)
        return transfer

    def _copy(self, transfer: Transfer, most: int) -> int:
        first, last = transfer._sent, min(transfer._sent + most, len(transfer.device_pages))
        self._copies.wait(transfer._fence)
        on_device = [self._pool[page] for page in transfer.device_pages[first:last]]
        on_host = [self._page(page) for page in transfer.host_pages[first:last]]
        targets, sources = (on_host, on_device) if transfer.to_host else (on_device, on_host)
        self._copies.copy(*zip(targets, sources, strict=True))
        transfer._sent = last
        if transfer.enqueued:
            transfer._end = self._copies.record()
        return last - first

    def _complete(self, transfer: Transfer) -> bool:
        if self._together:
            transfer.seen += 1
            if transfer.seen < _SEEN:
                return False
            if transfer._end is not None:
                transfer._end.wait()
        # A request that holds no page yet leaves with nothing to copy.
        return transfer.enqueued and (transfer._end is None or transfer._end.done)

    def _page(self, number: int) -> Tensor:
        return self._blocks[number // self._block_pages][number % self._block_pages]

    def _reserve(self, count: int) -> list[int] | None:
        self._longest = max(self._longest, count)
        self._grow(count)
        return self._free.allocate(count)

    def _grow(self, count: int) -> None:
        """Take host memory until `count` pages are free: at once, or, by a thread, the next block of it."""
        self._add_block(wait=self._together)
        while self._coming is None and self._free.free < count and self._free.pages < self.capacity:
            pages = min(self._block_pages, self.capacity - self._free.pages)
            self._coming = self._steps.device.host_block((pages, self._pool.shape[1]), self._pool.dtype)
            self._add_block(wait=self._together)

    def _add_block(self, *, wait: bool) -> None:
        if self._coming is None or not (wait or self._coming.done()):
            return
        coming, self._coming = self._coming, None
        try:
            block = coming.result()
        except _NO_MEMORY:
            self.capacity = self._free.pages  # the system gives no more: live with what there is
            return
        self._blocks.append(block)
        self._free.grow(block.shape[0])
