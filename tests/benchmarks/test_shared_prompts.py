"""The benchmark of prompts that begin alike, on the Countdown model."""

import argparse
import sys
from pathlib import Path

import pytest

import sparsespec_compile as ss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import shared_prompts


@pytest.mark.slow
def test_samples_and_chats_are_measured():
    model, tokenizer = shared_prompts.load_model("countdown", "cpu")
    fast, plain = (
        ss.optimize(model, ss.SpecConfig(max_requests=4, draft_tokens=0, prefix_caching=shared))
        for shared in (True, False)
    )
    asked = argparse.Namespace(device="cpu", samples=4, prompt=160, runs=1, chats=2, turns=3, said=32, answer=16)
    result = shared_prompts.measure(fast, plain, tokenizer, asked)
    assert result["samples"]["share"] < 0.8, "prompts of 160 tokens in place of 640"
    # Turns 2 and 3 ask for 80 and 128 tokens; the last token of a text has no K/V, and pages are whole.
    assert 0.4 < result["chats"]["shared"]["found_share"] <= (47 + 95) / (80 + 128)
    assert result["chats"]["not shared"]["found_share"] == 0.0
    assert "2 chats of 3 turns" in shared_prompts.show(result).columns[0]._cells[1]
