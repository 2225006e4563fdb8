"""One iteration on the device: rows in, one pass of the graph, tokens drawn, drafts accepted, state updated.

Nothing here waits for the device or depends on the values it computes, so a step can be captured and replayed. What
surrounds the graph is two functions of tensors, which a compiler can fuse: `place_rows` before it, `accept` behind it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsespec_compile.kernels.launch import Promise, promised
from sparsespec_compile.kernels.ops import Mode, process_logits, scored_rows_at_most
from sparsespec_compile.passes.ranks import VocabularyPart
from sparsespec_compile.runtime.device.drafters import Cycle, Drafter
from sparsespec_compile.runtime.device.inputs import StepInputs, Work, promise_of
from sparsespec_compile.runtime.device.processing import Processing, RowProcessors, process_rows
from sparsespec_compile.runtime.device.sampling import SamplingRows, draw, log_probability, whole_rows
from sparsespec_compile.runtime.device.state import State
from sparsespec_compile.runtime.device.weights import DraftGraph

_PROMISED_IN_CYCLES = {True: Promise.ONLY_VERIFICATIONS_SCORED, False: Promise.NO_SCORES}
"""What iterations promise in which requests verify drafts of a drafter that reads scores, or does not."""

NO_TOKEN = -1
"""Told in place of a token where processing has forbidden every token."""

# torch.compile takes a tensor and an enum for unequal.
_DRAFT, _VERIFY, _PREFILL = (int(mode) for mode in (Mode.DRAFT, Mode.VERIFY, Mode.PREFILL))

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
        promise: what attention need not do, so that it may take kernels that cannot. `SMALL_TILES` also says that no
            pillars are renewed.
        draft_weights: every row is a draft, so that the graph with 8-bit weights runs.
        whole_rows: where ranks share the vocabulary, that they exchange logits: some request has filters, has its
            logits processed, or wants log-probabilities.
        processed: some request's logits go through `process_logits`.
        no_repeats: some request also forbids n-grams to occur twice.
    """

    logprobs: bool = False
    promise: Promise = Promise.NOTHING
    draft_weights: bool = False
    whole_rows: bool = False
    processed: bool = False
    no_repeats: bool = False


class Results(NamedTuple):
    """The outputs of a step: static tensors of the `Step`.

    Attributes:
        tokens: int32 [S, k + 2]: the number of tokens that became final for each slot (0 for drafts and absent
            slots), then the tokens, meaningful up to that number, or NO_TOKEN. A full cycle ends with accepted + 1 of
            them.
        drafted: int32 [S]: of slots that drafted, the drafts of the cycle so far; of those that verified, the drafts
            that were judged.
        logprobs: float32 [S, k + 1], natural logarithm of the model's own probability of each of these tokens, before
            processing, temperature and filters; only written by variants with `logprobs`.
    """

    tokens: Tensor
    drafted: Tensor
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
        drafters: what prepares drafts at the end of an iteration. Where some read scores and some do not, iterations
            that promise no scores run the updates of the latter, those in which verifications are scored of the former.
        draft_tokens: drafts of a full cycle, k.
        compiler: applied to the functions around the graph, such as `torch.compile`.
        vocabulary: the tokens of which the graph gives logits; None = all.
        proposals: tokens that are proposed behind the newest draft, for the next draft iteration to judge.

    Attributes:
        vocabulary, proposals: as given.
        any_work: the variant that does whatever an iteration can ask for, but for log-probabilities.
        drafts: the graph for iterations of nothing but drafts; None = `forward` runs them too.
    """

    def __init__(
        self,
        forward: Forward,
        state: State,
        inputs: StepInputs,
        drafters: Sequence[Drafter],
        draft_tokens: int,
        compiler: Compiler = as_it_is,
        vocabulary: VocabularyPart | None = None,
        proposals: int = 0,
    ) -> None:
        self.forward = forward
        self.state = state
        self.inputs = inputs
        self.drafts: DraftGraph | None = None
        self.reads_scores = any(drafter.reads_scores for drafter in drafters)
        self.vocabulary = vocabulary
        self.proposals = proposals
        anything = Promise.NOTHING if self.reads_scores else Promise.NO_SCORES
        self.any_work = Variant(promise=anything, whole_rows=vocabulary is not None)
        self._score_rows = scored_rows_at_most(state.layout.largest_group) if self.reads_scores else 0
        slots = state.capacity.slots
        self.results = Results(
            tokens=torch.zeros(slots, draft_tokens + 2, dtype=torch.int32, device=state.device),
            drafted=torch.zeros(slots, dtype=torch.int32, device=state.device),
            logprobs=torch.zeros(slots, draft_tokens + 1, dtype=torch.float32, device=state.device),
        )
        self._place_rows = compiler(place_rows)
        self._accept = compiler(accept)
        self._propose = compiler(propose)
        self._updates = [(drafter.reads_scores, compiler(drafter.update)) for drafter in drafters if _updates(drafter)]

    def variant(
        self,
        work: Sequence[Work],
        cycle: Cycle | None = None,
        *,
        logprobs: bool = False,
        filters: bool = False,
        processing: Iterable[Processing] = (),
    ) -> Variant:
        """What an iteration of this work asks for.

        Args:
            work: of all requests.
            cycle: of which it is part; None = of any.
            logprobs: whether anybody reads those of its tokens.
            filters: whether any of its tokens are drawn from whole rows, as those with filters are.
            processing: what `process_logits` has to do.
        """
        scores = cycle is None or not cycle.drafts or cycle.drafter.reads_scores
        promise = promise_of(work, self.reads_scores and scores)
        only_drafts = bool(work) and all(item.mode == Mode.DRAFT and not item.scored for item in work)
        copies = only_drafts and self.drafts is not None and sum(item.rows for item in work) <= self.drafts.most_rows
        variant = Variant(logprobs and not only_drafts, promise, copies)
        return self.whole_rows_where_needed(with_processing(variant, processing), filters)

    def whole_rows_where_needed(self, variant: Variant, filters: bool) -> Variant:
        """A variant in which ranks that share the vocabulary exchange what its draws, with or without filters, need."""
        return replace(
            variant, whole_rows=self.vocabulary is not None and (filters or variant.logprobs or variant.processed)
        )

    @torch.no_grad()
    def __call__(
        self, rows: int, logits: int, variant: Variant, of_slot: Mapping[int, RowProcessors] | None = None
    ) -> None:
        """Run the first `rows` packed rows and `logits` rows with logits of the inputs; `results` holds the outcome.

        `of_slot`: functions that the logits of some slots go through. They wait for the device, so that such a run
        cannot be captured, and need whole rows.
        """
        with without_autocast(self.state.device):
            self._run(rows, logits, variant, of_slot or {})

    def _run(self, rows: int, logits: int, variant: Variant, of_slot: Mapping[int, RowProcessors]) -> None:
        state, inputs = self.state, self.inputs
        placed = self._place_rows(state, inputs, rows, self._score_rows)
        logit_rows = inputs.logit_rows[:logits]
        forward = self.drafts.forward if variant.draft_weights and self.drafts is not None else self.forward
        with promised(variant.promise):
            out = forward(
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
        scores = None
        if of_slot:
            if self.vocabulary is not None:
                out = whole_rows(out, self.vocabulary)
            scores = self._by_functions(placed, out, logit_rows, of_slot)
        self._accept(
            *(state, inputs, placed, out, logit_rows, self.results),
            *(self.vocabulary if scores is None else None, variant, scores),
        )
        for reads_scores, update in self._updates:
            if variant.promise is Promise.NOTHING or variant.promise is _PROMISED_IN_CYCLES[reads_scores]:
                update(state, self.results.tokens[:, 0], inputs.score_slot, placed.scored_length)
        if self.proposals:
            self._propose(state, inputs, self.results.tokens[:, 0], self.proposals)

    def _by_functions(
        self, placed: Placed, logits: Tensor, logit_rows: Tensor, of_slot: Mapping[int, RowProcessors]
    ) -> Tensor:
        row, slot = _with_logits(self.state, placed, logit_rows)
        final = self.inputs.mode[slot.clamp(max=self.state.capacity.slots - 1)] != _DRAFT
        return process_rows(logits, self.state.tokens, slot, placed.position[row] + 1, final, of_slot)


def with_processing(variant: Variant, processing: Iterable[Processing]) -> Variant:
    """A variant that does this to logits, for each request that has some."""
    asked = list(processing)
    return replace(variant, processed=bool(asked), no_repeats=any(one.ngram > 0 for one in asked))


def _updates(drafter: Drafter) -> bool:
    return type(drafter).update is not Drafter.update


def place_rows(state: State, inputs: StepInputs, rows: int, most_scored: int) -> Placed:
    """Update the page table, and look up each row's position and token.

    `most_scored`: most rows of a verification that return scores; 0 = no drafter reads scores.
    """
    state.page_table.view(-1).index_put_((inputs.update_at.long(),), inputs.update_page)
    prefill = inputs.mode == _PREFILL
    told, draft = inputs.offset >= 0, inputs.mode == _DRAFT
    ahead = torch.where(told, inputs.offset, torch.where(draft, state.drafted, 0))
    cached = torch.where(prefill, inputs.offset, state.length + ahead)
    # A slot's new owner must not meet its old owner's pillars.
    for renewed in (state.pillar_count, state.recent_start):
        renewed.masked_fill_(prefill, 0)
    # Rows that only tokens past the request's last one would need are dropped here, on the device.
    count = torch.minimum(inputs.rows, (inputs.max_length - 1 - cached).clamp(min=0))
    # Nor are there rows for more drafts than a cycle may have, and to verify drafts that were not made.
    known = torch.where(draft, (inputs.most - state.drafted).clamp(min=0), state.drafted + 1)
    count = torch.where(told, count, torch.minimum(count, known))
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
    vocabulary: VocabularyPart | None,
    variant: Variant,
    scores: Tensor | None = None,
) -> None:
    """Draw the next token of each row with logits, accept drafts while they equal it, advance lengths and drafts.

    `scores`: what functions have made of the logits, which are whole rows then; None = there are none.
    """
    slots = state.capacity.slots
    row, slot = _with_logits(state, placed, logit_rows)
    drawn_position = placed.position[row] + 1
    settings: SamplingRows = inputs.sampling(slot.clamp(max=slots - 1))
    if vocabulary is not None and variant.whole_rows:
        logits = whole_rows(logits, vocabulary)
    drawn_from = logits if scores is None else scores
    if variant.processed:
        most = results.logprobs.shape[1]
        where = (state.tokens, slot, drawn_position, state.processing)
        drawn_from = process_logits(drawn_from, *where, most, variant.no_repeats)
    drawn = draw(drawn_from, settings, drawn_position, vocabulary, variant.whole_rows)
    told = drawn
    if variant.processed:
        told = drawn.masked_fill(drawn_from.amax(dim=-1) == -math.inf, NO_TOKEN)
    as_drafted = drawn == state.tokens[slot, drawn_position]
    # Verified tokens replace the drafts. Tokens after them are overwritten by the next drafts before they are read.
    state.tokens.index_put_((slot, drawn_position), drawn)

    nth = torch.arange(results.logprobs.shape[1], device=drawn.device)
    logit = (inputs.logit_start[:, None] + nth).clamp(max=drawn.shape[0] - 1)
    is_draft = nth < placed.rows[:, None] - 1  # the last row verifies no draft, it adds the target's own token
    accepted = (as_drafted[logit] & is_draft).int().cumprod(dim=1).sum(dim=1)
    verified = torch.minimum(accepted + 1, placed.rows)
    prefilled = torch.minimum(inputs.logit_count, placed.rows)
    verify, prefill, draft = (inputs.mode == mode for mode in (_VERIFY, _PREFILL, _DRAFT))
    # A row's own token is the next draft; proposals that it would have drafted were right, and their rows count too.
    made = torch.where(placed.rows > 0, accepted + 1, 0)
    drafted = torch.where(draft, placed.cached - state.length + made, torch.where(verify | prefill, 0, state.drafted))
    results.drafted.copy_(torch.where(draft, drafted, (placed.rows - 1).clamp(min=0)))
    state.drafted.copy_(drafted)
    final = torch.where(verify, verified, torch.where(prefill, prefilled, 0))
    length = torch.where(prefill, placed.cached + placed.rows, state.length + torch.where(verify, verified, 0))
    state.length.copy_(length)
    results.tokens.copy_(torch.cat([final[:, None], told[logit]], dim=1))
    if variant.logprobs:
        results.logprobs.copy_(log_probability(logits, drawn)[logit])


def propose(state: State, inputs: StepInputs, final: Tensor, most: int) -> None:
    """Propose `most` tokens behind the newest token or draft of slots that judge proposals next. final: int32 [S]."""
    wanted = torch.where(((final > 0) | (inputs.mode == _DRAFT)) & (inputs.proposes > 0), most, 0).int()
    torch.ops.sparsespec.propose_ngrams(state.tokens, state.length + state.drafted, wanted, most)


def _with_logits(state: State, placed: Placed, logit_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Packed row, and slot, of each row with logits, int64 [R]; the slot of padding is the one behind the last."""
    row = logit_rows.clamp(min=0).long()
    return row, torch.where(logit_rows >= 0, placed.slot[row], state.capacity.slots)
