"""The promise: float32 greedy text equals HuggingFace's `generate`, token for token, whatever is drafted."""

import pytest
import torch

import sparsespec_compile as ss

from .support.models import FAMILIES, countdown, left_padded, tiny

NEW_TOKENS = 304
LENGTHS = (3, 41, 17)

SETTINGS = [(0, 128), (1, 4), (4, 8), (4, 1000), (8, 12), (8, 1000)]
"""draft_tokens and min_budget."""

THOROUGH = ("qwen3", "gemma2")
"""Families for which all settings are fast: the engine does not know the others from these."""

CASES = [
    pytest.param(family, *settings, marks=() if family in THOROUGH or settings == (8, 12) else pytest.mark.slow)
    for family in FAMILIES
    for settings in SETTINGS
]


@pytest.fixture(scope="module")
def case(request):
    """A model, prompts, and HuggingFace's own text, computed before the model is optimized."""
    model = tiny(request.param)
    input_ids, mask = left_padded(*LENGTHS)
    text = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert text.shape[1] == input_ids.shape[1] + NEW_TOKENS
    assert max(len(row[-100:].unique()) for row in text) > 10, "texts that repeat a few tokens prove little"
    return model, input_ids, mask, text


@pytest.mark.parametrize(("case", "draft_tokens", "min_budget"), CASES, indirect=["case"])
def test_greedy_text_equals_huggingface(case, draft_tokens, min_budget):
    model, input_ids, mask, expected = case
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=draft_tokens, min_budget=min_budget, budget_ratio=0.01))
    text = fast.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(text, expected)
    if draft_tokens and min_budget == 1000:
        assert fast.stats.accepted_per_cycle == draft_tokens  # everything is in the index: drafts cannot be wrong
    if draft_tokens and min_budget < 100:
        assert fast.stats.accepted_per_cycle < draft_tokens  # the test would prove little if they never were


@pytest.mark.parametrize(
    ("draft_tokens", "min_budget"),
    [pytest.param(0, 128, marks=pytest.mark.slow), (8, 12), pytest.param(8, 128, marks=pytest.mark.slow)],
)
def test_reasoning_equals_huggingface(draft_tokens, min_budget):
    """On a trained model, whose drafts are mostly right and sometimes wrong."""
    puzzles = ("21 6 24 2 for 102", "39 36 32 40 for 75", "3 37 5 9 1 for 90")
    model, input_ids, mask = countdown(*(f"solve {puzzle}\n" for puzzle in puzzles))
    expected = model.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=draft_tokens, min_budget=min_budget, budget_ratio=0.01))
    text = fast.generate(input_ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(text, expected)
    if draft_tokens:
        assert 1 < fast.stats.accepted_per_cycle < 8


def test_stats_add_up():
    model = tiny("llama")
    input_ids, mask = left_padded(*LENGTHS)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=6))
    fast.generate(input_ids, attention_mask=mask, max_new_tokens=50, do_sample=False)
    stats = fast.stats
    assert stats.tokens == 50 * len(LENGTHS)
    assert stats.accepted_by_position == sorted(stats.accepted_by_position, reverse=True)
    assert stats.accepted_per_cycle == pytest.approx(sum(stats.accepted_by_position))
    assert 1 <= stats.tokens_per_target_pass <= 5
    assert 0 < stats.kv_bytes_share < 5
