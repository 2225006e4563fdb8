"""Prompts whose K/V are computed once and read by many runs, of one engine or of several with other settings.

Reading 64 prompts of 8,192 tokens takes far longer than decoding 256 tokens of each, and is outside the benchmark's
clock. Within an engine the prefix cache keeps K/V of prompts, as long as the pool has room. `KeptPool` is a device that
gives every engine the same KV pool, as the engine before left it, and `KeptPrompts` tells the next engine's prefix
cache which pages hold which prompts. So every run of every engine begins with the same cache.

This reaches into the engine. The pool must be of a fixed size. In layers with a sliding window pages of prompts are
given back early, so prompts of models that have some are computed again.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsespec_compile.runtime.build import Target
from sparsespec_compile.runtime.device.devices import open_device
from sparsespec_compile.runtime.device.interface import Memory
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.request import PageTable, Request

_MORE_PAGES = 8
"""Of each request, for the end of its prompt, which every run computes, and for rows beyond what is known as final."""


class KeptPool:
    """A device of which every engine gets the same KV pool. It otherwise is what `open_device` gives.

    Args:
        target: what the engines run; its layout tells a pool from other tensors.
    """

    def __init__(self, target: Target) -> None:
        self._device = open_device(target.device)
        self._kind = (target.layout.elements_per_page, target.dtype)
        self._pool: Tensor | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._device, name)

    @property
    def memory(self) -> "Memory | None":
        """The device's, to which the pool counts as free: whoever plans its memory will get it."""
        memory = self._device.memory
        return None if memory is None else _MemoryWithPool(memory, self)

    @property
    def pool_bytes(self) -> int:
        """Of the pool, 0 before there is one."""
        return 0 if self._pool is None else self._pool.numel() * self._pool.itemsize

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros, or the kept pool; the two pages with which a state begins are no pool."""
        if (shape[-1], dtype) != self._kind or len(shape) != 2 or shape[0] <= 2:
            return self._device.zeros(*shape, dtype=dtype)
        if self._pool is None or len(self._pool) < shape[0]:
            self._pool = None
            self._pool = self._device.zeros(*shape, dtype=dtype)
        return self._pool[: shape[0]]

    def drop(self) -> None:
        """Give the pool's memory back, once no engine has it."""
        self._pool = None


class _MemoryWithPool:
    def __init__(self, memory: Memory, device: KeptPool) -> None:
        self._memory = memory
        self._device = device

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)

    def free(self) -> int:
        return self._memory.free() + self._device.pool_bytes


class KeptPrompts:
    """Prompts whose pages every engine over a `KeptPool` finds in its prefix cache, and never gives away.

    Args:
        prompts: token ids.
        page_size: of the engines.
    """

    def __init__(self, prompts: Iterable[list[int]], page_size: int) -> None:
        self._page_size = page_size
        self._prompts = {tuple(prompt): list(prompt) for prompt in prompts}
        self._held: dict[tuple[int, ...], tuple[list[bytes], tuple[PageTable, ...]]] = {}

    def pool_tokens(self, requests: int, tokens: int) -> int:
        """`SpecConfig.pool_tokens` for the prompts, beside which `requests` texts grow by `tokens` each."""
        prompts = sum(-(-len(prompt) // self._page_size) for prompt in self._prompts)
        growth = -(-tokens // self._page_size) + _MORE_PAGES
        return (prompts + requests * growth) * self._page_size

    def give(self, engine: Engine) -> None:
        """Build the state of a new engine, whose prefix cache then knows the prompts that were computed."""
        kv_cache = engine._session_for([Request([0], 1)])._scheduler.kv_cache
        pool = kv_cache.pool
        held = {page for _, tables in self._held.values() for table in tables for page in table.pages}
        pool.release([page for page in pool.allocate(pool.pages) or [] if page not in held])
        for keys, tables in self._held.values():
            kv_cache._prefixes.keep(keys, tables, 0, len(keys))

    def computed(self, engine: Engine, prompts: Iterable[list[int]]) -> None:
        """Hold the pages of prompts that an engine has just computed."""
        prefixes = engine._session._scheduler.kv_cache._prefixes
        for prompt in prompts:
            key = tuple(prompt)
            if key in self._prompts and key not in self._held:
                keys: list[bytes] = []
                prefixes.extend_keys(keys, prompt)
                self._held[key] = keys, prefixes.take(keys, prefixes.find(keys, len(keys)))
