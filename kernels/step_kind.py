"""What kind of step a launch is for, and what its caller promises: it decides on tiles and on what a kernel can do.

A launcher sees sizes and no values, which lie on the device. Sizes tell a step that prefills from others. That no
request has more than one row, or who gives out scores, they do not tell, so whoever knows it promises it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, IntEnum
from typing import Any

LARGE_STEP_PAIRS = 16384
LARGE_STEP_ROWS = 16
"""Packed (row, query head) pairs, and rows for each request slot, from which on a step is taken for one that prefills:
computing bounds it, not memory. A step in which all slots verify has fewer rows for each."""


class StepKind(Enum):
    """Steps that deserve tiles of their own."""

    SINGLE_ROWS = "single-rows"
    """One row of each request, drafting or decoding plainly, and no scores."""
    UNSCORED = "unscored"
    """Without scores, and neither of the others."""
    MIXED = "mixed"
    """Whatever is none of the others."""
    PREFILL = "prefill"
    """Mostly rows of prompts, as far as sizes tell."""


class Promise(IntEnum):
    """What a step does not need, each including the ones before it; kernels that need not do it are faster.

    If a step breaks its promise, its rows are still right but take longer, and scores that it promised not to ask for
    are not written.
    """

    NOTHING = 0
    ONLY_VERIFICATIONS_SCORED = 1
    """Prompts give out no scores, and verifications of ``ops.scored_rows_at_most`` rows at most."""
    NO_SCORES = 2
    """Nobody gives out scores."""
    SINGLE_ROWS = 3
    """Nor has any request more than one row."""


_promised: ContextVar[Promise] = ContextVar("promised", default=Promise.NOTHING)


_memo: ContextVar[dict[Any, Any] | None] = ContextVar("memo", default=None)


@contextmanager
def promised(promise: Promise) -> Iterator[None]:
    """Within, steps keep this promise, and nobody changes a step's tensors behind torch's back."""
    token, memo = _promised.set(promise), _memo.set({})
    try:
        yield
    finally:
        _promised.reset(token)
        _memo.reset(memo)


def step_memo() -> dict[Any, Any] | None:
    """Where the layers of a step keep what they share, gone at the end of ``promised``; None outside of it."""
    return _memo.get()


def present_promise() -> Promise:
    """What is promised at the moment."""
    return _promised.get()


def kind_of_step(rows: int, q_heads: int, requests: int) -> StepKind:
    """The kind of a step of so many packed rows and request slots: all that a captured step may go by but promises."""
    if present_promise() is Promise.SINGLE_ROWS:
        return StepKind.SINGLE_ROWS
    if rows * q_heads >= LARGE_STEP_PAIRS and rows >= LARGE_STEP_ROWS * requests:
        return StepKind.PREFILL
    return StepKind.UNSCORED if present_promise() is Promise.NO_SCORES else StepKind.MIXED
