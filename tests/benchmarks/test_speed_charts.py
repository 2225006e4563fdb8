"""The charts of speed, from rows that are made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import speed_charts
from report import FIELDS, ReportError
from speed_charts import Point, cached_tokens, points


def row(engine, speed, right=1.0, drafts_right=None, workload="Qwen3-8B 64x8192", **settings):
    named = {"workload": workload, "engine": engine, "settings": settings, "tokens_per_second": speed, "right": right}
    return {**dict.fromkeys(FIELDS), **named, "drafts_right": drafts_right}


ROWS = [
    row("plain", 100.0, draft_tokens=0),
    row("sparsespec", 260.0, drafts_right=0.97),
    row("sparsespec", 250.0, drafts_right=0.99, draft_tokens=8),
    row("sparsespec", 270.0, drafts_right=0.991, draft_tokens=12),
    row("sparsespec", 300.0, drafts_right=0.4, draft_tokens=3, drafter="ngram"),
    row("sparsespec", 180.0, right=0.9, drafts_right=0.8),
    row("sparsespec", 190.0, right=0.9, drafts_right=0.89, draft_tokens=8),
    row("sparsespec", 150.0, drafts_right=0.99, draft_tokens=8, workload="of no plain decoding"),
    row("plain", 10.0, workload="plain decoding alone", draft_tokens=0),
]


def test_points_are_over_plain_decoding_at_the_rate_of_the_models_drafts():
    assert points(ROWS) == {
        "Qwen3-8B 64x8192": [
            Point(0.89, 1.8, 1.9, "8 drafts"),
            Point(0.991, 2.6, 3.0, "3 drafts, ngram"),
        ]
    }
    with pytest.raises(ReportError, match="no workload has both"):
        points(ROWS[:2])


def test_cached_tokens_are_those_in_the_middle_of_texts():
    assert cached_tokens("Qwen3-8B 64x50+2950") == 64 * (50 + 1475)
    assert cached_tokens("of no lengths") is None


@pytest.mark.slow
def test_writes_a_chart(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(ROWS))
    chart = tmp_path / "chart.png"
    command = [sys.executable, speed_charts.__file__, "--json", str(path), "--png", str(chart)]
    subprocess.run(command, check=True)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.stat().st_size > 10_000
