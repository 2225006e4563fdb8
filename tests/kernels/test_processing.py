"""`process_logits` is transformers' processors, row for row, as a CUDA graph holds it and as a CPU runs it."""

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError
from sparsespec_compile.kernels.sampling import processing

VOCABULARY, SLOTS, TOKENS, DRAFTS = 60, 4, 90, 5


def row(repetition=1.0, presence=0.0, frequency=0.0, ngram=0, prompt=0, rules=()):
    settings = np.zeros(ops.PROCESSING_WIDTH, dtype=np.int32)
    settings[:3] = np.array([repetition, presence, frequency], dtype=np.float32).view(np.int32)
    settings[3:5] = ngram, prompt
    entries = settings[ops.PROCESSING_HEAD :].reshape(ops.RULES, ops.RULE_WIDTH)
    for entry, (token, value, first, until, prefix) in zip(entries, rules, strict=False):
        entry[:4] = token, np.float32(value).view(np.int32), first, until
        entry[4:] = [-1] * (ops.RULE_PREFIX - len(prefix)) + list(prefix)
    return settings


class Case:
    """Rows of each slot behind texts of few different tokens, a padded row, and what transformers makes of them."""

    def __init__(self, rows=DRAFTS):
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(12, (SLOTS + 1, TOKENS), generator=generator)
        starts = (1, 33, 7, TOKENS - rows)
        self.slot = torch.tensor([slot for slot in range(SLOTS) for _ in range(rows)] + [SLOTS] * 2)
        self.position = torch.tensor([start + nth for start in starts for nth in range(rows)] + [1, 1])
        self.logits = torch.randn(len(self.slot), VOCABULARY, generator=generator) * 3
        word = tuple(self.tokens[1, 30:34].tolist())
        self.rules = [(3, 2.5, 0, 2**31 - 1, ()), (5, -1.5, 34, 36, ()), (7, -math.inf, 0, 35, ())]
        self.rules += [(9, -math.inf, 0, 2**31 - 1, word)]
        self.word = [*word, 9]
        self.settings = torch.from_numpy(
            np.stack(
                [
                    row(repetition=1.3, ngram=1),
                    row(repetition=0.8, presence=0.7, frequency=0.3, prompt=31, rules=self.rules),
                    row(),
                    row(ngram=3),
                ]
            )
        )

    def process(self, run):
        return run(self.logits, self.tokens, self.slot, self.position, self.settings, DRAFTS, True)

    def expected(self, nth):
        slot, length = int(self.slot[nth]), int(self.position[nth])
        ids, scores = self.tokens[slot : slot + 1, :length], self.logits[nth : nth + 1]
        if slot == 0:
            scores = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, scores)
            scores = theirs.NoRepeatNGramLogitsProcessor(1)(ids, scores)
        if slot == 1:
            bias = {(3,): 2.5} | ({(5,): -1.5} if 34 <= length < 36 else {})
            scores = theirs.SequenceBiasLogitsProcessor(bias)(ids, scores)
            scores = theirs.RepetitionPenaltyLogitsProcessor(0.8)(ids, scores)
            count = torch.bincount(ids[0, 31:], minlength=VOCABULARY)
            scores = scores - 0.3 * count - 0.7 * (count > 0)
            scores = theirs.NoBadWordsLogitsProcessor([self.word])(ids, scores)
            if length < 35:
                scores = theirs.SuppressTokensLogitsProcessor([7])(ids, scores)
        if slot == 3:
            scores = theirs.NoRepeatNGramLogitsProcessor(3)(ids, scores)
        return scores[0]


@pytest.mark.parametrize("run", [processing.process_logits, ops.process_logits], ids=["for graphs", "on CPU"])
@pytest.mark.parametrize("rows", [1, DRAFTS])
def test_every_row_is_processed_as_transformers_does(run, rows, monkeypatch):
    monkeypatch.setattr(processing, "_ROWS", 6)  # several pieces
    case = Case(rows)
    scores = case.process(run)
    for nth in range(SLOTS * rows):
        torch.testing.assert_close(scores[nth], case.expected(nth), atol=0, rtol=2**-22)
    changed = (scores != case.logits).any(dim=1)[: SLOTS * rows].view(SLOTS, rows).any(dim=1)
    assert changed.tolist() == [True, True, False, True]


def test_logits_are_left_as_they_are():
    case = Case()
    kept = case.logits.clone()
    assert case.process(ops.process_logits).data_ptr() != case.logits.data_ptr()
    assert torch.equal(case.logits, kept)


def test_schema_and_fake():
    case = Case()
    arguments = (case.logits.bfloat16(), case.tokens, case.slot, case.position, case.settings, DRAFTS, True)
    torch.library.opcheck(ops.process_logits, arguments)


def test_arguments_that_do_not_fit_are_refused():
    case = Case()
    with pytest.raises(KernelInputError, match="settings"):
        ops.process_logits(case.logits, case.tokens, case.slot, case.position, case.settings[:, 1:], DRAFTS, True)
    with pytest.raises(KernelInputError, match="tokens have 3 rows; give one for each of 4 slots"):
        ops.process_logits(case.logits, case.tokens[:3], case.slot, case.position, case.settings, DRAFTS, True)
