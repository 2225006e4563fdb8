"""What the host decides about an iteration, and how it reaches the device: by one copy to one tensor.

All of it lies in one int32 tensor, so that a captured step reads the same addresses every time and an upload is a
single copy from pinned memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.drafters import Drafter
from sparsespec_compile.runtime.device.sampling import DrawParams, SamplingRows


class Work(NamedTuple):
    """One request's share of an iteration. Nothing in it depends on how many drafts were accepted.

    Attributes:
        slot: the request's row in the state tensors.
        mode: draft, verify or prefill.
        rows: packed rows at most. For a draft 1, or more with proposals; drafts + 1 for a verification, the chunk's
            tokens for a prefill.
        offset: drafts: position of the first row, counted from the request's verified length (its drafts so far).
            Verifications: 0. With -1 `State.drafted` tells: a draft begins behind the drafts there are, and a
            verification has no more rows than there are drafts, and one. Prefills: position of the first row; all
            positions before it hold the text already.
        tokens: prefills: the chunk's token ids, `rows` of them. Others take theirs from the device.
        logits: trailing rows whose logits are needed: all of a draft or verification, the last one of a prompt.
        scored: trailing rows whose attention chooses the next pillars among earlier positions; 0 = keep the present
            pillars. Of more rows in a verification, the last `kernels.ops.scored_rows_at_most` count.
        drafter: the drafter of the drafts that are verified, None = no drafts; for statistics, not read on the device.
        whole_cycle: whether they are of as many draft iterations as cycles have at the time; likewise.
        most: drafts with offset -1: drafts of the cycle at most, those there are included.
        proposes: whether the slot gets proposals, for the next iteration to judge.
    """

    slot: int
    mode: Mode
    rows: int
    offset: int = 0
    tokens: Sequence[int] = ()
    logits: int = 0
    scored: int = 0
    drafter: Drafter | None = None
    whole_cycle: bool = False
    most: int = 0
    proposes: bool = False


class PageUpdate(NamedTuple):
    """An entry of a slot's page table: `physical` is the page of the pool where logical page `page` of a group lies.

    Attributes:
        slot: whose page table.
        page: logical page, positions `page * page_size` and on.
        physical: page of the pool.
        group: number of the group of layers, `KVLayout.group_of`.
    """

    slot: int
    page: int
    physical: int
    group: int = 0


def promise_of(work: Iterable[Work], reads_scores: bool) -> Promise:
    """What attention need not do for an iteration; `reads_scores`: whether anybody reads the scores of scored rows."""
    rows, scored, prompts_scored, only_drafts = 0, False, False, True
    for item in work:
        only_drafts = only_drafts and item.mode == Mode.DRAFT
        rows = max(rows, item.rows)
        scored = scored or item.scored > 0
        prompts_scored = prompts_scored or (item.scored > 0 and item.mode == Mode.PREFILL)
    if not scored and (only_drafts or rows <= 1):
        return Promise.SMALL_TILES
    if not reads_scores:
        return Promise.NO_SCORES
    return Promise.NOTHING if prompts_scored else Promise.ONLY_VERIFICATIONS_SCORED


MIN_ROWS = 2
"""What the graph was exported for."""

_SLOT_FIELDS = (
    "mode",
    "row_start",
    "rows",
    "offset",
    "scored",
    "score_slot",
    "logit_start",
    "logit_count",
    "most",
    "proposes",
    "max_length",
    "top_k",
    "temperature",
    "top_p",
    "min_p",
    "seed_low",
    "seed_high",
)
_WORK_FIELDS = 10  # the first ones are anew in every iteration, the others stay while a request keeps its slot
_WORK_NUMBERS = ("slot", "mode", "rows", "offset", "logits", "scored", "most", "proposes")  # of `Work`
_ROW_FIELDS = ("row_slot", "row_place", "row_token")
_ALIGNED = 4
"""Alignment of fields, in values (16 bytes): every compiled region would copy an input that is less aligned."""


@dataclass(frozen=True)
class InputSizes:
    """Sizes of the inputs.

    Attributes:
        slots: request slots, S.
        rows: packed rows at most.
        logits: rows with logits at most.
        request_pages: logical pages of a slot, P.
        updates: page-table entries that one iteration can change.
    """

    slots: int
    rows: int
    logits: int
    request_pages: int
    updates: int

    def spans(self) -> Mapping[str, slice]:
        """Where each field lies in the flat tensor; there are gaps between them."""
        lengths = dict.fromkeys(_SLOT_FIELDS, self.slots)
        lengths |= dict.fromkeys(_ROW_FIELDS, self.rows)
        lengths |= {"logit_rows": self.logits, "update_at": self.updates, "update_page": self.updates}
        begins = np.cumsum([0, *(_aligned(length) for length in lengths.values())]).tolist()[:-1]
        return {name: slice(at, at + size) for (name, size), at in zip(lengths.items(), begins, strict=True)}


def _aligned(length: int) -> int:
    return -(-length // _ALIGNED) * _ALIGNED


class StepInputs:
    """The inputs on the device. Every attribute is a view of `flat`, at `sizes.spans()`; fill it, then run the step.

    Attributes:
        flat: int32, all of them.
        mode: int32 [S], a `kernels.ops.Mode`; IDLE for a slot without work.
        row_start, rows: int32 [S], first packed row and number of rows of a slot.
        offset: int32 [S], as in `Work`.
        scored: int32 [S], trailing rows that choose the next pillars, as in `Work`.
        score_slot: int32 [S], row of the score buffer that they are written to.
        logit_start, logit_count: int32 [S], which of the rows with logits belong to a slot.
        most, proposes: int32 [S], as in `Work`.
        max_length: int32 [S], prompt and new tokens together at most.
        temperature, top_p, min_p: float32 [S]; top_k: int32 [S]; as in `DrawParams`.
        seed_low, seed_high: int32 [S], the bits of the seed.
        row_slot: int32 [T], slot of each packed row, -1 = padding.
        row_place: int32 [T], number of the row within its slot, from 0.
        row_token: int32 [T], token id of a prompt's row, -1 = the device's own token at the row's position.
        logit_rows: int32 [R], packed row of each row with logits, -1 = padding.
        update_at, update_page: int32 [U], entry of the flattened page tables and its new value; padding points at the
            last row of the first group's table, which no slot reads.
    """

    def __init__(self, sizes: InputSizes, device: torch.device) -> None:
        self.sizes = sizes
        self.flat = torch.empty(max(span.stop for span in sizes.spans().values()), dtype=torch.int32, device=device)
        views = {name: self.flat[span] for name, span in sizes.spans().items()}
        self.mode, self.row_start, self.rows, self.offset = (views[name] for name in _SLOT_FIELDS[:4])
        self.scored, self.score_slot, self.logit_start, self.logit_count = (views[name] for name in _SLOT_FIELDS[4:8])
        self.most, self.proposes, self.max_length = (views[name] for name in ("most", "proposes", "max_length"))
        self.row_slot, self.row_place, self.row_token = (views[name] for name in _ROW_FIELDS)
        self.logit_rows = views["logit_rows"]
        self.update_at, self.update_page = views["update_at"], views["update_page"]
        self.temperature, self.top_p, self.min_p = (
            views[name].view(torch.float32) for name in ("temperature", "top_p", "min_p")
        )
        self.top_k, self.seed_low, self.seed_high = (views[name] for name in ("top_k", "seed_low", "seed_high"))
        self.clear()

    def clear(self) -> None:
        """Hold no work: every slot idle, every row padding."""
        self.flat.zero_()
        for padding in (self.row_slot, self.row_token, self.logit_rows):
            padding.fill_(-1)
        self.update_at.fill_(self.sizes.slots * self.sizes.request_pages)

    def sampling(self, slot: Tensor) -> SamplingRows:
        """The settings of rows that belong to `slot`, int64 [R]."""
        seed = (self.seed_high.long() << 32) | (self.seed_low.long() & 0xFFFFFFFF)
        return SamplingRows(
            temperature=self.temperature[slot],
            top_k=self.top_k[slot].long(),
            top_p=self.top_p[slot],
            min_p=self.min_p[slot],
            seed=seed[slot],
        )


class InputPacker:
    """The same inputs on the host, and how `Work` fills them."""

    def __init__(self, sizes: InputSizes) -> None:
        self.sizes = sizes
        spans = sizes.spans()
        self.flat = np.zeros(max(span.stop for span in spans.values()), dtype=np.int32)
        self._views = {name: self.flat[span] for name, span in spans.items()}
        width = _aligned(sizes.slots)
        self._work = self.flat[: _WORK_FIELDS * width].reshape(_WORK_FIELDS, width)

    def admit(self, slot: int, max_length: int, params: DrawParams) -> None:
        """Set what stays while a request keeps `slot`."""
        values = {
            "max_length": max_length,
            "top_k": params.top_k,
            "temperature": np.float32(params.temperature).view(np.int32),
            "top_p": np.float32(params.top_p).view(np.int32),
            "min_p": np.float32(params.min_p).view(np.int32),
            "seed_low": np.uint32(params.seed & 0xFFFFFFFF).view(np.int32),
            "seed_high": np.uint32(params.seed >> 32).view(np.int32),
        }
        for name, value in values.items():
            self._views[name][slot] = value

    def pack(self, work: Iterable[Work], updates: Sequence[PageUpdate]) -> tuple[int, int]:
        """Lay the rows of `work` one request after the other; scored requests take score slots 0, 1, ... in order.

        Returns:
            Packed rows and rows with logits, both without padding.
        """
        sizes, views = self.sizes, self._views
        self._work[:] = 0
        for name in ("row_slot", "row_token", "logit_rows"):
            views[name][:] = -1
        views["row_place"][:] = 0
        columns = list(zip(*work, strict=True)) or [()] * len(Work._fields)
        given: dict[str, np.ndarray] = {
            name: np.array(column, dtype=np.int32)
            for name, column in zip(Work._fields, columns, strict=True)
            if name in _WORK_NUMBERS
        }
        slot, rows, logits, scored = (given[name] for name in ("slot", "rows", "logits", "scored"))
        row_end, logit_end = np.cumsum(rows), np.cumsum(logits)
        row, logit = (int(ends[-1]) if len(ends) else 0 for ends in (row_end, logit_end))
        row_start, logit_start = row_end - rows, logit_end - logits
        score_slot = np.where(scored > 0, np.cumsum(scored > 0) - 1, 0)
        self._work[:, slot] = (
            *(given["mode"], row_start, rows, given["offset"], scored, score_slot, logit_start, logits),
            *(given["most"], given["proposes"]),
        )
        views["row_slot"][:row] = np.repeat(slot, rows)
        views["row_place"][:row] = np.arange(row) - np.repeat(row_start, rows)
        views["logit_rows"][:logit] = np.arange(logit) + np.repeat(row_end - logit_end, logits)
        for start, end, tokens in zip(row_start, row_end, columns[Work._fields.index("tokens")], strict=True):
            if len(tokens):
                views["row_token"][start:end] = tokens
        views["update_at"][:] = sizes.slots * sizes.request_pages
        entries = [(u.group * (sizes.slots + 1) + u.slot) * sizes.request_pages + u.page for u in updates]
        views["update_at"][: len(updates)] = entries
        views["update_page"][: len(updates)] = [u.physical for u in updates]
        return row, logit
