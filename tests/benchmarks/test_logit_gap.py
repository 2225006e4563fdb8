"""The tool that checks bf16 texts: passes right ones, notices a wrong token."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import sparsespec_compile as ss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from countdown_model import held_out_prompts, load
from logit_gap import check_text, texts_of


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.6])
def test_tells_right_texts_from_wrong_ones(temperature):
    model, tokenizer = load("cpu", torch.bfloat16)
    exact = copy.deepcopy(model).float()
    prompts = held_out_prompts(tokenizer, 2, "cpu")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    seeds = [5, 6]
    output = ss.optimize(model).generate(**prompts, max_new_tokens=60, seed=seeds, pad_token_id=0, **sampling)
    for seed, (text, length) in zip(seeds, texts_of(output, prompts, tokenizer.eos_token_id), strict=True):
        report = check_text(model, exact, text, length, temperature, seed)
        assert report.tokens == len(text) - length
        assert report.failed == 0
        assert report.largest_gap <= 2 * report.error

        wrong = text.clone()
        wrong[length + 10] = (wrong[length + 10] + 7) % model.config.vocab_size
        assert check_text(model, exact, wrong, length, temperature, seed).failed > 0
        if temperature:
            assert check_text(model, exact, text, length, temperature, seed + 1).failed > 0
