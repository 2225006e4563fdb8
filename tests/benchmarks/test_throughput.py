"""The throughput benchmark end to end, on a CPU, with the Countdown model at its own size."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from report import FIELDS  # noqa: E402
from throughput import load_model  # noqa: E402
from throughput_engines import Clock, Load, TooShortError, _difference  # noqa: E402
from traces import recorded_traces  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), "--shape", "countdown", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_engines_run_on_the_same_texts(tmp_path):
    file = tmp_path / "throughput.json"
    engines = ("--engine", "plain", "sparsespec", "hf-generate", "vllm")
    result = run(
        "--workload", "3x120", "--new-tokens", "60", *engines, "--checkpoint", str(tmp_path), "--json", str(file)
    )
    assert result.returncode != 0
    assert "vllm needs --checkpoint" in result.stderr
    rows = json.loads(file.read_text())
    assert [row["engine"] for row in rows] == ["plain", "sparsespec", "hf-generate"]
    for row in rows:
        assert set(FIELDS) <= row.keys()
        assert row["workload"] == "countdown 3x120"
        assert row["tokens_per_second"] > 0
    plain, ours, _ = rows
    assert plain["kv_bytes_share"] == 1
    assert ours["accepted_per_cycle"] > 5


@pytest.mark.slow
def test_our_texts_equal_plain_decodings():
    result = run("--workload", "2x100", "--new-tokens", "60")
    assert result.returncode == 0, result.stderr
    assert (
        "100.0% of the tokens of sparsespec drafter=pillar schedule=grouped draft_tokens=8 equal plain decoding's"
        in result.stdout
    )


@pytest.mark.slow
def test_a_batch_that_drains_is_timed_to_its_end(tmp_path):
    file = tmp_path / "throughput.json"
    engines = ("--engine", "plain", "sparsespec", "hf-generate", "--draft-tokens", "4")
    result = run("--workload", "3x60-drain", "--new-tokens", "120", *engines, "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "hf-generate skipped" in result.stdout
    rows = json.loads(file.read_text())
    assert [row["settings"].get("draft_tokens") for row in rows] == [None, 4]
    for row in rows:
        assert row["workload"] == "countdown 3x60-drain"
    plain = rows[0]
    assert plain["tokens_per_iteration"] < 2.5  # of texts of 30, 75 and 120 tokens
    load = Load(prompts=[[1]] * 3, new_tokens=120, temperature=0.0, seed=1, drains=True)
    assert [load.new_tokens_of(i) for i in range(3)] == [30, 75, 120]


@pytest.mark.parametrize(
    "workload", ["0x100", *(pytest.param(name, marks=pytest.mark.slow) for name in ("64", "x5", "axb", "2x50-grow"))]
)
def test_workloads_that_are_wrong(workload):
    result = run("--workload", workload)
    assert result.returncode != 0
    assert "give requests x cached tokens" in result.stderr


@pytest.mark.slow
def test_texts_too_short_to_be_timed():
    result = run("--workload", "2x50", "--new-tokens", "20", "--engine", "plain")
    assert result.returncode != 0
    assert "give more than 20 new tokens" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("cut", range(5))
def test_bursts_do_not_bias_the_clock(cut):
    """Two requests that get 5 tokens together every fifth iteration of a second, whenever the clock begins."""
    load = Load(prompts=[[1]] * 2, new_tokens=100, temperature=0.0, seed=1)
    clock = Clock(load)
    for iteration in range(cut, 5 * 19 + cut):
        if iteration % 5 == 0:
            for index in range(2):
                clock.came(index, 5, iteration, float(iteration))
    assert clock.tokens_per_second() == pytest.approx(2.0)
    assert clock.seconds_per_iteration() == pytest.approx(1.0)
    with pytest.raises(TooShortError, match="all 2 requests decode"):
        Clock(load).tokens_per_second()


@pytest.mark.parametrize("first", [0, 7])
def test_requests_are_timed_apart(first):
    """Bursts of 4, 5 and 6 tokens every fifth second, at times of their own."""
    clock = Clock(Load(prompts=[[1]] * 3, new_tokens=100, temperature=0.0, seed=1))
    for now in range(first, 90 + first):
        for index, tokens in enumerate((4, 5, 6)):
            if now % 5 == 2 * index % 5:
                clock.came(index, tokens, now, float(now))
    assert clock.tokens_per_second() == pytest.approx(3.0)


def test_the_clock_of_a_batch_that_drains():
    load = Load(prompts=[[1]] * 2, new_tokens=400, temperature=0.0, seed=1, drains=True)
    clock = Clock(load)
    for now in range(400):
        for index in range(2):
            if now < load.new_tokens_of(index):
                clock.came(index, 1, now, float(now))
    assert clock.tokens_per_second() == pytest.approx((100 + 400 - 2 * 17) / 382, rel=0.01)
    late = Clock(load)
    for index, tokens in ((0, 100), (1, 16)):
        late.came(index, tokens, 1, 1.0)
    with pytest.raises(TooShortError, match="give more than 400 new tokens"):
        late.came(1, 1, 2, 2.0)


def test_a_difference_of_two_runs_that_is_only_noise():
    load = Load(prompts=[[1]], new_tokens=50, temperature=0.0, seed=1)
    with pytest.raises(TooShortError, match=r"50 new tokens took 0\.1. s and 10 of them 0\.1. s"):
        _difference(lambda new_tokens: time.sleep(0.1), load)
    measured = _difference(lambda new_tokens: time.sleep(0.01 * new_tokens), load)
    assert measured.ms_per_iteration == pytest.approx(10, rel=0.5)


def test_recorded_traces_are_unfinished_searches_of_that_length():
    class Words:
        def convert_tokens_to_ids(self, tokens):
            return tokens

    traces = recorded_traces(Words(), 3, 700)
    assert [len(trace) for trace in traces] == [700] * 3
    assert len({tuple(trace) for trace in traces}) == 3
    assert not any("answer" in trace for trace in traces)


def test_a_large_shape_without_a_gpu_is_refused() -> None:
    with pytest.raises(SystemExit, match="Qwen3-8B takes a GPU, got --device cpu"):
        load_model("Qwen3-8B", "cpu")
