"""The text of a model that ranks share is the one that a rank alone writes, token for token in float32."""

import math

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.runtime.device.weights import DraftCopies

from ..passes.families import tiny
from ..support.models import left_padded
from ..support.ranks import run_ranks

NEW_TOKENS = 40
LENGTHS = (3, 41, 17)

EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
FEW = {**EVEN, "num_key_value_heads": 1}
TIED = {**EVEN, "tie_word_embeddings": True, "initializer_range": 0.15}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "qwen3_moe", "granite_swa")


def shared_by(ranks):
    """Settings of a model that `ranks` ranks share. A busy machine may keep one of them from running for a while."""
    return {"tensor_parallel": ranks, "rank_timeout": 600.0}


def texts(ranks, family, settings, drafts, drafter="pillar", **more):
    """Greedy and sampled text, and acceptance, of a model that `ranks` ranks share; 1 for a whole one.

    Acceptance is NaN with "auto", which chooses by times.
    """
    input_ids, mask = left_padded(*LENGTHS)
    budget = {"min_budget": 12, "budget_ratio": 0.01}
    config = ss.SpecConfig(draft_tokens=drafts, drafter=drafter, **budget, **more, **shared_by(ranks))
    fast = ss.optimize(tiny(family, **settings), config)
    request = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS}
    greedy = fast.generate(input_ids, do_sample=False, **request)
    accepted = math.nan if drafts == "auto" else fast.stats.accepted_per_cycle
    return greedy, fast.generate(input_ids, do_sample=True, seed=3, temperature=2.0, **request), accepted


def narrow_texts(ranks, settings, garbage):
    """Texts whose drafts read int8 copies, or what is no number; how many were right, and iterations that read them."""
    copy = DraftCopies._copy
    DraftCopies._copy = not_a_number if garbage else copy
    try:
        input_ids, mask = left_padded(*LENGTHS)
        config = ss.SpecConfig(draft_tokens=4, min_budget=512, draft_weights="int8", **shared_by(ranks))
        fast = ss.optimize(tiny("llama", **settings), config)
        request = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS}
        greedy = fast.generate(input_ids, do_sample=False, **request)
        accepted, read = fast.stats.accepted_per_cycle, fast.stats.draft_weight_iterations
        return greedy, fast.generate(input_ids, do_sample=True, seed=3, temperature=0.8, **request), accepted, read
    finally:
        DraftCopies._copy = copy


def not_a_number(copies):
    for _, copy, scale, _ in copies._copies:
        copy.fill_(1)
        scale.fill_(math.nan)


def narrow_on_rank(rank, size, settings):
    return [narrow_texts(size, settings, garbage) for garbage in (False, True)]


def check_narrow(size, settings):
    """8-bit drafts of a model in parts: the text is that of one rank, whatever the copies hold."""
    (*alone, right, _) = narrow_texts(1, settings, garbage=False)
    for good, bad in run_ranks(narrow_on_rank, size, settings, timeout=600):
        for *written, _, read in (good, bad):
            assert all(map(torch.equal, written, alone))
            assert read > 10
        assert good[2] > 0.7 * right
        assert bad[2] < 0.1


def on_rank(rank, size, cases, more):
    return [texts(size, *case, **more) for case in cases]


def check(size, *cases, **more):
    alone = [texts(1, *case, **more) for case in cases]
    for found in run_ranks(on_rank, size, cases, more, timeout=600):
        for (*written, accepted), (*expected, expected_accepted) in zip(found, alone, strict=True):
            assert all(map(torch.equal, written, expected))
            # Sums in another order choose other pillars where scores are about equal: drafts may differ, texts not.
            assert accepted == pytest.approx(expected_accepted, abs=0.5, nan_ok=True)  # NaN without drafts
            assert len(expected[-1][:, -NEW_TOKENS:].unique()) > 10, "sampled texts that repeat prove little"


def test_two_ranks_write_the_text_of_one():
    check(2, ("llama", EVEN, 4), ("llama", EVEN, 4, "ngram"))


def test_two_ranks_judge_the_same_proposals():
    check(2, ("llama", EVEN, 6), draft_proposals=2)


@pytest.mark.slow
def test_ranks_choose_the_same_cycles():
    """By the times of one of them, proposals among what it chooses from."""
    check(2, ("llama", EVEN, "auto", "auto"), ceilings=ss.H200)
    check(4, ("qwen3", TIED, "auto", "auto"), ceilings=ss.H200)


def test_two_ranks_draft_with_8_bit_weights_and_their_text_does_not_depend_on_them():
    check_narrow(2, EVEN)


@pytest.mark.slow
def test_four_ranks_draft_with_8_bit_weights():
    check_narrow(4, TIED)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_write_the_text_of_one_whatever_the_model(family):
    check(2, *((family, settings, 4) for settings in (EVEN, FEW, TIED)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_four_ranks_write_the_text_of_one(family):
    few = {**EVEN, "num_key_value_heads": 2}
    check(4, *((family, settings, drafts) for settings, drafts in ((few, 4), (EVEN, 0), (TIED, 2))))


def two_models(rank, size):
    """Text of the first of two groups' models: ranks 0 and 1 share one, ranks 2 and 3 another."""
    return texts(2, "llama", EVEN, 2)[0]


@pytest.mark.slow
def test_four_ranks_share_two_models():
    alone = texts(1, "llama", EVEN, 2)[0]
    assert all(torch.equal(text, alone) for text in run_ranks(two_models, 4))
