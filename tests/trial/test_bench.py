"""The benchmark of a user's model: fresh inputs in each run, and a prediction with the acceptance that was measured."""

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.errors import ConfigError
from sparsespec_compile.runtime.host.stats import CycleStats
from sparsespec_compile.trial import bench as benchmark

from ..support.models import VOCABULARY, tiny

PROMPT = torch.randint(2, VOCABULARY, (50,), generator=torch.Generator().manual_seed(3)).tolist()


def test_each_run_begins_anew_and_advise_is_asked(monkeypatch):
    written, write = [], benchmark.write

    def seen(*arguments):
        written.append(write(*arguments))
        return written[-1]

    monkeypatch.setattr(benchmark, "write", seen)
    config = ss.SpecConfig(draft_tokens=3, min_budget=8, ceilings=ss.H200)
    fast = ss.optimize(tiny("llama", num_hidden_layers=1), config)
    report = ss.bench(fast, [PROMPT, PROMPT[:40]], max_new_tokens=12, temperature=0.7, runs=2, progress=False)
    assert len(written) == 6  # plain and speculative, each with its warm-up
    # Two pages of the prompts are alike, and shared within a run; of the run before nothing is left.
    assert {one.stats.cached_tokens for one in written} == {32}
    assert len({tuple(one.texts[0]) for one in written[:3]}) == 3  # seeds of their own
    assert [one.texts for one in written[:3]] == [one.texts for one in written[3:]]
    assert report.equal == 1.0
    assert report.plain.tokens == report.speculative.tokens == (24, 24)
    assert report.predicted.batch == 2
    assert report.predicted.length == pytest.approx(45 + 6)
    assert report.predicted.plain_tokens_per_second > 0
    assert report.unpredicted is None


def test_acceptance_is_that_of_drafts_whose_predecessors_were_right():
    kinds = {("pillar", 2): CycleStats(10, [8, 4]), ("ngram", 1): CycleStats(4, [1]), ("none", 0): CycleStats(7, [])}
    assert benchmark._acceptance(kinds, ngrams=False) == 12 / 18
    assert benchmark._acceptance(kinds, ngrams=True) == 1 / 4
    assert benchmark._acceptance({("none", 0): CycleStats(7, [])}, ngrams=False) is None


def test_what_cannot_be_measured_is_refused():
    fast = ss.optimize(tiny("llama", num_hidden_layers=1), ss.SpecConfig(draft_tokens=0))
    with pytest.raises(ConfigError, match="draft_tokens is 0, which is plain decoding"):
        ss.bench(fast, [PROMPT])
    with pytest.raises(ConfigError, match="runs must be an integer of at least 1, got 0"):
        ss.bench(fast, [PROMPT], runs=0)
