"""The device tensors that outlive an iteration: one owner for all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.runtime.sampling import SamplingParams, SamplingRows


@dataclass(frozen=True)
class Capacity:
    """Sizes of the state. A request takes one slot while it runs.

    Attributes:
        slots: requests that run together, S.
        tokens: positions of the longest request, N.
        pages: pages of the KV pool.
        pillars: pillars that a draft reads at most, M.
    """

    slots: int
    tokens: int
    pages: int
    pillars: int

    def covers(self, other: "Capacity") -> bool:
        """Whether state of this size serves requests that need `other`."""
        return (
            self.slots >= other.slots
            and self.tokens >= other.tokens
            and self.pages >= other.pages
            and self.pillars >= other.pillars
        )


class State:
    """Everything about the running requests that lives on the device.

    Attributes:
        tokens: int64 [S + 1, N]. Prompt, accepted and drafted tokens, each at its position. Row S takes the writes of
            rows that belong to no request.
        length: int32 [S], positions whose K/V in the pool are exact: written by a prefill or by a verification.
        max_length: int32 [S], prompt and new tokens together; no row is computed that only later tokens would need.
        page_table: int32 [S, P], physical page of each logical page; -1 = not reserved.
        pillar_index: int32 [S, H, M], positions that drafts read, for the KV heads of all layers; -1 = unused.
        pillar_count: int32 [S], used entries of `pillar_index`.
        recent_start: int32 [S], first position that drafts read densely.
        sampling: settings of each request, [S] each.
        pool: [pages, elements_per_page] in the model's dtype.
        scores: float32 [S, H, N], attention probabilities of this iteration's verified positions.
    """

    def __init__(self, layout: KVLayout, capacity: Capacity, dtype: torch.dtype, device: torch.device) -> None:
        slots, heads = capacity.slots, layout.total_kv_heads

        def ints(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        self.capacity = capacity
        self.device = device
        self.tokens = torch.zeros(slots + 1, capacity.tokens, dtype=torch.int64, device=device)
        self.length = ints(slots)
        self.max_length = ints(slots)
        self.page_table = ints(slots, -(-capacity.tokens // layout.page_size), fill=-1)
        self.pillar_index = ints(slots, heads, capacity.pillars, fill=-1)
        self.pillar_count = ints(slots)
        self.recent_start = ints(slots)
        self.sampling = SamplingRows(
            temperature=torch.zeros(slots, device=device),
            top_k=torch.zeros(slots, dtype=torch.int64, device=device),
            top_p=torch.ones(slots, device=device),
            min_p=torch.zeros(slots, device=device),
            seed=torch.zeros(slots, dtype=torch.int64, device=device),
        )
        self.pool = torch.zeros(capacity.pages, layout.elements_per_page, dtype=dtype, device=device)
        self.scores = torch.zeros(slots, heads, capacity.tokens, device=device)

    def admit(self, slot: int, prompt: list[int], max_length: int, pages: list[int], params: SamplingParams) -> None:
        """Give `slot` to a request: nothing verified yet, no pillars."""
        self.tokens[slot, : len(prompt)] = torch.tensor(prompt, device=self.device)
        self.page_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device=self.device)
        self.max_length[slot] = max_length
        for tensor in (self.length, self.pillar_count, self.recent_start):
            tensor[slot] = 0
        for name, tensor in self.sampling._asdict().items():
            tensor[slot] = getattr(params, name)
