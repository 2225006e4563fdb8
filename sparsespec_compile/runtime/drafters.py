"""What drafts read: policies that differ only in what they write into the pillar index.

A draft reads the indexed positions and everything from `recent_start` on. Each policy is called once an iteration,
inside the step, after the model has run, with the number of positions each request had scored.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.runtime.state import State

SINK_TOKENS = 4
"""First positions that the window drafter always reads (StreamingLLM's attention sinks)."""


class Policy(NamedTuple):
    """How pillars are renewed.

    Attributes:
        renew: (state, score_slot int32 [S], scored_length int32 [S]): renew the pillars of requests with
            scored_length >= 0, whose scores are `state.scores[score_slot]`; leave others (-1) alone.
        reads_scores: whether it reads scores, so that the model must give them out.
    """

    renew: Callable[[State, Tensor, Tensor], None]
    reads_scores: bool


def budgets(length: Tensor, config: SpecConfig) -> Tensor:
    """`SpecConfig.budget` on the device: int32 [S] for int32 [S]."""
    share = torch.ceil(length.double() * config.budget_ratio)  # double, as Python computes it
    return share.clamp(min=config.min_budget).int()


def choose_policy(config: SpecConfig) -> Policy | None:
    """The policy of `config.drafter`; None when the initial state (no pillars, everything recent) stays as it is."""
    if config.most_draft_tokens == 0 or config.drafter == "full":
        return None

    def pillar(state: State, score_slot: Tensor, scored_length: Tensor) -> None:
        """Positions with the highest attention in the last verification (paper, PillarAttn), and the ones before it."""
        budget = budgets(scored_length, config)
        local = torch.minimum((budget.double() * config.local_ratio).int(), scored_length.clamp(min=0))
        selected_from = torch.where(scored_length >= 0, scored_length - local, -1).int()
        torch.ops.sparsespec.select_pillars(
            state.scores, score_slot, selected_from, budget - local, state.pillar_index, state.pillar_count
        )
        _renew(state.recent_start, selected_from, scored_length)

    def window(state: State, score_slot: Tensor, scored_length: Tensor) -> None:
        """The first positions and the latest ones, as many as `pillar` would choose (StreamingLLM, MagicDec)."""
        count = torch.minimum(budgets(scored_length, config), scored_length)
        entry = torch.arange(state.pillar_index.shape[-1], dtype=torch.int32, device=count.device)
        skipped = scored_length - count  # positions between the sinks and the window
        index = torch.where(entry < SINK_TOKENS, entry, entry + skipped[:, None])
        index = torch.where(entry < count[:, None], index, -1)
        _renew(state.pillar_index, index[:, None, :].int(), scored_length)
        _renew(state.pillar_count, count, scored_length)
        _renew(state.recent_start, scored_length, scored_length)

    return Policy(pillar, True) if config.drafter == "pillar" else Policy(window, False)


def _renew(target: Tensor, value: Tensor, scored_length: Tensor) -> None:
    """Write `value` into the rows of `target` whose request was scored."""
    scored = (scored_length >= 0).view(-1, *[1] * (target.dim() - 1))
    target.copy_(torch.where(scored, value, target))
