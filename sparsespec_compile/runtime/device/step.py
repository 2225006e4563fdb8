"""One iteration on the device: rows in, one pass of the graph, tokens drawn, drafts accepted, state updated.

Nothing here waits for the device or depends on the values it computes, so a step can be captured and replayed. What
surrounds the graph is two functions of tensors, which a compiler can fuse: `place_rows` before it, `accept` behind it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode, draw_tokens, scored_rows_at_most
from sparsespec_compile.kernels.step_kind import Promise, promised
from sparsespec_compile.runtime.device.drafters import Drafter
from sparsespec_compile.runtime.device.inputs import StepInputs
from sparsespec_compile.runtime.device.sampling import SamplingRows, log_probability
from sparsespec_compile.runtime.device.state import State

_VERIFY, _PREFILL = int(Mode.VERIFY), int(Mode.PREFILL)  # torch.compile takes a tensor and an enum for unequal

Forward = Callable[..., Tensor]
"""The rewritten graph: (input_ids [1, T], position_ids [1, T], logits_to_keep [R], pool, scores, pillar_index,
*STEP_TENSORS) -> logits [1, R, V]. The page table among them is [G, S, P], for each group of layers."""

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What is applied to the functions around the graph, such as `torch.compile`."""


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler that leaves a function to be run operation by operation."""
    return function


@dataclass(frozen=True)
class Variant:
    """What an iteration's requests need; each variant is a computation of its own.

    Attributes:
        logprobs: some request wants the log-probabilities of its tokens.
        promise: what attention need not do, so that it may take kernels that cannot. `SINGLE_ROWS` also says that no
            pillars are renewed.
    """

    logprobs: bool = False
    promise: Promise = Promise.NOTHING


class Results(NamedTuple):
    """What a step gives out. Static tensors of the `Step`.

    Attributes:
        tokens: int32 [S, k + 2]: the number of tokens that became final for each slot (0 for drafts and absent
            slots), then the tokens, meaningful up to that number. A full cycle ends with accepted + 1 of them.
        logprobs: float32 [S, k + 1], natural logarithm of the model's own probability of each of these tokens, before
            temperature and filters; only written by variants with `logprobs`.
    """

    tokens: Tensor
    logprobs: Tensor


class Placed(NamedTuple):
    """Rows as the graph takes them: slot, position, token int64 [T], the others int32 [S].

    `scored_length` are the positions before the rows that a request's work calls scored, -1 for requests that keep
    their pillars; `score_rows` those of these rows whose attention is given out: all of a prompt, of a verification the
    last `scored_rows_at_most`.
    """

    slot: Tensor
    position: Tensor
    token: Tensor
    rows: Tensor
    cached: Tensor
    score_rows: Tensor
    scored_length: Tensor


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Computes in the dtypes of the tensors, whatever autocast the caller has switched on."""
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Step:
    """The computation of an iteration over one `State`.

    Args:
        forward: the rewritten graph.
        state: what it reads and updates.
        inputs: the iteration's work, in place.
        drafters: what prepares drafts at the end of an iteration.
        draft_tokens: drafts of a full cycle, k.
        compiler: applied to the functions around the graph, such as `torch.compile`.

    Attributes:
        any_work: the variant that does whatever an iteration can ask for, but for log-probabilities.
    """

    def __init__(
        self,
        forward: Forward,
        state: State,
        inputs: StepInputs,
        drafters: Sequence[Drafter],
        draft_tokens: int,
        compiler: Compiler = as_it_is,
    ) -> None:
        self.forward = forward
        self.state = state
        self.inputs = inputs
        self.reads_scores = any(drafter.reads_scores for drafter in drafters)
        self.any_work = Variant(promise=Promise.NOTHING if self.reads_scores else Promise.NO_SCORES)
        self._score_rows = scored_rows_at_most(state.layout.largest_group) if self.reads_scores else 0
        slots = state.capacity.slots
        self.results = Results(
            tokens=torch.zeros(slots, draft_tokens + 2, dtype=torch.int32, device=state.device),
            logprobs=torch.zeros(slots, draft_tokens + 1, dtype=torch.float32, device=state.device),
        )
        self._place_rows = compiler(place_rows)
        self._accept = compiler(accept)
        self._updates = [compiler(drafter.update) for drafter in drafters if _updates(drafter)]

    @torch.no_grad()
    def __call__(self, rows: int, logits: int, variant: Variant) -> None:
        """Run the first `rows` packed rows and `logits` rows with logits of the inputs; `results` holds the outcome."""
        with without_autocast(self.state.device):
            self._run(rows, logits, variant)

    def _run(self, rows: int, logits: int, variant: Variant) -> None:
        state, inputs = self.state, self.inputs
        placed = self._place_rows(state, inputs, rows, self._score_rows)
        logit_rows = inputs.logit_rows[:logits]
        with promised(variant.promise):
            out = self.forward(
                placed.token[None],
                placed.position[None],
                logit_rows.clamp(min=0).long(),
                state.pool,
                state.scores,
                state.pillar_index,
                inputs.mode,
                inputs.row_start,
                placed.rows,
                placed.cached,
                state.page_table[:, :-1],
                placed.score_rows,
                inputs.score_slot,
                state.pillar_count,
                state.recent_start,
            )[0]
        self._accept(state, inputs, placed, out, logit_rows, self.results, variant.logprobs)
        if variant.promise is not Promise.SINGLE_ROWS:
            for update in self._updates:
                update(state, self.results.tokens[:, 0], inputs.score_slot, placed.scored_length)


def _updates(drafter: Drafter) -> bool:
    return type(drafter).update is not Drafter.update


def place_rows(state: State, inputs: StepInputs, rows: int, most_scored: int) -> Placed:
    """Renew the page table, and look up where each row stands and which token it carries.

    `most_scored`: rows of a verification that give out scores, at most; 0 = nobody reads scores.
    """
    state.page_table.view(-1).index_put_((inputs.update_at.long(),), inputs.update_page)
    prefill = inputs.mode == _PREFILL
    cached = torch.where(prefill, inputs.offset, state.length + inputs.offset)
    # A slot's new owner must not meet its old owner's pillars.
    for renewed in (state.pillar_count, state.recent_start):
        renewed.masked_fill_(prefill, 0)
    # Rows that only tokens past the request's last one would need are dropped here, on the device.
    count = torch.minimum(inputs.rows, (inputs.max_length - 1 - cached).clamp(min=0))
    slot, place = inputs.row_slot[:rows].long(), inputs.row_place[:rows].long()
    owner = slot.clamp(min=0)
    real = (slot >= 0) & (place < count[owner])
    slot = torch.where(real, slot, state.capacity.slots)
    position = torch.where(real, cached[owner] + place, 0)
    # Tokens of prompts come with the inputs, and are kept beside those that were drawn.
    given = inputs.row_token[:rows].long()
    state.tokens.index_put_((torch.where(given >= 0, slot, state.capacity.slots), position), given.clamp(min=0))
    token = state.tokens[slot, position]
    scored = torch.minimum(inputs.scored, count)
    scored_length = torch.where(scored > 0, cached + count - scored, -1)
    # A prompt's scores take passes of their own anyway.
    given_out = torch.where(prefill, scored, scored.clamp(max=most_scored))
    score_rows = given_out if most_scored else torch.zeros_like(scored)
    return Placed(slot, position, token, count, cached, score_rows, scored_length)


def accept(
    state: State,
    inputs: StepInputs,
    placed: Placed,
    logits: Tensor,
    logit_rows: Tensor,
    results: Results,
    logprobs: bool,
) -> None:
    """Draw a token behind each row with logits, accept drafts while they equal it, advance the lengths."""
    slots = state.capacity.slots
    row = logit_rows.clamp(min=0).long()
    slot = torch.where(logit_rows >= 0, placed.slot[row], slots)
    drawn_position = placed.position[row] + 1
    settings: SamplingRows = inputs.sampling(slot.clamp(max=slots - 1))
    drawn = draw_tokens(logits, *settings, drawn_position)
    as_drafted = drawn == state.tokens[slot, drawn_position]
    # Verified tokens replace the drafts; what stands behind them is rewritten by the next drafts before it is read.
    state.tokens.index_put_((slot, drawn_position), drawn)

    nth = torch.arange(results.logprobs.shape[1], device=drawn.device)
    logit = (inputs.logit_start[:, None] + nth).clamp(max=drawn.shape[0] - 1)
    is_draft = nth < placed.rows[:, None] - 1  # the last row verifies no draft, it adds the target's own token
    accepted = (as_drafted[logit] & is_draft).int().cumprod(dim=1).sum(dim=1)
    verified = torch.minimum(accepted + 1, placed.rows)
    prefilled = torch.minimum(inputs.logit_count, placed.rows)
    verify, prefill = inputs.mode == _VERIFY, inputs.mode == _PREFILL
    final = torch.where(verify, verified, torch.where(prefill, prefilled, 0))
    length = torch.where(prefill, placed.cached + placed.rows, state.length + torch.where(verify, verified, 0))
    state.length.copy_(length)
    results.tokens.copy_(torch.cat([final[:, None], drawn[logit]], dim=1))
    if logprobs:
        results.logprobs.copy_(log_probability(logits, drawn)[logit])
