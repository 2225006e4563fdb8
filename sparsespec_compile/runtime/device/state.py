"""The device tensors that outlive an iteration: one owner for all of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import PROCESSING, PROCESSING_WIDTH
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.runtime.device.interface import Device

POOL = "KV pool"


@dataclass(frozen=True)
class Capacity:
    """Sizes of the state. A request takes one slot while it runs.

    Attributes:
        slots: requests that hold a slot together, S.
        tokens: positions of the longest request, N.
        pages: pages of the KV pool, of all groups of layers together.
        pillars: pillars that a draft reads at most, M.
        score_slots: requests that can be scored in one iteration, C.
    """

    slots: int
    tokens: int
    pages: int
    pillars: int
    score_slots: int

    def with_pages(self, pages: int) -> "Capacity":
        """The same with another number of pages."""
        return replace(self, pages=pages)


class State:
    """Everything about the running requests that lives on the device.

    Attributes:
        tokens: int64 [S + 1, N]. Tokens of prompts, and drawn ones, accepted and drafted, each at its position. Row S
            takes the writes of rows that belong to no request.
        length: int32 [S], positions whose K/V in the pool are exact: written by a prefill or by a verification.
        drafted: int32 [S], drafts of the cycle under way: they stand in `tokens` behind position `length`.
        page_table: int32 [G, S + 1, P], for each group of layers (`KVLayout.groups`), the page of the pool that holds a
            logical page of the slot's request. Row S is never read.
        pillar_index: int32 [S, H, M], positions that drafts read, for the KV heads of all layers.
        pillar_count: int32 [S], used entries of `pillar_index`.
        recent_start: int32 [S], first position that drafts read densely.
        processing: int32 [S, PROCESSING_WIDTH], what `process_logits` does to each slot's logits.
        pool: [pages, elements_per_page] in the model's dtype.
        scores: float32 [C, H, N], what the pillars of this iteration's verified requests are chosen by.
    """

    def __init__(self, layout: KVLayout, capacity: Capacity, dtype: torch.dtype, device: Device) -> None:
        slots, heads = capacity.slots, layout.total_kv_heads

        def ints(*shape: int) -> Tensor:
            return device.zeros(*shape, dtype=torch.int32)

        self.capacity = capacity
        self.layout = layout
        self.device = device.torch_device
        self._memory = device
        self.tokens = device.zeros(slots + 1, capacity.tokens, dtype=torch.int64)
        self.length = ints(slots)
        self.drafted = ints(slots)
        self.page_table = ints(len(layout.groups), slots + 1, request_pages(layout, capacity))
        self.pillar_index = ints(slots, heads, capacity.pillars)
        self.pillar_count = ints(slots)
        self.recent_start = ints(slots)
        self.processing = ints(slots, PROCESSING_WIDTH)
        self.processing[:, PROCESSING.index("repetition")].view(torch.float32).fill_(1.0)  # what leaves logits alone
        self.pool = device.zeros(capacity.pages, layout.elements_per_page, dtype=dtype)
        self.scores = device.zeros(capacity.score_slots, heads, capacity.tokens, dtype=torch.float32)

    def give_pool(self, pages: int) -> None:
        """Replace the pool by one of `pages` pages, before any request holds one."""
        dtype, elements = self.pool.dtype, self.pool.shape[1]
        self.capacity = replace(self.capacity, pages=pages)
        self.pool = torch.empty(0, dtype=dtype, device=self.device)  # the old one makes room
        self.pool = self._memory.zeros(pages, elements, dtype=dtype)


def request_pages(layout: KVLayout, capacity: Capacity) -> int:
    """Logical pages of a slot, P: a multiple of 4, so that the page table of each group begins at one of 16 bytes."""
    return -(-layout.pages_for(capacity.tokens) // 4) * 4


def page_bytes(layout: KVLayout, dtype: torch.dtype) -> int:
    """Bytes of a page of the pool."""
    return layout.elements_per_page * dtype.itemsize


def state_bytes(layout: KVLayout, capacity: Capacity, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a state's large tensors, by what they are for; those of the pool by `POOL`."""
    heads = layout.total_kv_heads
    return {
        POOL: capacity.pages * page_bytes(layout, dtype),
        "attention scores": 4 * capacity.score_slots * heads * capacity.tokens,
        "logits processing": 4 * capacity.slots * PROCESSING_WIDTH,
        "pillar index": 4 * capacity.slots * heads * capacity.pillars,
        "tokens and page table": 8 * (capacity.slots + 1) * capacity.tokens
        + 4 * len(layout.groups) * (capacity.slots + 1) * request_pages(layout, capacity),
    }
