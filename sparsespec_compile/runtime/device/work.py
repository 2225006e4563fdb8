"""What the host decides about one request in one iteration."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.kernels.step_kind import Promise


class Work(NamedTuple):
    """One request's share of an iteration. Nothing in it depends on how many drafts were accepted.

    Attributes:
        slot: the request's row in the state tensors.
        mode: draft, verify or prefill.
        rows: packed rows. 1 for a draft, drafts + 1 for a verification, the chunk's tokens for a prefill.
        offset: drafts: position of the row, counted from the request's verified length (its drafts so far).
            Verifications: 0. Prefills: position of the first row; all positions before it hold the text already.
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
    rows, scored, prompts_scored = 0, False, False
    for item in work:
        rows = max(rows, item.rows)
        scored = scored or item.scored > 0
        prompts_scored = prompts_scored or (item.scored > 0 and item.mode == Mode.PREFILL)
    if rows <= 1 and not scored:
        return Promise.SINGLE_ROWS
    if not reads_scores:
        return Promise.NO_SCORES
    return Promise.NOTHING if prompts_scored else Promise.ONLY_VERIFICATIONS_SCORED
