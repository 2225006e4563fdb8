"""What a step's int32 tensors say, read once for all layers: requests as Python numbers, and where their tokens lie.

Plans are kept for the step that ``launch.promised`` encloses, one for each page table (layers of a group share one).
A plan is made anew for tensors that torch has changed in place since.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from operator import is_
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..launch import step_memo
from ..ops import STEP_TENSORS, Mode, first_visible

_TABLE = STEP_TENSORS.index("page_table")

_PAGE_TABLE = STEP_TENSORS.index("page_table")

Pages = slice | Tensor
"""Physical pages in the order of the positions in them: a slice where they follow each other, else int64."""


class Request(NamedTuple):
    """A request that has rows in the step; the fields are those of ``ops.STEP_TENSORS``."""

    slot: int
    mode: int
    first: int
    row_count: int
    cached: int
    scored: int
    score_slot: int
    pillars: int
    recent: int

    @property
    def rows(self) -> slice:
        """Its packed rows."""
        return slice(self.first, self.first + self.row_count)

    @property
    def end(self) -> int:
        """The position behind its last row."""
        return self.cached + self.row_count

    @property
    def sparse(self) -> bool:
        """Whether its rows are drafts that read chosen positions: pillars, and not all there are."""
        return self.mode == Mode.DRAFT and self.pillars not in (0, self.recent)


class Written(NamedTuple):
    """Where the step's own keys and values go, int64 [n]; ``row`` is a slice where the n rows follow each other."""

    page: Tensor
    place: Tensor
    row: slice | Tensor


class SparseRows(NamedTuple):
    """Draft rows that read chosen positions, B of them, and what they read beside the first M pillars of their slots.

    ``row``, ``slot`` [B] int64, ``position`` [B, 1, 1] int32; ``recent`` [B, 1, n] int32, positions read densely;
    ``not_pillar`` [B, 1, M] and ``not_recent`` [B, 1, n] bool, entries that pad shorter lists. Padding stands for the
    row's own position: the row reads that anyway, so that a weight of 0 hides it even if it is NaN.
    """

    row: Tensor
    slot: Tensor
    position: Tensor
    recent: Tensor
    not_pillar: Tensor
    not_recent: Tensor


class StepPlan:
    """A step as the host sees it. Nothing is read before it is asked for: a call is checked first.

    Args:
        tensors: the step tensors, in the order of ``ops.STEP_TENSORS``.

    Attributes:
        kinds: dtype, shape and last stride of each tensor.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._step = dict(zip(STEP_TENSORS, tensors, strict=True))
        self._written: dict[int, Written] = {}
        self._pages: dict[tuple[int, int, int], Pages] = {}
        self._sparse: dict[tuple[int, bool], SparseRows | None] = {}
        self.kinds = kinds(tensors)

    @cached_property
    def requests(self) -> list[Request]:
        """The requests that have rows, in the order of their slots."""
        columns = (tensor.tolist() for name, tensor in self._step.items() if name != "page_table")
        everyone = [Request(slot, *fields) for slot, fields in enumerate(zip(*columns, strict=True))]
        return [request for request in everyone if request.mode != Mode.IDLE and request.row_count > 0]

    @cached_property
    def covered(self) -> int:
        """Packed rows that belong to a request."""
        return sum(request.row_count for request in self.requests)

    @cached_property
    def _table(self) -> np.ndarray:
        return self._step["page_table"].numpy()

    def written(self, page_size: int) -> Written:
        """Page, place in it and packed row of every row of a request."""
        if page_size not in self._written:
            columns = [(request.slot, request.first, request.row_count, request.cached) for request in self.requests]
            slot, first, count, cached = np.array(columns, dtype=np.int64).reshape(-1, 4).T
            nth = np.arange(self.covered) - np.repeat(np.cumsum(count) - count, count)
            position = np.repeat(cached, count) + nth
            page = self._table[np.repeat(slot, count), position // page_size].astype(np.int64)
            row = np.repeat(first, count) + nth
            start = int(row[0]) if len(row) else 0
            in_order = bool((row == np.arange(start, start + len(row))).all())
            self._written[page_size] = Written(
                torch.from_numpy(page),
                torch.from_numpy(position % page_size),
                slice(start, start + len(row)) if in_order else torch.from_numpy(row),
            )
        return self._written[page_size]

    def sparse_rows(self, window: int, chunked: bool) -> SparseRows | None:
        """The draft rows for which `Request.sparse` holds, in the order of `requests`; None if there are none."""
        kind = (window, chunked)
        if kind not in self._sparse:
            rows = [
                (request.first + nth, request.slot, request.cached + nth, request.recent, request.pillars)
                for request in self.requests
                if request.sparse
                for nth in range(request.row_count)
            ]
            self._sparse[kind] = _sparse_rows(np.array(rows, dtype=np.int32), *kind) if rows else None
        return self._sparse[kind]

    @property
    def page_table(self) -> Tensor:
        """int32 [slots, P]."""
        return self._step["page_table"]

    def physical(self, slot: int, page: int) -> int:
        """The physical page of a logical page of a slot."""
        return int(self._table[slot, page])

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


def _sparse_rows(rows: np.ndarray, window: int, chunked: bool) -> SparseRows:
    """From (packed row, slot, position, first recent position, pillars) of each row."""
    row, slot, position, recent, pillars = rows.T[:, :, None, None]
    recent = np.maximum(recent, first_visible(position, window, chunked))
    reads = recent + np.arange((position + 1 - recent).max(), dtype=np.int32)
    beyond = reads > position
    return SparseRows(
        torch.from_numpy(row.ravel().astype(np.int64)),
        torch.from_numpy(slot.ravel().astype(np.int64)),
        torch.from_numpy(position.copy()),
        torch.from_numpy(np.where(beyond, position, reads)),
        torch.from_numpy(np.arange(pillars.max()) >= pillars),
        torch.from_numpy(beyond),
    )


def kinds(tensors: Iterable[Tensor]) -> tuple:
    """What checks look at in each tensor."""
    return tuple((tensor.dtype, tensor.shape, tensor.stride()[-1:], tensor.device) for tensor in tensors)


def plan_of(tensors: tuple[Tensor, ...]) -> StepPlan:
    """The plan of the step that these tensors describe."""
    memo = step_memo()
    if memo is None:
        return StepPlan(tensors)
    key = (StepPlan, id(tensors[_TABLE]))  # layers of a group share a page table
    kept: _Kept | None = memo.get(key)
    if kept is None or not kept.is_of(tensors):
        kept = memo[key] = _Kept(tensors)
    return kept.plan


class _Kept:
    """A plan, and what it was made of."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.plan = StepPlan(tensors)
        self._tensors = tensors
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]  # others have no versions
        self._versions = [tensor._version for tensor in self._counted]

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the tensors, and none was changed in place since."""
        return all(map(is_, self._tensors, tensors)) and self._versions == [t._version for t in self._counted]
