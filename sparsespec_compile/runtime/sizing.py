"""How large the engine's state is: by the configuration, the model and the device's memory, never by a call.

The KV pool takes what everything else leaves. What grows with the longest text besides the pool (scores, pillar
indices, tokens, page tables) is kept to a share of memory by lowering the length that is allowed for.
"""

from collections.abc import Sequence

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.runtime.build import Target, capacity_for
from sparsespec_compile.runtime.device.interface import Device
from sparsespec_compile.runtime.drafters import Drafter
from sparsespec_compile.runtime.host_tier import available_host_bytes
from sparsespec_compile.runtime.kv_cache import most_pages
from sparsespec_compile.runtime.state import POOL, Capacity, page_bytes, state_bytes

_DEFAULT_LENGTH = 32768
"""Tokens of the longest text of a model that does not say how many positions it has."""

_LENGTH_SHARE = 0.1
"""Of the memory, for what grows with the longest text besides the pool."""

_HOST_SHARE = 0.5
"""Of the free host memory, for the state of a model on a CPU. Pages of it that are never used take none."""

_SHORTEST = 1024
"""Tokens of a text that are allowed for whatever memory there is."""


def engine_capacity(
    target: Target, config: SpecConfig, drafters: Sequence[Drafter], device: Device, longest: int
) -> Capacity:
    """Sizes of the engine's state. The pool's pages are those that could be used; memory may leave room for fewer.

    Args:
        longest: tokens of the longest request that has been asked for; counts where it exceeds the model's positions.
    """
    memory = usable_bytes(device, config)
    length = config.max_length or max(target.positions or _DEFAULT_LENGTH, longest)
    if config.pool_tokens is not None:
        length = min(length, config.pool_tokens)
    capacity = _capacity(target.layout, config, drafters, length)
    shortest = max(_SHORTEST, longest)
    while config.max_length is None and length > shortest:
        parts = state_bytes(target.layout, capacity, target.dtype)
        if sum(parts.values()) - parts[POOL] <= _LENGTH_SHARE * memory:
            break
        length = max(length * 3 // 4, shortest)
        capacity = _capacity(target.layout, config, drafters, length)
    if config.pool_tokens is None and device.memory is None:
        most = max(2, memory // page_bytes(target.layout, target.dtype))
        capacity = capacity.with_pages(min(capacity.pages, most))
    return capacity


def usable_bytes(device: Device, config: SpecConfig) -> int:
    """Memory that the engine may take, of what is free."""
    if device.memory is not None:
        return int(device.memory.free() * config.memory_fraction)
    return int(available_host_bytes() * _HOST_SHARE)


def _capacity(layout: KVLayout, config: SpecConfig, drafters: Sequence[Drafter], length: int) -> Capacity:
    pages = config.max_requests * most_pages(layout, length, config.most_draft_tokens + 1, config.prefill_chunk)
    if config.pool_tokens is not None:
        pages = config.pool_tokens // layout.page_size * len(layout.groups)
    return capacity_for(config, drafters, config.max_requests, length, pages)
