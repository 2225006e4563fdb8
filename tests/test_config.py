"""Settings are checked when they are made, and say what they want."""

import dataclasses

import numpy as np
import pytest

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError, SparseSpecError


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("draft_tokens", -1, "from 0 to 64"),
        ("draft_tokens", 65, "from 0 to 64"),
        ("draft_tokens", 8.0, "integer"),
        ("draft_tokens", True, "integer"),
        ("budget_ratio", 0.0, r"\(0, 1\]"),
        ("budget_ratio", 1.5, r"\(0, 1\]"),
        ("budget_ratio", float("nan"), r"\(0, 1\]"),
        ("budget_ratio", "5%", r"\(0, 1\]"),
        ("local_ratio", -0.1, r"\[0, 1\]"),
        ("local_ratio", 1.01, r"\[0, 1\]"),
        ("min_budget", 0, "from 1 to 1048576"),
        ("drafter", "eagle", "'auto', 'pillar', 'window', 'full', 'ngram'"),
        ("draft_proposals", 9, "from 0 to 8"),
        ("page_size", 0, "from 1 to 4096"),
        ("pool_tokens", 8, "from 16 to"),
        ("max_requests", 0, "from 1 to 1024"),
        ("max_requests", 1025, "from 1 to 1024"),
        ("prefill_chunk", 0, "from 1 to"),
        ("rank_timeout", 0.5, "from 1 to 86400"),
        ("rank_timeout", float("nan"), "from 1 to 86400"),
        ("backend", "cuda", "'auto', 'eager', 'inductor'"),
    ],
)
def test_bad_values(name, value, allowed):
    with pytest.raises(ConfigError, match=rf"{name} must be .*{allowed}.*got {value!r}"):
        SpecConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "draft_tokens='auto'"),
        ({"draft_tokens": 4, "drafter": "ngram"}, "drafter='ngram'"),
        ({"draft_tokens": 2}, "below draft_tokens, 2"),
        ({"draft_tokens": 1}, "below draft_tokens, 1"),
    ],
)
def test_proposals_go_with_more_drafts_by_the_model(settings, message):
    with pytest.raises(ConfigError, match=message):
        SpecConfig(draft_proposals=2, **settings)
    with pytest.raises(
        ConfigError, match="Set draft_tokens to a number above 2, and drafter to pillar, window or full"
    ):
        SpecConfig(draft_proposals=2, drafter="ngram", draft_tokens=4)
    assert dataclasses.replace(SpecConfig(draft_tokens=4, draft_proposals=2), draft_tokens=0).draft_proposals == 2


def test_unknown_and_positional_settings_are_refused_with_the_allowed_names():
    with pytest.raises(ConfigError, match=r"budget.*Allowed, by name: draft_tokens.*backend"):
        SpecConfig(budget=3)
    with pytest.raises(ConfigError, match="positional"):
        SpecConfig(8)
    assert issubclass(ConfigError, SparseSpecError)
    assert issubclass(ConfigError, ValueError)


def test_frozen_and_replaceable():
    config = SpecConfig(draft_tokens=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.draft_tokens = 5
    assert dataclasses.replace(config, min_budget=7) == SpecConfig(draft_tokens=4, min_budget=7)


@pytest.mark.parametrize(("length", "budget"), [(0, 128), (2560, 128), (2561, 129), (8192, 410), (131072, 6554)])
def test_budget_is_the_papers(length, budget):
    assert SpecConfig().budget(length) == budget


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("draft_tokens", "Auto", 'from 0 to 64 or "auto"'),
        ("draft_proposals", "two", 'from 0 to 8 or "auto"'),
        ("pool_tokens", 1.5, "or None"),
        ("max_length", "long", "or None"),
        ("drafter", np.array(["pillar", "ngram"]), "must be one of 'auto'"),
        ("schedule", np.array(["grouped", "random"]), "must be one of 'grouped'"),
    ],
)
def test_errors_name_all_that_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError, match=allowed):
        SpecConfig(**{name: value})
