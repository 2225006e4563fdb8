"""What the host decides about one iteration: which request does what, in which packed rows.

The plan holds nothing that depends on how many drafts were accepted. Positions, lengths and pages are looked up on the
device, so that a plan can be made and enqueued before earlier iterations have ended.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode

_MIN_ROWS = 2  # what the graph was exported for


@dataclass(frozen=True)
class Work:
    """One request's share of an iteration.

    Attributes:
        slot: the request's row in the state tensors.
        mode: draft, verify or prefill.
        rows: packed rows. 1 for a draft, drafts + 1 for a verification, the chunk's tokens for a prefill.
        offset: position of the first row, counted from the request's verified length (its drafts so far).
        logits: trailing rows whose logits are needed: all of a draft or verification, the last one of a prompt.
        scored: trailing rows whose attention probabilities choose the next pillars; 0 = none.
    """

    slot: int
    mode: Mode
    rows: int
    offset: int = 0
    logits: int = 0
    scored: int = 0


class Plan(NamedTuple):
    """A plan as tensors, int32. S slots, T packed rows, R rows with logits; absent slots are idle with 0 rows.

    Attributes:
        mode, row_start, rows, offset, scored: [S], as in `Work`; `row_start` is the first packed row.
        logit_start, logit_count: [S], which of the R rows with logits belong to a slot.
        row_slot: [T], slot of each packed row, -1 = padding.
        row_offset: [T], position of each packed row, counted from its request's verified length.
        logit_rows: [R], packed row of each row with logits, -1 = padding.
    """

    mode: Tensor
    row_start: Tensor
    rows: Tensor
    offset: Tensor
    scored: Tensor
    logit_start: Tensor
    logit_count: Tensor
    row_slot: Tensor
    row_offset: Tensor
    logit_rows: Tensor


_PER_SLOT = 7


def make_plan(work: Iterable[Work], slots: int, device: torch.device) -> Plan:
    """Pack the rows of `work` one request after the other and upload the plan in one copy."""
    table = np.zeros((_PER_SLOT, slots), dtype=np.int32)
    row_slot: list[int] = []
    row_offset: list[int] = []
    logit_rows: list[int] = []
    for item in work:
        start, end = len(row_slot), len(row_slot) + item.rows
        table[:, item.slot] = (item.mode, start, item.rows, item.offset, item.scored, len(logit_rows), item.logits)
        row_slot.extend([item.slot] * item.rows)
        row_offset.extend(range(item.offset, item.offset + item.rows))
        logit_rows.extend(range(end - item.logits, end))
    row_padding = max(0, _MIN_ROWS - len(row_slot))
    logit_padding = max(0, _MIN_ROWS - len(logit_rows))
    parts = [
        *table,
        row_slot + [-1] * row_padding,
        row_offset + [0] * row_padding,
        logit_rows + [-1] * logit_padding,
    ]
    flat = torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]))
    return Plan(*flat.to(device, non_blocking=True).split([len(part) for part in parts]))
