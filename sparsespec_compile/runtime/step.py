"""One iteration on the device: rows in, one pass of the graph, tokens drawn, drafts accepted, state updated.

Nothing here waits for the device or depends on the values it computes, so that a step can be captured and replayed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.drafters import Policy
from sparsespec_compile.runtime.plan import Plan
from sparsespec_compile.runtime.sampling import SamplingRows, sample
from sparsespec_compile.runtime.state import State

Forward = Callable[..., Tensor]
"""The rewritten graph: (input_ids [1, T], position_ids [1, T], logits_to_keep [R], pool, scores, pillar_index,
*STEP_TENSORS) -> logits [1, R, V]."""

Sampler = Callable[..., Tensor]
"""`sampling.sample` or a compiled form of it."""


class Step:
    """The computation of an iteration over one `State`.

    Args:
        forward: the rewritten graph.
        state: what it reads and updates.
        policy: renews the pillars after a verification; None = drafts read everything.
        draft_tokens: drafts of a full cycle, k.
        sampler: draws the tokens.
    """

    def __init__(
        self, forward: Forward, state: State, policy: Policy | None, draft_tokens: int, sampler: Sampler = sample
    ) -> None:
        self.forward = forward
        self.state = state
        self.policy = policy
        self.draft_tokens = draft_tokens
        self.sampler = sampler

    @torch.no_grad()
    def __call__(self, plan: Plan, *, noise: bool, sort: bool) -> Tensor:
        """Run one iteration.

        Args:
            plan: what each request does.
            noise: some request of the plan samples.
            sort: some request of the plan uses top_k or top_p.

        Returns:
            int64 [S, k + 2]: the number of tokens that became final for each slot (0 for drafts and absent slots),
            then the tokens, meaningful up to that number. A full cycle ends with accepted + 1 of them.
        """
        state = self.state
        cached = state.length + plan.offset
        # Rows that only tokens past the request's last one would need are dropped here, on the device.
        rows = torch.minimum(plan.rows, (state.max_length - 1 - cached).clamp(min=0))
        scored = torch.minimum(plan.scored, rows)
        slot, position = self._place_rows(plan)
        logits = self.forward(
            state.tokens[slot, position][None],
            position[None],
            plan.logit_rows.clamp(min=0).long(),
            state.pool,
            state.scores,
            state.pillar_index,
            plan.mode,
            plan.row_start,
            rows,
            cached,
            state.page_table,
            scored,
            torch.arange(len(scored), dtype=torch.int32, device=scored.device),
            state.pillar_count,
            state.recent_start,
        )[0]
        if self.policy is not None:
            self.policy(state, torch.where(scored > 0, cached + rows - scored, -1))
        return self._accept(plan, logits, rows, slot, position, noise=noise, sort=sort)

    def _place_rows(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Slot and position of each packed row, int64 [T]; slot S and position 0 for rows that belong to no request."""
        state = self.state
        slot = plan.row_slot.long().clamp(min=0)
        position = state.length[slot].long() + plan.row_offset
        real = (plan.row_slot >= 0) & (position < state.max_length[slot] - 1)
        return torch.where(real, slot, state.capacity.slots), torch.where(real, position, 0)

    def _accept(
        self, plan: Plan, logits: Tensor, rows: Tensor, slot: Tensor, position: Tensor, *, noise: bool, sort: bool
    ) -> Tensor:
        """Draw a token behind each row with logits, accept drafts while they equal it, advance the lengths."""
        state = self.state
        row = plan.logit_rows.clamp(min=0)
        slot = torch.where(plan.logit_rows >= 0, slot[row], state.capacity.slots)
        drawn_position = position[row] + 1
        settings = SamplingRows(*(value[slot.clamp(max=state.capacity.slots - 1)] for value in state.sampling))
        drawn = self.sampler(logits, settings, drawn_position, noise=noise, sort=sort)
        as_drafted = drawn == state.tokens[slot, drawn_position]
        # Verified tokens replace the drafts; what stands behind them is rewritten by the next drafts before it is read.
        state.tokens[slot, drawn_position] = drawn

        nth = torch.arange(self.draft_tokens + 1, device=drawn.device)
        logit = (plan.logit_start[:, None] + nth).clamp(max=drawn.shape[0] - 1)
        is_draft = nth < rows[:, None] - 1  # the last row verifies no draft, it adds the target's own token
        accepted = (as_drafted[logit] & is_draft).int().cumprod(dim=1).sum(dim=1)
        verified = torch.minimum(accepted + 1, rows)
        prefilled = torch.minimum(plan.logit_count, rows)
        final = torch.where(plan.mode == Mode.VERIFY, verified, torch.where(plan.mode == Mode.PREFILL, prefilled, 0))
        advance = torch.where(plan.mode == Mode.PREFILL, rows, torch.where(plan.mode == Mode.VERIFY, verified, 0))
        state.length += advance.int()
        return torch.cat([final[:, None].long(), drawn[logit]], dim=1)
