"""The kernel benchmark from end to end on a CPU, and how it judges."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kernel_bench.cases import CASES, READ_CEILING, Bar
from kernel_bench.report import Result, judge

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_runs_without_a_gpu_and_writes_nothing():
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--device", "cpu", "--repeats", "1"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for case in CASES:
        assert f"{case.name}: " in run.stdout
    assert "nothing written" in run.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}


def test_bars():
    half = Result("half", ms=2e3 / READ_CEILING, fewest_bytes=1)
    results = [
        half,
        Result("slower", 1.3 * half.ms, 1),
        Result("beside a peer", 1.0, 1, {"peer": 0.5}),
        Result("x", 1, 1),
    ]
    bars = [
        Bar(share=0.5),
        Bar(against=("half", 1.2)),
        Bar(ms=1.0, against=("peer", 2.0)),
        Bar(against=("absent", 1.0)),
    ]
    judge(results, bars)
    assert [result.met for result in results] == [True, False, True, None]
    assert results[1].missed == ["1.20 x half"]


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)
