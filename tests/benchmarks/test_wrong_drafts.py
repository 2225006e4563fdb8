"""Drafts that are wrong on purpose: as many as asked, and never a token of the text."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsespec_compile.runtime.host.engine import Engine
from tests.support.toy import Toy, requests_of, run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from throughput_ours import drafts_right
from wrong_drafts import Share, WrongDrafts, accepted_of, rate_for, words

LENGTHS = (9, 17, 30, 44, 5, 21)
NEW_TOKENS = 60


def engine_with(share, **settings):
    engine = Toy().engine(**settings)
    kept = Share(torch.device("cpu"))
    kept.set(share)
    spoiled = WrongDrafts(engine.target.forward, kept, lambda function: function)
    return Engine(replace(engine.target, forward=spoiled), engine.config)


@pytest.fixture(scope="module")
def plain():
    """Texts of plain decoding, by temperature."""
    return {
        temperature: run(Toy().engine(draft_tokens=0), requests_of(LENGTHS, NEW_TOKENS, temperature=temperature))
        for temperature in (0.0, 0.6)
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize("proposals", [0, 2])
@pytest.mark.parametrize("share", [0.9, *(pytest.param(share, marks=SLOW) for share in (1.0, 0.5, 0.0))])
def test_the_rate_is_the_share_and_the_text_stays(plain, share, proposals):
    """Drafts that read everything are always right, so what is spoiled is all that is wrong."""
    engine = engine_with(share, drafter="full", draft_tokens=8, draft_proposals=proposals)
    assert run(engine, requests_of(LENGTHS, NEW_TOKENS, temperature=0.0)) == plain[0.0]
    (kinds,) = engine.stats.by_cycle.values()
    judged = kinds.tried
    assert judged > 150
    deviation = math.sqrt(share * (1 - share) / judged)
    assert drafts_right(engine.stats) == pytest.approx(share, abs=4 * deviation)


@pytest.mark.parametrize(
    "settings", [{"min_budget": 8}, pytest.param({"drafter": "window", "min_budget": 8}, marks=SLOW)]
)
def test_sampled_text_stays_and_acceptance_falls(plain, settings):
    rates = []
    for share in (1.0, 0.6):
        engine = engine_with(share, **settings)
        assert run(engine, requests_of(LENGTHS, NEW_TOKENS, temperature=0.6)) == plain[0.6]
        rates.append(drafts_right(engine.stats))
    assert rates[1] < 0.8 * rates[0]


def test_drafts_without_a_pass_are_left_alone(plain):
    rates = []
    for share in (1.0, 0.0):
        engine = engine_with(share, drafter="ngram", draft_tokens=3)
        assert run(engine, requests_of(LENGTHS, NEW_TOKENS, temperature=0.6)) == plain[0.6]
        rates.append(drafts_right(engine.stats))
    assert rates[0] == rates[1]


def test_words_are_uniform_and_differ_by_slot_position_and_seed():
    slot, position = torch.arange(64)[:, None], torch.arange(4096)
    found = words(slot, position, 0)
    assert found.min() >= 0
    assert found.max() < 2**32
    for share in (0.05, 0.5, 0.95):
        for part in (found, found[7], found[:, 100], found[:, ::16]):
            deviation = math.sqrt(share * (1 - share) / part.numel())
            assert (part < share * 2**32).float().mean().item() == pytest.approx(share, abs=4.5 * deviation)
    assert (found == words(slot, position, 1)).float().mean() < 1e-3
    below = (found < 2**31).float() - 0.5
    assert (below[:, 1:] * below[:, :-1]).mean().abs() < 0.002  # neighbours are independent
    assert (below[1:] * below[:-1]).mean().abs() < 0.002


def test_the_rate_for_the_papers_acceptance():
    rate = rate_for(6.16, 8)
    assert rate == pytest.approx(0.942, abs=5e-4)
    assert accepted_of(8, rate) == pytest.approx(6.16)
