"""Times of iterations are measured of every cycle that auto could choose, on a model with random weights."""

import sys
from pathlib import Path

import sparsespec_compile as ss
from sparsespec_compile.runtime.device.drafters import cycles_of
from tests.support.models import tiny
from tests.support.toy import prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from iteration_times import run, show, touring


def test_every_cycle_is_measured():
    config = ss.SpecConfig(max_draft_tokens=2, max_requests=2, ceilings=ss.H200)
    fast = ss.optimize(tiny("qwen3"), config)
    cycles = [(cycle.name, cycle.drafts) for cycle in cycles_of(config)]
    assert ("none", 0) in cycles
    assert {"ngram", "pillar"} <= {name for name, _ in cycles}
    with touring() as tour:
        run(fast, prompts(20, 20), tour)
        rows = tour().rows
    assert [row["requests"] for row in rows] == [2] * len(cycles)
    assert [(row["drafter"], row["draft_tokens"]) for row in rows] == cycles
    for row in rows:
        assert row["length"] > 20
        assert row["seconds"] > 0
        assert row["predicted"] > 0
    assert show(rows).row_count == len(rows)
