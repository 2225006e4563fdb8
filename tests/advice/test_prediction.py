"""Predicted times: against what was measured on an H200, against the formulas by hand, and in their order."""

import dataclasses
import json
import math
import re
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, Llama4TextConfig, Qwen3Config, Qwen3MoeConfig

from sparsespec_compile.advice.ceilings import H200, Ceilings, ceilings_of
from sparsespec_compile.advice.config_cost import config_cost
from sparsespec_compile.advice.prediction import (
    OVERHEAD,
    DraftCost,
    draft_cost,
    iteration_time,
    iterations_of,
    predict,
    predict_cycle,
    predict_mean,
)
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import CeilingsError, CostModelError
from sparsespec_compile.passes.cost.terms import Iteration, attention, collect
from sparsespec_compile.runtime.device.drafters import Cycle, PillarDrafter, cycles_of
from sparsespec_compile.runtime.device.graphs import padded, row_counts
from sparsespec_compile.runtime.host.phases import phases_in_use

QWEN3_8B = Qwen3Config(
    hidden_size=4096,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    max_position_embeddings=40960,
    dtype=torch.bfloat16,
)
EMBEDDING_BYTES = 151936 * 4096 * 2
CALM = dataclasses.replace(H200, flops_per_s=1e30, attention_flops_per_s=1e30)
"""A device that computes in no time."""
COST = config_cost(QWEN3_8B, torch.bfloat16)


def cycle_of(drafts, budget=None):
    config = SpecConfig() if budget is None else SpecConfig(min_budget=budget, budget_ratio=1e-9)
    return Cycle(PillarDrafter(config), drafts, drafts)


def time(batch, length, k=0, budget=128):
    return predict_mean(COST, iterations_of(cycle_of(k, budget), batch, length), H200)


def test_counts_of_qwen3_8b():
    weights = 36 * 4096 * (6144 + 4096 + 3 * 12288) + 4096 * 151936
    assert COST.term("projections").bytes + COST.term("output projection").bytes == 2 * weights
    assert 2 * weights + EMBEDDING_BYTES == pytest.approx(2 * 8.19e9, rel=1e-3)
    assert COST.term("KV written").bytes.coeff(COST.term("KV written").bytes.free_symbols.pop()) == 147_456


def test_the_speed_of_light_of_a_cycle():
    """64 x 8,192, k = 8, s = 5% of the cache: (W + R c L) / B plain, (W + R c L (k s + 1) / (k + 1)) / B speculative.

    An iteration yields R and R (a + 1) / (k + 1) tokens. W there holds the embedding table too, which an iteration does
    not read; writing and scores are left out there.
    """
    all_weights, token, ceiling = 16.4e9, 147_456, 4.3e12
    plain = (all_weights + 64 * token * 8192) / ceiling
    speculative = (all_weights + 64 * token * 8192 * (8 * 0.05 + 1) / 9) / ceiling
    assert plain == pytest.approx(21.8e-3, rel=5e-3)
    assert speculative == pytest.approx(6.6e-3, rel=5e-3)
    table = EMBEDDING_BYTES / ceiling
    assert time(64, 8192).light_seconds + table == pytest.approx(plain, rel=5e-3)
    assert time(64, 8192, 8, 410).light_seconds + table == pytest.approx(speculative, rel=2e-2)
    speedup = (6.16 + 1) / 9 * time(64, 8192).light_seconds / time(64, 8192, 8, 410).light_seconds
    assert speedup == pytest.approx(2.6, rel=4e-2)


@pytest.mark.parametrize(
    ("batch", "length", "milliseconds"),
    [(64, 1024, 8.31), (64, 8192, 24.06), (32, 16384, 24.25), (128, 4096, 25.79), (1, 8192, 5.46)],
)
def test_plain_steps_of_another_engine_are_predicted(batch, length, milliseconds):
    """vLLM 0.22.1, Qwen3-8B in bf16 on one H200: none of these was used to fit the constants."""
    assert time(batch, length).seconds * 1e3 == pytest.approx(milliseconds, rel=0.1)


def measured() -> list[tuple[int, int, int, float]]:
    """(requests, cached tokens, drafts, milliseconds) of this engine, grouped, with exact weights, on an H200."""
    results = Path(__file__).parents[2] / "benchmarks/results"
    before, now = (json.loads((results / f"h200-throughput{name}.json").read_text()) for name in ("-77ea47f", ""))
    exact = [row for row in now if row["engine"] == "plain" or row["settings"].get("draft_weights") == "exact"]
    points = []
    for row in [*before, *exact]:
        shape, size = row["workload"].split()
        drafts = row["settings"].get("draft_tokens", 0 if row["engine"] == "plain" else "auto")
        steady = shape == "Qwen3-8B" and re.fullmatch(r"\d+x\d+", size) and row["engine"] in ("plain", "sparsespec")
        if steady and drafts != "auto" and row["settings"].get("schedule", "grouped") == "grouped":
            requests, length = map(int, size.split("x"))
            points.append((requests, length, drafts, row["ms_per_iteration"]))
    return points


@pytest.mark.parametrize(("batch", "length", "k", "milliseconds"), measured())
def test_measured_iterations_are_predicted(batch, length, k, milliseconds):
    """Constants are fitted to none of them. While the clock ran texts were longer by half of the new tokens."""
    now = length + 128
    budget = max(128, math.ceil(0.05 * now))
    assert time(batch, now, k, budget).seconds * 1e3 == pytest.approx(milliseconds, rel=0.2)


def test_cycles_with_fp8_copies_are_predicted():
    """Fixed settings, with and without proposals: what "auto" starts from. Overhead and overlap are fitted to these."""
    results = Path(__file__).parents[2] / "benchmarks/results/h200-throughput.json"
    copies = draft_cost(config_cost(QWEN3_8B, torch.bfloat16, draft_weights=True), "fp8")
    seconds = iteration_time(COST, "grouped", H200, copies, partial(padded, sizes=row_counts(4096)))
    ratios = []
    for row in json.loads(results.read_text()):
        size = re.fullmatch(r"Qwen3-8B (\d+)x(\d+)", row["workload"])
        if size and "draft_tokens" in row["settings"]:
            (kind,) = cycles_of(SpecConfig(**row["settings"]))
            requests, length = map(int, size.groups())
            ratios.append(row["ms_per_iteration"] / 1e3 / float(seconds([kind], length + 96, requests)[0]))
    assert len(ratios) > 8
    assert 0.88 < min(ratios) < max(ratios) < 1.06
    assert 0.95 < statistics.median(ratios) < 1.0
    assert statistics.pstdev(map(math.log, ratios)) < 0.05


@pytest.mark.parametrize(
    ("name", "drafting", "verifying", "length", "k"),
    [
        ("decode 64 x 8192", 0, 64, 8192, 0),
        ("decode 8 x 32768", 0, 8, 32768, 0),
        ("verify 64 x 8192, scored", 0, 64, 8192, 8),
        ("draft 57 x 410 of 8192", 57, 0, 8192, 8),
        ("mixed, scored", 57, 7, 8192, 8),
        ("mixed 48 drafts + 16 verify, scored", 48, 16, 8192, 8),
    ],
)
def test_measured_attention_is_predicted(name, drafting, verifying, length, k):
    """One layer of Qwen3-8B on an H200; drafts read 410 positions in all. Constants are fitted to these."""
    results = json.loads((Path(__file__).parents[2] / "benchmarks/results/h200-kernels.json").read_text())
    milliseconds = next(case["ms"] for case in results["cases"] if case["name"] == name)
    layer = collect(attention(q_heads=32, kv_heads=8, key_dim=128, value_dim=128, window=0, itemsize=2))
    rows = drafting + verifying * (k + 1)
    iteration = Iteration(rows, rows, drafting, verifying, length, k, budget=410 - k - 1)
    times = {term.name: term.seconds for term in predict(layer, iteration, H200).terms}
    seconds = times["draft attention"] + times["verify attention"] + times[OVERHEAD]
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.07)  # cards differ by 2%


def test_a_prediction_is_the_sum_of_its_terms():
    iteration = Iteration(rows=128, kept=128, drafting=56, verifying=8, length=8192, draft_tokens=8, budget=410)
    got = predict(COST, iteration, H200)
    assert got.seconds == pytest.approx(sum(term.seconds for term in got.terms))
    times = {term.name: term.seconds for term in got.terms}
    weights, flops = float(COST.term("projections").bytes), 128 * float(COST.term("projections").bytes)
    assert times["projections"] == pytest.approx(((weights / 4.3e12) ** 3 + (flops / 673e12) ** 3) ** (1 / 3))
    drafted = 56 * (410 * 1152 + 419 * 147_456)
    assert times["draft attention"] == pytest.approx(math.hypot(drafted / 3.8e12, 56 * 419 * 589_824 / 500e12))
    assert times[OVERHEAD] == pytest.approx(145 * 9.5e-6 + 36 * (6e-6 + 64 * 0.05e-6 + 20e-6))
    assert got.dominating.name == "projections"
    assert got.light_seconds == pytest.approx(sum(term.bytes for term in got.terms) / 4.3e12)
    assert got.roofline_share == got.light_seconds / got.seconds


def test_light_is_that_of_flops_where_they_take_longer():
    iteration = Iteration(rows=4096, kept=4096, drafting=0, verifying=0, length=0, draft_tokens=0, budget=0)
    got = predict(COST, iteration, H200)
    assert got.light_seconds == pytest.approx(sum(term.flops for term in got.terms) / 673e12)


@pytest.mark.parametrize(("q_heads", "most"), [(8, 63), (24, 20), (32, 15), (40, 11), (64, 7), (71 * 8, 0)])
def test_one_draft_more_than_a_tile_holds_reads_every_cache_again(q_heads, most):
    layer = collect(attention(q_heads=q_heads, kv_heads=8, key_dim=128, value_dim=128, window=0, itemsize=2))

    def verify(k):
        got = predict(layer, Iteration(k + 1, k + 1, 0, verifying=1, length=8192, draft_tokens=k, budget=0), CALM)
        return next(term.seconds for term in got.terms if term.name == "verify attention"), got.light_seconds

    once = verify(0)[0]
    for k in range(65):
        assert verify(k)[0] == pytest.approx(once * (k // (most + 1) + 1))
        assert verify(k)[1] < 1.2 * verify(0)[1]


def test_more_work_takes_longer():
    base = {"batch": 32, "length": 4096, "k": 4, "budget": 256}
    shortest = time(**base)
    for name in ("batch", "length", "budget"):
        longer = time(**{**base, name: base[name] * 2})
        assert longer.seconds > shortest.seconds
        assert longer.light_seconds > shortest.light_seconds
    assert time(32, 4096).seconds > shortest.seconds, "a plain iteration reads every cache"


@pytest.mark.parametrize("schedule", ["grouped", "balanced"])
@pytest.mark.parametrize(("batch", "k"), [(64, 8), (1, 4), (9, 8), (5, 0), (7, 16), (300, 8)])
def test_the_phases_of_a_cycle(batch, k, schedule):
    """Over the k + 1 iterations each request verifies once and drafts in all others."""
    mix = iterations_of(cycle_of(k), batch, 100, schedule)
    assert sum(share for share, _ in mix) == pytest.approx(1)
    assert sum(share * part.verifying for share, part in mix) * (k + 1) == pytest.approx(batch)
    assert sum(share * part.rows for share, part in mix) * (k + 1) == pytest.approx(batch * (2 * k + 1))
    for _, part in mix:
        assert part.drafting + part.verifying == batch
        assert part.rows == part.kept == part.drafting + part.verifying * (k + 1)
    verifying = [part.verifying for _, part in mix if part.verifying or schedule == "balanced"]
    assert max(verifying) - min(verifying) <= 1


def one_by_one(seconds):
    """Of one cycle at a time."""
    return lambda cycle, length, requests: float(seconds([cycle], length, requests)[0])


@pytest.mark.parametrize("drafts", [None, "int8", "fp8"])
@pytest.mark.parametrize(("length", "requests"), [(0, 1), (40, 3), (8192, 64), (14000.5, 48), (3000, 300)])
def test_many_cycles_at_once_take_what_each_of_them_does(drafts, length, requests):
    """Some read no scores, some have proposals, and iterations of nothing but drafts may be too large for copies."""
    copies = drafts and draft_cost(config_cost(QWEN3_8B, torch.bfloat16, draft_weights=True), drafts)
    cycles, as_run = cycles_of(SpecConfig()), partial(padded, sizes=row_counts(4096))
    together = iteration_time(COST, "grouped", H200, copies, as_run)(cycles, length, requests)
    alone = [predict_cycle(COST, one, "grouped", length, requests, H200, copies, as_run).seconds for one in cycles]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("family", [Gemma3TextConfig, Llama4TextConfig, Qwen3MoeConfig], ids=lambda kind: kind.__name__)
def test_windows_chunks_and_experts_are_predicted_at_once(family):
    cost, cycles = config_cost(family(num_hidden_layers=6), torch.bfloat16), cycles_of(SpecConfig())
    for length in (100, 9000):
        together = iteration_time(cost, "grouped", H200)(cycles, length, 64)
        alone = [predict_cycle(cost, one, "grouped", length, 64, H200).seconds for one in cycles]
        assert together.tolist() == pytest.approx(alone, rel=1e-12)


def test_iterations_of_every_number_of_drafts_take_what_was_predicted():
    """`benchmarks/iteration_times.py` on an H200: 0 to 12 drafts, eight sizes of a batch.

    With kernels before those that the constants are fitted to, whose drafts and plain decoding took longer.
    """
    rows = json.loads((Path(__file__).parents[2] / "benchmarks/results/h200-iteration-times.json").read_text())["rows"]
    cycles = cycles_of(SpecConfig(draft_tokens="auto", drafter="pillar"))
    predicted = iteration_time(COST, "grouped", H200)
    ratios = [row["seconds"] / predicted(cycles, row["length"], row["requests"])[row["draft_tokens"]] for row in rows]
    assert len(ratios) == 8 * 13
    assert 1 / 1.2 < min(ratios) < max(ratios) < 1.3
    assert 1.0 < statistics.median(ratios) < 1.15


def test_requests_verify_in_groups():
    """80 of them by three phases, 26 or 27 in each."""
    used = phases_in_use("grouped", cycle_of(8), 80)
    together = Counter(len(range(nth, 80, used)) for nth in range(used))
    assert len(together) == 2
    shares = {part.verifying: share * 9 for share, part in iterations_of(cycle_of(8), 80, 8192)}
    assert shares == pytest.approx({0: 9 - used, **together})
    assert len(iterations_of(cycle_of(8), 80, 8192, "balanced")) == 2


def test_the_time_is_that_of_the_schedule_and_the_drafter():
    def seconds(**settings):
        config = SpecConfig(draft_tokens=8, **settings)
        return iteration_time(COST, config.schedule, H200)(cycles_of(config), 8192, 64)[-1]

    assert seconds(schedule="balanced") > seconds()
    assert seconds(drafter="window") < seconds()


def test_scores_count_where_somebody_reads_them():
    def names(drafter):
        (kind,) = cycles_of(SpecConfig(draft_tokens=4, drafter=drafter))
        return [term.name for term in predict_cycle(COST, kind, "grouped", 8192, 64, H200).terms]

    assert "scores" in names("pillar")
    assert "scores" not in names("ngram") + names("window") + names("full")


def test_iterations_of_nothing_but_drafts_may_cost_something_else():
    """Of 9 iterations of 64 requests, those in which none verifies hold drafts alone."""
    alone = (9 - phases_in_use("grouped", cycle_of(8), 64)) / 9
    half = config_cost(QWEN3_8B, torch.bfloat16, draft_weights=True)
    drafting, parts = iterations_of(cycle_of(8), 64, 8192)[0][1], iterations_of(cycle_of(8), 64, 8192)
    fp8, int8 = DraftCost(half, 256), DraftCost(half, 64)
    saved = predict_mean(COST, parts, H200).seconds - predict_mean(COST, parts, H200, fp8).seconds
    assert saved == pytest.approx(
        alone * (predict(COST, drafting, H200).seconds - predict(half, drafting, H200).seconds)
    )
    kind = cycles_of(SpecConfig(draft_tokens=8))[-1]
    plain = cycles_of(SpecConfig(draft_tokens=0))[-1]
    exact, cheap, less = (one_by_one(iteration_time(COST, "grouped", H200, drafts)) for drafts in (None, fp8, int8))
    assert exact(kind, 8192, 64) - cheap(kind, 8192, 64) == pytest.approx(saved, rel=1e-3)
    assert exact(plain, 8192, 64) == cheap(plain, 8192, 64)
    assert exact(kind, 8192, 300) == cheap(kind, 8192, 300), "rows beyond which 8 bits save nothing"
    assert less(kind, 8192, 64) == cheap(kind, 8192, 64)
    assert exact(kind, 8192, 100) == less(kind, 8192, 100) > cheap(kind, 8192, 100), "of either kind"


def test_rows_that_graphs_are_padded_to_are_computed():
    """At 51 requests cycles of 3 and of 4 n-grams take much the same: both run the graph of 256 rows."""
    by_drafts = {kind.drafts: kind for kind in cycles_of(SpecConfig()) if kind.drafter.name == "ngram"}
    sizes = row_counts(1000)
    assert [padded(rows, sizes) for rows in (1, 64, 65, 193, 256, 257, 5000)] == [2, 64, 128, 256, 256, 320, 1000]
    exact, as_run = (
        one_by_one(iteration_time(COST, "grouped", H200, padded=rows)) for rows in (None, partial(padded, sizes=sizes))
    )
    assert exact(by_drafts[3], 1024, 51) < 0.95 * exact(by_drafts[4], 1024, 51)
    assert as_run(by_drafts[3], 1024, 51) == pytest.approx(as_run(by_drafts[4], 1024, 51), rel=0.02)
    assert as_run(by_drafts[3], 1024, 64) == exact(by_drafts[3], 1024, 64)


def test_a_mean_weighs_its_parts():
    parts = iterations_of(cycle_of(1), 1, 1000)
    singles = [predict(COST, part, H200) for _, part in parts]
    mean = predict_mean(COST, parts, H200)
    assert mean.seconds == pytest.approx(sum(single.seconds for single in singles) / 2)
    assert mean.seconds == pytest.approx(sum(term.seconds for term in mean.terms))


def test_devices_are_found_by_name():
    assert ceilings_of("H200") is ceilings_of("NVIDIA H200 SXM") is ceilings_of(H200) is H200
    for unknown in ("cpu", torch.device("cpu"), "MI300X"):
        with pytest.raises(CeilingsError, match=r"No ceilings are known.*NVIDIA H200, .* or a Ceilings"):
            ceilings_of(unknown)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True, "fast"])
def test_impossible_ceilings_are_refused(value):
    with pytest.raises(CeilingsError, match=r"read_bytes_per_s must be a finite positive number"):
        dataclasses.replace(H200, read_bytes_per_s=value)
    assert isinstance(dataclasses.replace(H200, gemm_overhead_s=0.0), Ceilings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "jamba"}, "model type 'jamba'.*Allowed: .*qwen3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_unknown_configurations_are_refused(changes, message):
    config = Qwen3Config.from_dict(QWEN3_8B.to_dict())
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(CostModelError, match=message):
        config_cost(config, torch.bfloat16)


def test_a_dtype_is_needed():
    with pytest.raises(CostModelError, match=r"The dtype is None. Set config\.dtype"):
        config_cost(QWEN3_8B, None)
