"""Penalties, biases and suppressed tokens, in torch operations of fixed shapes, which a CUDA graph can hold.

No sum of floats has an order that could vary: finite rules of a slot are of different tokens, counts are integers, and
what becomes -inf does so by a minimum. Occurrences are counted once for each slot up to the first of its rows; what a
row stands behind besides are a few drafts. Rows go in pieces, so that what is as large as logits stays small.
"""

import math

import torch
from torch import Tensor

from ..checks import check_processing
from ..ops import MOST_NGRAM, PROCESSING, PROCESSING_HEAD, RULE_PREFIX, RULE_WIDTH, RULES

_ROWS = 64
"""Rows of a piece."""

_REPETITION, _PRESENCE, _FREQUENCY, _NGRAM, _PROMPT = range(len(PROCESSING))


def process_logits(
    logits: Tensor, tokens: Tensor, slot: Tensor, position: Tensor, settings: Tensor, drafts: int, ngrams: bool
) -> Tensor:
    """Logits after what each row's slot asks for; see ``kernels.ops``."""
    check_processing(logits, tokens, slot, position, settings)
    scores = logits.to(torch.float32, copy=True)
    slots, longest = settings.shape[0], tokens.shape[1]
    first = position.new_full((tokens.shape[0],), longest).scatter_reduce_(0, slot, position, "amin")
    place = torch.arange(longest, device=tokens.device)
    before = place < first[:slots, None]
    written = before & (place >= settings[:, _PROMPT, None])
    counts = [_counts(tokens[:slots], which, logits.shape[1]) for which in (before, written)]
    for start in range(0, logits.shape[0], _ROWS):
        piece = slice(start, start + _ROWS)
        row = _Rows(tokens, slot[piece], position[piece], settings)
        scores[piece] = row.process(scores[piece], counts, first, drafts, ngrams)
    return scores


def process_logits_on_cpu(
    logits: Tensor, tokens: Tensor, slot: Tensor, position: Tensor, settings: Tensor, drafts: int, ngrams: bool
) -> Tensor:
    """``process_logits`` of the slots that have rows, and of their texts as far as they go: values may be looked at."""
    check_processing(logits, tokens, slot, position, settings)
    if not logits.shape[0]:
        return logits.float()
    present, own = slot.unique(return_inverse=True)
    kept = settings[present.clamp(max=settings.shape[0] - 1)]
    texts = tokens[present, : int(position.max())]
    ngrams = ngrams and bool((kept[:, _NGRAM] > 0).any())
    return process_logits(logits, texts, own, position, kept, drafts, ngrams)


def _counts(tokens: Tensor, which: Tensor, vocabulary: int) -> Tensor:
    """int32 [B, V]: how often each token occurs in a slot's text, at the positions bool [B, N] that count."""
    counts = torch.zeros(tokens.shape[0], vocabulary, dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, tokens, which.int())


class _Rows:
    """Some rows of logits, and what they stand behind."""

    def __init__(self, tokens: Tensor, slot: Tensor, position: Tensor, settings: Tensor) -> None:
        self.tokens = tokens
        self.slot = slot
        self.position = position[:, None]
        self.own = slot.clamp(max=settings.shape[0] - 1)  # padding takes any slot's settings: nobody reads its tokens
        numbers = settings[self.own]
        self.ngram, self.prompt = (numbers[:, column, None] for column in (_NGRAM, _PROMPT))
        rules = numbers[:, PROCESSING_HEAD:].view(-1, RULES, RULE_WIDTH)
        self.rule_token, self.rule_first, self.rule_until = rules[..., 0].long(), rules[..., 2], rules[..., 3]
        self.rule_prefix = rules[..., 4:]
        # A view of other bits needs the columns in a tensor of their own.
        reals = numbers[:, :_NGRAM].contiguous().view(torch.float32)
        self.repetition, self.presence, self.frequency = (reals[:, column, None] for column in range(_NGRAM))
        self.rule_value = rules[..., 1].contiguous().view(torch.float32)

    def process(self, scores: Tensor, counts: list[Tensor], first: Tensor, drafts: int, ngrams: bool) -> Tensor:
        """Scores float32 [r, V] after everything."""
        holds = self._rules_that_hold()
        finite = holds & (self.rule_value > -math.inf)
        scores = scores.scatter_add(1, self.rule_token, torch.where(finite, self.rule_value, 0.0))
        occurs, written = self._add_drafts([count[self.own] for count in counts], first, drafts)
        penalised = torch.where(scores < 0, scores * self.repetition, scores / self.repetition)
        scores = torch.where(occurs > 0, penalised, scores)
        scores = scores - self.frequency * written
        scores = torch.where(written > 0, scores - self.presence, scores)
        if ngrams:
            scores = self._without_repeats(scores)
        return self._forbid(scores, self.rule_token, holds & ~finite)

    def _rules_that_hold(self) -> Tensor:
        """bool [r, RULES]."""
        at = self.position - RULE_PREFIX + torch.arange(RULE_PREFIX, device=self.tokens.device)
        behind = self.tokens[self.slot[:, None], at.clamp(min=0)].masked_fill(at < 0, -2)[:, None]
        matches = ((self.rule_prefix == behind) | (self.rule_prefix < 0)).all(dim=-1)
        return matches & (self.rule_first <= self.position) & (self.position < self.rule_until)

    def _add_drafts(self, counts: list[Tensor], first: Tensor, drafts: int) -> list[Tensor]:
        """Count the tokens between the first row of a slot and this row too, in tensors of our own [r, V]."""
        at = first[self.slot, None] + torch.arange(drafts, device=self.tokens.device)
        token = self.tokens[self.slot[:, None], at.clamp(max=self.tokens.shape[1] - 1)]
        drafted = at < self.position
        both = (drafted, drafted & (at >= self.prompt))
        return [count.scatter_add_(1, token, which.int()) for count, which in zip(counts, both, strict=True)]

    def _without_repeats(self, scores: Tensor) -> Tensor:
        """-inf for tokens that would repeat n tokens: those that stand behind the text's last n - 1 tokens."""
        text = self.tokens[self.slot]
        place = torch.arange(text.shape[1], device=text.device)
        matches = (self.ngram > 0) & (place >= self.ngram - 1) & (place < self.position)
        for distance in range(1, MOST_NGRAM):
            newest = text.gather(1, (self.position - distance).clamp(min=0))
            earlier = text.roll(distance, dims=1)  # what comes around stands before position n - 1
            matches &= (earlier == newest) | (distance >= self.ngram)
        return self._forbid(scores, text, matches)

    @staticmethod
    def _forbid(scores: Tensor, token: Tensor, which: Tensor) -> Tensor:
        """-inf for the tokens int64 [r, n] of which some are meant."""
        worst = torch.where(which, -math.inf, math.inf).to(scores.dtype)
        return scores.scatter_reduce(1, token, worst, "amin")
