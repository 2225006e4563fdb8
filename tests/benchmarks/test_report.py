"""The chart: drawn from rows of the right form, which are made up here, and refused otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import report
from report import (
    FIELDS,
    ReportError,
    annotation,
    by_workload,
    draw,
    label,
    read_rows,
    without_what_is_common,
)


def row(engine, speed, workload="64 x 8,192", accepted=None, **settings):
    values = dict.fromkeys(FIELDS)
    named = {"workload": workload, "engine": engine, "settings": settings, "tokens_per_second": speed, "versions": {}}
    return {**values, **named, "accepted_per_cycle": accepted}


ROWS = [
    row("sparsespec", 300.0, accepted=5.5, drafter="pillar", k=8),
    row("plain", 100),
    row("hf-generate", 20.0),
    row("plain", 50.0, workload="1 x 8,192"),
]


@pytest.fixture
def results(tmp_path):
    """A function that writes rows to a file and returns its path."""

    def write(rows):
        path = tmp_path / "results.json"
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return path

    return write


@pytest.mark.slow
def test_writes_a_chart(results):
    path = results(ROWS)
    chart = path.with_suffix(".png")
    command = [sys.executable, report.__file__, "--json", str(path), "--png", str(chart)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(chart) in run.stdout
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.stat().st_size > 10_000


def test_labels_leave_out_what_all_rows_of_an_engine_share():
    rows = [
        row("sparsespec", 3.0, drafter="pillar", k=8),
        row("sparsespec", 4.0, drafter="pillar", k=4),
        row("plain", 1),
    ]
    assert [label(short) for short in without_what_is_common(rows)] == ["sparsespec k=8", "sparsespec k=4", "plain"]


def test_rows_are_grouped_and_labelled(results):
    groups = by_workload(read_rows(results(ROWS)))
    assert list(groups) == ["64 x 8,192", "1 x 8,192"]
    assert [part["engine"] for part in groups["64 x 8,192"]] == ["hf-generate", "plain", "sparsespec"]
    assert label(ROWS[0]) == "sparsespec drafter=pillar k=8"
    assert annotation(ROWS[0], ROWS[:3]) == "300, 3.00x plain, 5.50 accepted"
    assert annotation(ROWS[1], ROWS[:3]) == "100"
    assert annotation(ROWS[2], [ROWS[2]]) == "20"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("not json", "is not JSON"),
        ([], "a list of rows, at least one"),
        ({"rows": []}, "a list of rows.* got dict"),
        ([1], "row 0 .* must be a mapping, got int"),
        ([{**ROWS[0]}, {"engine": "plain"}], "row 1 .* lacks workload, settings"),
        ([row("plain", None)], "tokens_per_second None; it must be a positive number"),
        ([row("plain", 0)], "tokens_per_second 0"),
        ([row("plain", float("nan"))], "tokens_per_second nan"),
    ],
)
def test_other_files_are_refused(results, rows, message):
    with pytest.raises(ReportError, match=message):
        read_rows(results(rows))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ReportError, match=r"does not exist. Run benchmarks/throughput\.py"):
        read_rows(tmp_path / "none.json")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(report, "import_module", absent)
    with pytest.raises(ReportError, match=r"pip install 'sparsespec-compile\[bench\]'"):
        draw(ROWS, tmp_path / "chart.png")
