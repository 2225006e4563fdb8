"""What changes logits before a token is drawn: settings for the op `process_logits`, or functions of (ids, scores).

Both see the prefix that a row stands for: its request's tokens, with the drafts before the row. So drafts are made and
verified by the same rule, and the text is the one that plain decoding would write.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.kernels.ops import (
    MOST_NGRAM,
    PROCESSING_HEAD,
    PROCESSING_WIDTH,
    RULE_PREFIX,
    RULE_WIDTH,
    RULES,
)

ALWAYS = 2**31 - 1
"""The `until` of a rule without an end."""

Processor = Callable[[Tensor, Tensor], Tensor]
"""(ids int64 [1, L], scores float32 [1, V]) -> scores float32 [1, V]: transformers' `LogitsProcessor`, or a list."""


class Rule(NamedTuple):
    """A token whose logit gets `value` more, or -inf for -inf, at positions first <= p < until behind some tokens."""

    token: int
    value: float
    first: int = 0
    until: int = ALWAYS
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Processing:
    """What the op does to a request's logits.

    Attributes:
        repetition: penalty of every token that occurs in the text; 1.0 = off.
        presence, frequency: taken off the logit of a token that occurs behind the prompt, once, and for each time.
        ngram: tokens of a sequence that may not occur twice; 0 = off, MOST_NGRAM at most.
        prompt: tokens of the prompt.
        rules: RULES at most. Those of finite values are of different tokens, and no prefix exceeds RULE_PREFIX.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    ngram: int = 0
    prompt: int = 0
    rules: tuple[Rule, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the op can do it."""
        biased = [rule.token for rule in self.rules if rule.value > -math.inf]
        return (
            self.ngram <= MOST_NGRAM
            and len(self.rules) <= RULES
            and len(biased) == len(set(biased))
            and all(len(rule.prefix) <= RULE_PREFIX for rule in self.rules)
        )

    def row(self) -> np.ndarray:
        """int32 [PROCESSING_WIDTH], as the op takes it."""
        row = np.zeros(PROCESSING_WIDTH, dtype=np.int32)
        row[:3] = np.array([self.repetition, self.presence, self.frequency], dtype=np.float32).view(np.int32)
        row[3:5] = self.ngram, self.prompt
        rules = row[PROCESSING_HEAD:].reshape(RULES, RULE_WIDTH)
        for entry, rule in zip(rules, self.rules, strict=False):
            value = np.float32(rule.value).view(np.int32)
            prefix = (-1,) * (RULE_PREFIX - len(rule.prefix)) + rule.prefix
            entry[:] = rule.token, value, rule.first, rule.until, *prefix
        return row


NOTHING = Processing()


@dataclass
class RowProcessors:
    """Functions of (ids, scores) that a request's rows are put through, one row at a time, outside of any graph.

    Attributes:
        processors: applied one after the other.
        warpers: what drawing does to the scores; only for those that are kept.
        keep: whether to keep the logits of each position, and the scores after everything.
        by_caller: whether some of them are the caller's own.
        errors: by position, what one of them has raised, or why there is nothing to draw from. A text that comes to
            such a position ends with it; behind a draft that is not accepted, it means nothing.
        kept: by position, logits and scores float32 [V] that its token was drawn from, in host memory.
    """

    processors: tuple[Processor, ...] = ()
    warpers: tuple[Processor, ...] = ()
    keep: bool = False
    by_caller: bool = False
    errors: dict[int, Exception] = field(default_factory=dict)
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def process(self, ids: Tensor, logits: Tensor, *, final: bool) -> Tensor:
        """Scores float32 [V] of a row.

        Args:
            ids: int64 [L], the tokens that it stands behind.
            logits: float32 [V].
            final: whether its token may become final, so that what it is drawn from is worth keeping.
        """
        self.errors.pop(len(ids), None)  # of another prefix, with drafts that are no more
        try:
            scores = _apply(self.processors, ids, logits)
            if self.processors and not bool(scores.max() > -math.inf):  # neither is NaN
                raise no_token_left(len(ids), scores.max().item())
            if self.keep and final:
                warped = _apply(self.warpers, ids, scores)
                self.kept[len(ids)] = logits.cpu().clone(), warped.cpu().clone()
        except Exception as error:  # the caller's own code: whatever it raises ends this request and no other
            self.errors[len(ids)] = error
            return logits
        return scores

    def failed(self, start: int, end: int) -> tuple[int, Exception] | None:
        """The first position start <= p < end at which no token could be drawn, and why."""
        return min(
            ((at, error) for at, error in self.errors.items() if start <= at < end), default=None, key=itemgetter(0)
        )


def no_token_left(length: int, highest: float) -> SamplingError:
    """What ends a text of `length` tokens, prompt included, behind which every token is forbidden."""
    return SamplingError(
        f"No token is left to draw behind {length} tokens: settings and processors have made the highest score "
        f"{highest}. Leave a token that is allowed with a finite score."
    )


def _apply(processors: tuple[Processor, ...], ids: Tensor, scores: Tensor) -> Tensor:
    for processor in processors:
        # Of each its own: what is done to them in place, or kept, is nobody else's.
        processed = processor(ids[None].clone(), scores[None].clone())
        if not isinstance(processed, Tensor) or processed.shape != (1, len(scores)):
            got = tuple(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
            raise SamplingError(
                f"A logits processor ({type(processor).__name__}) must return scores [1, {len(scores)}], got {got}."
            )
        scores = processed[0].to(scores)
    return scores


def process_rows(
    logits: Tensor, tokens: Tensor, slot: Tensor, position: Tensor, final: Tensor, of_slot: Mapping[int, RowProcessors]
) -> Tensor:
    """Scores float32 [R, V] of rows, each processed by what its slot has; waits for the device.

    Args:
        logits: [R, V].
        tokens: int64 [S + 1, N], the texts.
        slot, position: int64 [R], whose text a row continues, and how many tokens it stands behind.
        final: bool [R], whether a row's token may become final.
        of_slot: the functions of the slots that have some.
    """
    scores = logits.to(torch.float32, copy=True)
    for row, (own, length, last) in enumerate(zip(slot.tolist(), position.tolist(), final.tolist(), strict=True)):
        if own in of_slot:
            scores[row] = of_slot[own].process(tokens[own, :length], scores[row].clone(), final=last)
    return scores
