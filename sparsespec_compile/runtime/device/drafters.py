"""Where drafts come from: each drafter is one class, and a cycle is one of them with a number of drafts.

Every drafter writes its drafts into `State.tokens`, each at its position behind the request's newest token; a
verification reads them there, so the text never depends on the drafter. Drafters that run the model draft one token in
each draft iteration, and differ in which cached positions these read: the step leaves their drafts in `State.tokens`.
Others propose all drafts of a cycle at once, at the end of the iteration before (`Drafter.update`); prompts stand in
`State.tokens` too, so that they can be searched. Both together: in cycles with proposals an iteration of nothing but
drafts has rows for proposals as well, and keeps those that it would have drafted itself, so that the number of drafts
is known to the device alone (`State.drafted`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.config import AUTO_PROPOSALS, SpecConfig
from sparsespec_compile.runtime.device.state import State

PROPOSALS_RIGHT = (0.45, 0.6)
"""Expected share of first proposals that are right, and of further ones if those before them are. It decides how many
draft iterations go with a number of drafts."""

SINK_TOKENS = 4
"""First positions that the window drafter always reads (StreamingLLM's attention sinks)."""


@dataclass(frozen=True)
class Drafter:
    """A source of drafts. This class drafts with the model and reads every position: there is no index to keep.

    Args:
        config: the settings.

    Attributes:
        name: as in `SpecConfig.drafter`.
        keeps_index: whether its draft iterations read an index that verifications renew: a request whose latest
            verification did not renew it drafts nothing before one that does.
        reads_scores: whether `update` reads `State.scores`, so that verifications must give them out.
        runs_model: whether drafts are passes of the model.
        first_guess: probability that a draft is right, before any was verified.
    """

    config: SpecConfig

    name: ClassVar[str] = "full"
    keeps_index: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False
    runs_model: ClassVar[bool] = True
    first_guess: ClassVar[float] = 0.95  # high, so that speculation is tried where it may pay

    def __hash__(self) -> int:
        return hash(self.name)  # cycles are looked up all the time, and a hash of all settings takes long

    def positions(self, length: float) -> float:
        """Of `length` cached positions those that a draft iteration reads, for predictions of its time."""
        return length

    def update(self, state: State, final: Tensor, score_slot: Tensor, scored_length: Tensor) -> None:
        """Prepare the next drafts on the device. Called in the step, after drafts were accepted and lengths advanced.

        Iterations leave the call out in which every request has a single row and none is scored, and those in cycles of
        another drafter, of which one reads scores and one does not (`Step`).

        Args:
            state: `tokens` up to and including position `length` are final. The next drafts follow them.
            final: int32 [S], tokens of a slot that became final in this iteration.
            score_slot: int32 [S], row of `state.scores` that belongs to a slot.
            scored_length: int32 [S], positions before the scored rows of a slot; -1 = it was not scored.
        """


class PillarDrafter(Drafter):
    """Reads the positions with the highest attention in the last verification (paper, PillarAttn)."""

    name = "pillar"
    keeps_index = True
    reads_scores = True

    def positions(self, length: float) -> float:
        """The budget."""
        return min(length, self.config.budget(round(length)))

    def update(self, state: State, final: Tensor, score_slot: Tensor, scored_length: Tensor) -> None:
        """Index the positions with the highest scores, and let "recent" begin earlier for the local share."""
        budget = budgets(scored_length, self.config)
        local = torch.minimum((budget.double() * self.config.local_ratio).int(), scored_length.clamp(min=0))
        selected_from = torch.where(scored_length >= 0, scored_length - local, -1).int()
        torch.ops.sparsespec.select_pillars(
            state.scores, score_slot, selected_from, budget - local, state.pillar_index, state.pillar_count
        )
        _renew(state.recent_start, selected_from, scored_length)


class WindowDrafter(Drafter):
    """Reads the first positions and the latest ones, as many as `PillarDrafter` (StreamingLLM, MagicDec)."""

    name = "window"
    keeps_index = True

    def positions(self, length: float) -> float:
        """The budget."""
        return min(length, self.config.budget(round(length)))

    def update(self, state: State, final: Tensor, score_slot: Tensor, scored_length: Tensor) -> None:
        """Index the first and the latest positions."""
        count = torch.minimum(budgets(scored_length, self.config), scored_length)
        entry = torch.arange(state.pillar_index.shape[-1], dtype=torch.int32, device=count.device)
        skipped = scored_length - count  # positions between the sinks and the window
        index = torch.where(entry < SINK_TOKENS, entry, entry + skipped[:, None])
        index = torch.where(entry < count[:, None], index, -1)
        _renew(state.pillar_index, index[:, None, :].int(), scored_length)
        _renew(state.pillar_count, count, scored_length)
        _renew(state.recent_start, scored_length, scored_length)


class NgramDrafter(Drafter):
    """Proposes what followed the place before, in the text or in another slot's, that is most like the text's end.

    Prompts are searched too, and texts that have ended until their slot has a new one. It runs no pass of the model:
    every iteration verifies, and yields one token at least. (Prompt lookup decoding, Saxena 2023, and SuffixDecoding,
    arXiv 2411.04975, which also searches other requests' outputs; here on the device, so that the host need not know
    the text, and without an index. Both look for equal suffixes. Here single tokens of a place may differ as well, so
    that drafts go on along a line of which the number is another.)
    """

    name = "ngram"
    runs_model = False
    first_guess = 0.3

    def positions(self, length: float) -> float:
        """None: there are no draft iterations."""
        return 0.0

    def update(self, state: State, final: Tensor, score_slot: Tensor, scored_length: Tensor) -> None:
        """Look up the texts that have grown."""
        most = self.config.most_draft_tokens
        wanted = torch.where(final > 0, most, 0).int()
        torch.ops.sparsespec.propose_ngrams(state.tokens, state.length, wanted, most)


class NoDrafter(Drafter):
    """Plain decoding: every iteration is a verification of one row."""

    name = "none"


_DRAFTERS: dict[str, type[Drafter]] = {
    kind.name: kind for kind in (Drafter, PillarDrafter, WindowDrafter, NgramDrafter)
}


@dataclass(frozen=True)
class Cycle:
    """What requests do from one verification to the next.

    Attributes:
        drafter: where the drafts come from.
        drafts: their number, k; with proposals their most. 0 = plain decoding.
        passes: draft iterations; one more verifies.
        proposals: tokens of a request that an iteration of nothing but drafts judges behind the newest draft.
    """

    drafter: Drafter
    drafts: int
    passes: int
    proposals: int = 0

    @property
    def proposed(self) -> int:
        """Drafts that are in `State.tokens` when the cycle begins."""
        return 0 if self.passes else self.drafts

    @property
    def pass_rows(self) -> int:
        """Rows of a request in an iteration of nothing but drafts."""
        return min(1 + self.proposals, max(self.drafts, 1))

    @property
    def name(self) -> str:
        """Where its drafts come from, for statistics."""
        return f"{self.drafter.name}+{NgramDrafter.name}" if self.proposals else self.drafter.name


_AUTO = (NgramDrafter.name, PillarDrafter.name)
"""What "auto" chooses among."""

_NGRAM_DRAFTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of n-gram drafts to choose from. What one more costs and brings changes slowly."""


def cycles_of(config: SpecConfig) -> list[Cycle]:
    """The cycles that `config` allows: one, or for `draft_tokens="auto"` plain decoding and numbers of drafts.

    The one with the most draft iterations comes last.
    """
    plain = Cycle(NoDrafter(config), 0, 0)
    named = config.drafter
    if config.draft_tokens == "auto":
        kinds = [_DRAFTERS[name](config) for name in (_AUTO if named == "auto" else (named,))]
        return [plain, *(cycle for kind in kinds for cycle in _cycles(kind, config))]
    if config.draft_tokens == 0:
        return [plain]
    drafter, drafts = _DRAFTERS[PillarDrafter.name if named == "auto" else named](config), config.draft_tokens
    if not drafter.runs_model:
        return [Cycle(drafter, drafts, 0)]
    passes = math.ceil(drafts / _drafts_of_a_pass(config.most_proposals))
    return [Cycle(drafter, drafts, passes, config.most_proposals)]


_FEW_RIGHT = 0.15
"""Share of first proposals that are right in texts that do not repeat themselves. Where few drafts pay, a cycle without
room for one more than is made has fewer rows to verify."""


def _cycles(drafter: Drafter, config: SpecConfig) -> list[Cycle]:
    """Cycles of a drafter to choose from."""
    most = config.max_draft_tokens
    if not drafter.runs_model:
        return [Cycle(drafter, drafts, 0) for drafts in (*(some for some in _NGRAM_DRAFTS if some < most), most)]
    with_proposals = {
        Cycle(drafter, min(most, math.ceil(passes * drafts_of_a_pass)), passes, proposals): None
        for proposals in AUTO_PROPOSALS
        if proposals <= config.most_proposals
        for drafts_of_a_pass in (_drafts_of_a_pass(proposals), *([1 + _FEW_RIGHT] if proposals == 1 else []))
        for passes in range(1, most)
    }
    return [*with_proposals, *(Cycle(drafter, drafts, drafts) for drafts in range(1, most + 1))]


def _drafts_of_a_pass(proposals: int) -> float:
    """Drafts that a pass with proposals is expected to make."""
    first, further = PROPOSALS_RIGHT
    return 1 + sum(first * further**nth for nth in range(proposals))


def drafters_of(config: SpecConfig) -> tuple[Drafter, ...]:
    """The drafters whose state a step has to keep up."""
    return tuple({cycle.drafter: None for cycle in cycles_of(config) if cycle.drafts})


def budgets(length: Tensor, config: SpecConfig) -> Tensor:
    """`SpecConfig.budget` on the device: int32 [S] for int32 [S]."""
    share = torch.ceil(length.double() * config.budget_ratio)  # double, as Python computes it
    return share.clamp(min=config.min_budget).int()


def _renew(target: Tensor, value: Tensor, scored_length: Tensor) -> None:
    """Write `value` into the rows of `target` whose request was scored."""
    scored = (scored_length >= 0).view(-1, *[1] * (target.dim() - 1))
    target.copy_(torch.where(scored, value, target))
