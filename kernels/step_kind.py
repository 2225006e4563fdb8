"""What kind of step a launch is for: it decides on tiles and on what a kernel can do, never on results.

A launcher sees sizes and no values, which lie on the device. Sizes tell a step that prefills from others. That no
request has more than one row, or that none gives out scores, they do not tell, so whoever knows it promises it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum

LARGE_STEP_PAIRS = 16384
LARGE_STEP_ROWS = 16
"""Packed (row, query head) pairs, and rows for each request slot, from which on a step is taken for one that prefills:
computing bounds it, not memory. A step in which all slots verify has fewer rows for each."""


class StepKind(Enum):
    """Steps that deserve tiles of their own."""

    SINGLE_ROWS = "single-rows"
    """One row of each request, drafting or decoding plainly, and no scores: promised by the caller."""
    UNSCORED = "unscored"
    """No scores, whatever else: promised by the caller."""
    MIXED = "mixed"
    """Whatever is neither of the others."""
    PREFILL = "prefill"
    """Mostly rows of prompts, as far as sizes tell."""


_promised: ContextVar[StepKind] = ContextVar("promised", default=StepKind.MIXED)


@contextmanager
def promised(kind: StepKind) -> Iterator[None]:
    """Within, steps are of this kind; ``MIXED`` promises nothing.

    A step that breaks the promise has the same results, and takes longer: it reads keys and values several times.
    """
    token = _promised.set(kind)
    try:
        yield
    finally:
        _promised.reset(token)


def kind_of_step(rows: int, q_heads: int, requests: int) -> StepKind:
    """The kind of a step of so many packed rows and request slots, which are all that a captured step may go by."""
    if _promised.get() is StepKind.SINGLE_ROWS:
        return StepKind.SINGLE_ROWS
    if rows * q_heads >= LARGE_STEP_PAIRS and rows >= LARGE_STEP_ROWS * requests:
        return StepKind.PREFILL
    return _promised.get()
