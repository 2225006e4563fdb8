"""A token whose keys and values are not finite changes no text by being drafted and rejected."""

import pytest
import torch

import sparsespec_compile as ss

from .support.models import VOCABULARY, tiny

BAD = 7
NEW = 30


def prompts():
    """Some behind which BAD is drafted, and some whose text has it: HuggingFace goes on from logits that are NaN."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(VOCABULARY, (4,), generator=generator).tolist() for _ in range(24)]
    return [[143, 114, 150], *(made[i] for i in (1, 2, 7, 21, 23))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite(bad):
    model = tiny("llama")
    model.model.embed_tokens.weight.data[BAD] = bad
    expected = [_huggingface(model, prompt) for prompt in prompts()]
    assert _texts(model, draft_tokens=4) == expected


def test_values_that_overflow_in_float16():
    """One element of the values of one token does, in the first layer."""
    model = tiny("llama").half()
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 0] = 0.0
    embedding[BAD, 0] = 50.0
    values = model.model.layers[0].self_attn.v_proj.weight.data
    values[3] = 0.0
    values[3, 0] = 6e4
    assert _texts(model, draft_tokens=4) == _texts(model, draft_tokens=0)


def _texts(model, draft_tokens):
    # So few pillars that drafts are mostly wrong.
    config = ss.SpecConfig(draft_tokens=draft_tokens, min_budget=2, budget_ratio=0.01)
    done = ss.optimize(model, config).generate_batch(
        prompts(), ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=())
    )
    return [list(completion.token_ids) for completion in done]


def _huggingface(model, prompt):
    text = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    return text[0, len(prompt) :].tolist()
