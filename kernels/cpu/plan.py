"""What a step's int32 tensors say, read once for all layers: requests as Python numbers, and where their tokens lie.

A plan is kept for the step that ``step_kind.promised`` encloses. It is made anew for other tensors, and for tensors
that torch has changed in place since.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import STEP_TENSORS, Mode
from ..step_kind import step_memo

Pages = slice | Tensor
"""Physical pages in the order of the positions in them: a slice where they follow each other, else int64."""


class Request(NamedTuple):
    """A request that has rows in the step; the fields are those of ``ops.STEP_TENSORS``."""

    slot: int
    mode: int
    first: int
    count: int
    cached: int
    scored: int
    score_slot: int
    pillars: int
    recent: int

    @property
    def rows(self) -> slice:
        """Its packed rows."""
        return slice(self.first, self.first + self.count)

    @property
    def end(self) -> int:
        """The position behind its last row."""
        return self.cached + self.count


class Written(NamedTuple):
    """Where the step's own keys and values go, int64 [n]; ``row`` is a slice where the n rows follow each other."""

    page: Tensor
    place: Tensor
    row: slice | Tensor


class StepPlan:
    """A step as the host sees it. Nothing is read before it is asked for: a call is checked first.

    Args:
        tensors: the step tensors, in the order of ``ops.STEP_TENSORS``.

    Attributes:
        checked: calls that were found to be in order, by what was looked at.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._step = dict(zip(STEP_TENSORS, tensors, strict=True))
        self._written: dict[int, Written] = {}
        self._pages: dict[tuple[int, int, int], Pages] = {}
        self.checked: set[tuple] = set()

    @cached_property
    def requests(self) -> list[Request]:
        """The requests that have rows, in the order of their slots."""
        columns = (tensor.tolist() for name, tensor in self._step.items() if name != "page_table")
        everyone = [Request(slot, *fields) for slot, fields in enumerate(zip(*columns, strict=True))]
        return [request for request in everyone if request.mode != Mode.IDLE and request.count > 0]

    @cached_property
    def covered(self) -> int:
        """Packed rows that belong to a request."""
        return sum(request.count for request in self.requests)

    @cached_property
    def _table(self) -> np.ndarray:
        return self._step["page_table"].numpy()

    def written(self, page_size: int) -> Written:
        """Page, place in it and packed row of every row of a request."""
        if page_size not in self._written:
            row, page, place = [], [], []
            for request in self.requests:
                position = np.arange(request.cached, request.end)
                row.append(np.arange(request.first, request.first + request.count))
                page.append(self._table[request.slot, position // page_size])
                place.append(position % page_size)
            rows = _torch(row)
            first = int(rows[0]) if len(rows) else 0
            in_order = torch.equal(rows, torch.arange(first, first + len(rows)))
            self._written[page_size] = Written(
                _torch(page), _torch(place), slice(first, first + len(rows)) if in_order else rows
            )
        return self._written[page_size]

    def table(self, slot: int) -> Tensor:
        """The page table's row of a slot, int32 [P]."""
        return self._step["page_table"][slot]

    def pages(self, slot: int, first: int, end: int) -> Pages:
        """Physical pages of the logical pages ``first`` .. ``end - 1``, one at least, of a slot."""
        key = (slot, first, end)
        if key not in self._pages:
            pages = self._table[slot, first:end]
            start = int(pages[0])
            if (pages == np.arange(start, start + len(pages))).all():
                self._pages[key] = slice(start, start + len(pages))
            else:
                self._pages[key] = torch.from_numpy(pages.astype(np.int64))
        return self._pages[key]


def plan_of(tensors: tuple[Tensor, ...]) -> StepPlan:
    """The plan of the step that these tensors describe."""
    memo = step_memo()
    if memo is None:
        return StepPlan(tensors)
    versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
    known = memo.get(StepPlan)
    if known is not None:
        plan, given, seen = known
        if seen == versions and all(one is other for one, other in zip(given, tensors, strict=True)):
            return plan
    plan = StepPlan(tensors)
    memo[StepPlan] = (plan, tensors, versions)
    return plan


def _torch(parts: list[np.ndarray]) -> Tensor:
    """The parts one after the other, as int64."""
    joined = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(joined.astype(np.int64))
