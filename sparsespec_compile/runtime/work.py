"""What the host decides about one request in one iteration."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sparsespec_compile.kernels.ops import Mode


class Work(NamedTuple):
    """One request's share of an iteration. Nothing in it depends on how many drafts were accepted.

    Attributes:
        slot: the request's row in the state tensors.
        mode: draft, verify or prefill.
        rows: packed rows. 1 for a draft, drafts + 1 for a verification, the chunk's tokens for a prefill.
        offset: drafts and verifications: position of the first row, counted from the request's verified length (its
            drafts so far; 0 for a verification). Prefills: position of the first row.
        tokens: prefills: the chunk's token ids, `rows` of them. Others take theirs from the device.
        logits: trailing rows whose logits are needed: all of a draft or verification, the last one of a prompt.
        scored: trailing rows before which the next pillars stand; 0 = they are kept. Chosen by the attention of these
            rows, of a verification by that of the last `kernels.ops.scored_rows_at_most` if there are more.
        whole_cycle: whether it verifies as many drafts as cycles have at the time; counted, not needed by the device.
    """

    slot: int
    mode: Mode
    rows: int
    offset: int = 0
    tokens: Sequence[int] = ()
    logits: int = 0
    scored: int = 0
    whole_cycle: bool = False


class PageUpdate(NamedTuple):
    """An entry of a slot's page table: `physical` is where its logical page `page` lies from now on."""

    slot: int
    page: int
    physical: int


def are_single_rows(work: Iterable[Work]) -> bool:
    """Whether nobody has more than one row, nor rows before which new pillars stand: drafts and plain decoding."""
    return all(item.rows == 1 and item.scored == 0 for item in work)
