"""Every figure of the README comes from a committed result."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from drafters import markdown  # noqa: E402

README = (ROOT / "README.md").read_text()


def test_drafter_table_is_the_committed_result():
    rows = json.loads((ROOT / "benchmarks/results/h200-drafters.json").read_text())["rows"]
    assert markdown(rows) in README


def test_pillars_beat_the_window_at_equal_budget():
    rows = json.loads((ROOT / "benchmarks/results/h200-drafters.json").read_text())["rows"]
    accepted = {(row["drafter"], row["local_ratio"]): row["accepted_per_cycle"] for row in rows}
    assert accepted["pillar", 0.25] > accepted["pillar", 0.0] > accepted["window", None]


@pytest.mark.parametrize(
    "document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "examples/countdown/README.md"]
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (ROOT / document).parent.joinpath(target).exists()]
    assert not missing


def test_logit_gap_sentence_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/h200-logit-gap.json").read_text())
    runs = [value for name, value in result.items() if name.startswith("temperature")]
    parted, tokens = (sum(run[name] for run in runs) for name in ("parted", "tokens"))
    largest = max(run["largest_gap"] for run in runs)
    assert f"{parted} of {tokens:,} tokens are not the favourite, the largest gap is {largest} logits" in README
