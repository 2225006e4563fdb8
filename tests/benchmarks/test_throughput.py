"""The throughput benchmark end to end, on a CPU, with the Countdown model at its own size."""

import argparse
import importlib.machinery
import json
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import ContinuousBatchingConfig

import sparsespec_compile as ss
from sparsespec_compile.runtime.host.stats import CycleStats
from tests.support.models import tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import throughput_peers  # noqa: E402
from decoding_clock import Clock, TooShortError  # noqa: E402
from report import FIELDS  # noqa: E402
from throughput import groups, load_model, loads, settings, settings_of, workloads  # noqa: E402
from throughput_ours import Ours, draft_weights, drafts_right  # noqa: E402
from throughput_peers import PeerFailedError, _difference, hf_batch, hf_batch_settings, vllm  # noqa: E402
from traces import recorded_traces  # noqa: E402
from workloads import Load, workload  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), "--shape", "countdown", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_engines_run_on_the_same_texts(tmp_path):
    file = tmp_path / "throughput.json"
    engines = ("--engine", "plain", "sparsespec", "hf-generate", "vllm")
    asked = (
        "--workload",
        "3x120",
        "3x120@0.5",
        "--settings",
        "3x120:draft_tokens=8",
        "3x120@0.5:draft_tokens=8",
        "--new-tokens",
        "60",
        "--runs",
        "2",
    )
    result = run(*asked, *engines, "--checkpoint", str(tmp_path), "--json", str(file))
    assert result.returncode != 0
    assert "vllm needs --checkpoint" in result.stderr
    rows = json.loads(file.read_text())
    kinds = [("plain", 1), ("sparsespec", 1), ("sparsespec", 0.5), ("hf-generate", 1)]
    assert [(row["engine"], row["right"]) for row in rows] == kinds
    for row in rows:
        assert set(FIELDS) <= row.keys()
        assert row["workload"] == "countdown 3x120"
        assert row["tokens_per_second"] > 0
    plain, ours, spoiled, peer = rows
    assert (plain["kv_bytes_share"], plain["choice"], plain["drafts_right"]) == (1, "none 0", None)
    assert (ours["choice"], ours["drafts_per_cycle"], len(ours["runs"])) == ("pillar 8", 8, 2)
    assert ours["accepted_per_cycle"] > 5
    assert ours["drafts_right"] > 0.9
    assert ours["equal_to_plain"] == spoiled["equal_to_plain"] == 1
    assert 0.3 < spoiled["drafts_right"] < 0.7
    assert spoiled["accepted_per_cycle"] < 3
    assert peer["runs"] == []


@pytest.mark.slow
def test_a_batch_that_drains_is_timed_to_its_end(tmp_path):
    file = tmp_path / "throughput.json"
    engines = ("--engine", "plain", "sparsespec", "hf-generate", "--settings", "draft_tokens=4")
    result = run("--workload", "3x60+120-drain", *engines, "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "hf-generate skipped" in result.stdout
    rows = json.loads(file.read_text())
    assert [row["settings"]["draft_tokens"] for row in rows] == [0, 4]
    for row in rows:
        assert row["workload"] == "countdown 3x60+120-drain"
    plain = rows[0]
    assert plain["tokens_per_iteration"] < 2.5  # of texts of 30, 75 and 120 tokens
    load = Load(prompts=[[1]] * 3, new_tokens=120, temperature=0.0, seed=1, drains=True)
    assert [load.new_tokens_of(i) for i in range(3)] == [30, 75, 120]


def test_workloads_as_they_are_written():
    assert (workload("64x8192").new_tokens, workload("64x8192+96").new_tokens) == (256, 96)
    growing = workload("64x50+2950@0.87")
    assert (growing.requests, growing.length, growing.new_tokens, growing.right) == (64, 50, 2950, 0.87)
    assert (growing.name, growing.base, growing.drains) == ("64x50+2950@0.87", "64x50+2950", False)
    draining = workload("64x4096-drain", new_tokens=768)
    assert (draining.new_tokens, draining.drains, draining.name) == (768, True, "64x4096-drain")
    assert workload("2x50@1").name == "2x50"


@pytest.mark.parametrize("name", ["0x100", "64", "x5", "axb", "2x50-grow", "2x50@1.5", "2x50@0.9-drain", "2x50+0"])
def test_workloads_that_are_wrong(name):
    with pytest.raises(SystemExit, match="give requests x cached tokens"):
        workload(name)


def test_shares_are_for_workloads_without_one_of_their_own():
    arguments = argparse.Namespace(workload=["2x50", "3x50@0.5"], right=[1.0, 0.9], new_tokens=10)
    assert [one.name for one in workloads(arguments)] == ["2x50", "2x50@0.9", "3x50@0.5"]
    with pytest.raises(SystemExit, match="give shares from 0 to 1"):
        workloads(argparse.Namespace(workload=["2x50"], right=[1.1], new_tokens=10))


def test_settings_are_fields_of_the_configuration():
    assert settings("default") == {}
    assert settings("draft_tokens=8,drafter=ngram,overlap=false") == {
        "draft_tokens": 8,
        "drafter": "ngram",
        "overlap": False,
    }
    for text, message in (("8", "name=value"), ("draft_token=8", "unknown setting"), ("draft_tokens=-1", "from 0")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            settings(text)
    assert settings_of("64x8192@0.9:draft_tokens=8") == ("64x8192@0.9", {"draft_tokens": 8})
    assert settings_of("default") == (None, {})


def test_workloads_share_prompts_and_a_pool_as_far_as_it_holds_them():
    class Words:
        def convert_tokens_to_ids(self, tokens):
            return list(tokens)

    asked = [workload(name, 16) for name in ("4x100", "2x100@0.9", "2x164", "4x50")]
    given = loads(asked, Words(), argparse.Namespace(seed=1, temperature=0.6))
    assert given[asked[1]].prompts == given[asked[0]].prompts[:2]
    one, two = groups(asked, given, pool_tokens=1750)
    assert one.workloads == tuple(asked[:2])
    assert one.pool_tokens == 16 * 4 * (7 + 7 + 8)  # of 100 tokens, and of the 112 of the run before the clock
    assert (two.most_requests, two.longest) == (4, 180)
    assert len(list(groups(asked, given, pool_tokens=10_000))) == 1
    assert len(list(groups(asked, given, pool_tokens=1))) == 4


def test_one_compiled_model_serves_all_settings_and_workloads():
    """Random weights and prompts; "full" drafts are right but for those that are spoiled."""
    model = tiny("qwen3")
    texts = [prompt.tolist() for prompt in torch.randint(2, 90, (3, 80), generator=torch.Generator().manual_seed(1))]
    asked = [workload("3x80+60"), workload("3x80+60@0.5")]
    given = {one: Load(texts, one.new_tokens, temperature=0.6, seed=1) for one in asked}
    (group,) = groups(asked, given, pool_tokens=10_000)
    full = {"drafter": "full", "draft_tokens": 4, "draft_weights": "int8"}
    ours = Ours(model, [{"draft_tokens": 0}, full], requests=3)
    ours.start({"draft_tokens": 0}, group, spoiled=False)
    plain = ours.measure(asked[0], group, runs=2, seconds=60, idle=False)
    ours.start(full, group, spoiled=True)
    spoiled = ours.measure(asked[1], group, runs=3, seconds=0, idle=False)
    assert plain.texts == spoiled.texts
    assert (plain.choice, spoiled.choice, spoiled.choice_share) == ("none 0", "full 4", 1.0)
    assert (len(plain.runs), len(spoiled.runs)) == (2, 1)
    assert plain.drafts_right is None
    assert 0.2 < spoiled.drafts_right < 0.75
    assert ours._fast.stats.draft_weight_iterations > 0  # spoiled as well
    with pytest.raises(SystemExit, match="must be alike in one run"):
        Ours(model, [{"page_size": 16}, {"page_size": 8}], requests=3)


def test_engines_of_one_run_share_copies_of_the_weights():
    plain, ngram, exact = {"draft_tokens": 0}, {"drafter": "ngram", "draft_tokens": 3}, {"draft_weights": "exact"}
    assert draft_weights([plain, ngram, exact]) == "exact"
    assert draft_weights([plain, exact, {"draft_weights": "fp8"}]) == "fp8"
    assert draft_weights([plain, {}, exact]) == "auto"
    for kind in ("int8", "fp8"):  # what "auto" takes depends on the device: a row must not name another kind
        with pytest.raises(SystemExit, match="must be exact or alike"):
            draft_weights([{}, {"draft_weights": kind}])


def test_the_rate_of_right_drafts_counts_those_that_were_judged():
    """Of 4 drafts: 10 cycles judge the first, those that got so far the next."""
    stats = ss.Stats(4)
    assert drafts_right(stats) is None
    stats.by_cycle["pillar", 4] = CycleStats(10, [9, 6, 6, 3])
    stats.by_cycle["none", 0] = CycleStats(5, [])
    assert drafts_right(stats) == (9 + 6 + 6 + 3) / (10 + 9 + 6 + 6)


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


def test_transformers_continuous_batching_runs_as_its_guide_recommends(monkeypatch):
    """The arguments exist in this transformers, texts come whole, and the model stays as before."""
    gpu = torch.device("cuda")
    load = Load(prompts=[[5, 6, 7], [8] * 9], new_tokens=20, temperature=0.6, seed=1)
    asked = hf_batch_settings(gpu, load)
    assert asked["use_cuda_graph"]
    assert asked["use_async_batching"]
    assert (asked["default_compile_level"], asked["max_batch_tokens"]) == (3, 16384)
    ContinuousBatchingConfig(**{name: value for name, value in asked.items() if name != "attention"})
    model = tiny("llama", num_hidden_layers=1)
    settings = hf_batch_settings(model.device, load)
    before = model.config._attn_implementation
    runs = []

    def difference(run, load):  # without the clock, which a busy machine would upset
        runs.extend(run(new_tokens) for new_tokens in (load.short, load.new_tokens))

    monkeypatch.setattr(throughput_peers, "_difference", difference)
    hf_batch(model, load, settings)
    assert len(runs) == 2
    assert model.config._attn_implementation == before
    monkeypatch.setattr(model, "generate_batch", lambda **_: {})  # as where its thread has died
    with pytest.raises(PeerFailedError, match=r"hf-batch wrote 0 of 2 texts"):
        hf_batch(model, load, settings)


def test_vllm_is_asked_for_what_its_guides_recommend(monkeypatch):
    """Without vLLM: what it would be called with, in versions that have asynchronous scheduling and in others."""
    calls = []

    @dataclass
    class EngineArgs:
        max_num_batched_tokens: int = 0
        enforce_eager: bool = True
        async_scheduling: bool = False
        speculative_config: dict | None = None

    class LLM:
        def __init__(self, folder, **settings):
            calls.append(settings)

        def generate(self, prompts, sampling, use_tqdm):
            time.sleep(0.002 * sampling[0]["max_tokens"])

    fake = types.ModuleType("vllm")
    fake.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    fake.LLM, fake.EngineArgs, fake.SamplingParams, fake.TokensPrompt = LLM, EngineArgs, dict, dict
    monkeypatch.setitem(sys.modules, "vllm", fake)
    load = Load(prompts=[[5, 6, 7]], new_tokens=50, temperature=0.6, seed=1)
    for ngram in (False, True):
        assert vllm(None, load, {"checkpoint": "folder", "ngram": ngram}).tokens_per_second > 0
    plain, drafting = calls
    assert (plain["async_scheduling"], plain["enforce_eager"], plain["max_model_len"]) == (True, False, 53)
    assert "enable_prefix_caching" not in plain
    assert "speculative_config" not in plain
    assert drafting["speculative_config"]["method"] == "ngram"
    assert "async_scheduling" not in drafting
