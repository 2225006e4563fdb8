"""Advice and explanations: when speculation pays, what is refused, what is printed."""

import pytest
import torch
from transformers import LlamaConfig

import sparsespec_compile as ss
from sparsespec_compile.advice.advise import advise
from sparsespec_compile.advice.workload import accepted
from sparsespec_compile.errors import AdviceError, CeilingsError, ConfigError, ContextLengthWarning, CostModelError

from ..support.models import tiny

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
    dtype=torch.bfloat16,
)


def advice(lengths=8192, batch=64, acceptance=0.9, **changes):
    return advise(changes.get("model", LLAMA_8B), changes.get("device", "H200"), lengths, batch, acceptance)


def test_speculation_pays_for_long_contexts():
    got = advice()
    assert got.speculate
    assert 1.3 < got.speedup < got.light_speedup < 3.0
    assert got.best is got.speculative
    assert got.config() == ss.SpecConfig(draft_tokens=got.best.draft_tokens, budget_ratio=0.05)
    assert got.best.budget == 410
    assert got.best.accepted == pytest.approx(sum(0.9**i for i in range(1, got.best.draft_tokens + 1)))


@pytest.mark.parametrize(
    "case",
    [
        {"lengths": 256},
        {"lengths": 512, "batch": 256},
        {"lengths": 2048, "batch": 1},
        {"acceptance": 0.0},
        {"acceptance": 0.1},
    ],
    ids=str,
)
def test_it_does_not_for_short_contexts_or_bad_drafts(case):
    got = advice(**case)
    assert not got.speculate
    assert got.speedup < 1
    assert got.best is got.plain
    assert got.config().draft_tokens == 0
    assert str(got).startswith("Do not speculate")


def test_short_contexts_lose_whatever_the_batch():
    """There is little to read, and rows stop being free where a batch would make up for giving out scores."""
    assert all(advice(512, batch, 0.9).speedup < 0.95 for batch in (16, 64, 128, 256, 512))


def test_better_acceptance_and_longer_contexts_pay_more():
    by_acceptance = [advice(acceptance=p).speedup for p in (0.0, 0.3, 0.6, 0.9, 0.99)]
    assert by_acceptance == sorted(by_acceptance)
    by_length = [advice(length).speedup for length in (512, 2048, 8192, 32768, 131072)]
    assert by_length == sorted(by_length)
    lengths_of_cycles = [advice(acceptance=p).speculative.draft_tokens for p in (0.3, 0.6, 0.9, 0.99)]
    assert lengths_of_cycles == sorted(lengths_of_cycles)
    assert lengths_of_cycles[0] < lengths_of_cycles[-1]


def test_drafts_beyond_what_a_tile_holds_are_weighed():
    """8 query heads to a KV head: a verification of 9 rows reads the cache twice, so 7 drafts are where to stop."""
    model = LlamaConfig.from_dict({**LLAMA_8B.to_dict(), "num_attention_heads": 64, "head_dim": 128})
    assert advice(32768, acceptance=0.97).speculative.draft_tokens > 8
    assert advice(32768, acceptance=0.97, model=model).speculative.draft_tokens == 7


def test_break_even_is_where_it_begins_to_pay():
    length = advice().break_even_length
    assert advice(length).speculate
    assert not advice(length - 1).speculate
    assert advice(acceptance=0.0).break_even_length is None
    assert advice(acceptance=0.6).break_even_length > length


def test_lengths_count_by_their_mean():
    assert advice([4096, 12288]).speedup == advice(8192).speedup


def test_the_budget_is_chosen_among_those_with_an_acceptance():
    better = advice(acceptance={0.02: 0.5, 0.05: 0.9})
    assert better.speculative.budget_ratio == 0.05
    assert advice(acceptance={0.02: 0.9, 0.05: 0.9}).speculative.budget_ratio == 0.02
    assert advice(acceptance={0.02: 0.9, 0.05: 0.9}).config().budget_ratio == 0.02


def test_a_function_of_k_is_taken_as_it_is():
    got = advice(acceptance=lambda k: min(k, 3.0))
    assert got.speculative.draft_tokens == 3
    assert got.speculative.accepted == 3.0


@pytest.mark.parametrize(("p", "k", "mean"), [(0.5, 3, 0.875), (1.0, 4, 4.0), (0.0, 4, 0.0), (0.9, 0, 0.0)])
def test_accepted_drafts_of_a_cycle(p, k, mean):
    assert accepted(p, k) == pytest.approx(mean)


def test_a_model_gives_what_its_configuration_gives():
    model = tiny("llama")
    model.config.dtype = torch.float32
    single = advise(model, "H200", 100, 4, 0.9)
    assert single == advise(model.config, "H200", 100, 4, 0.9)
    half = advise(model.bfloat16(), "H200", 100, 4, 0.9)
    assert half.plain.light_tokens_per_second == pytest.approx(2 * single.plain.light_tokens_per_second, rel=1e-9)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ({"lengths": 0}, AdviceError, "lengths must be"),
        ({"lengths": []}, AdviceError, "lengths must be"),
        ({"lengths": [10, 2.5]}, AdviceError, "lengths must be"),
        ({"lengths": 8192.0}, AdviceError, "lengths must be"),
        ({"lengths": None}, AdviceError, "lengths must be"),
        ({"lengths": 10**7}, AdviceError, "10,000,000 tokens on average, and the model has"),
        ({"batch": 0}, AdviceError, "batch must be a positive integer, got 0"),
        ({"batch": True}, AdviceError, "batch must be"),
        ({"acceptance": 1.5}, AdviceError, "a probability in .0, 1."),
        ({"acceptance": "high"}, AdviceError, "a probability in"),
        ({"acceptance": lambda k: k + 1}, AdviceError, "must be from 0 to 1, got 2"),
        ({"acceptance": {}}, AdviceError, "empty mapping"),
        ({"acceptance": {0.0: 0.9}}, ConfigError, "budget_ratio"),
        ({"device": "cpu"}, CeilingsError, "No ceilings are known"),
        ({"model": "Qwen3-8B"}, AdviceError, "a transformers model or configuration, got str"),
        ({"model": LlamaConfig(dtype=None)}, CostModelError, "dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused(case, error, message):
    with pytest.raises(error, match=message):
        advice(**case)


def test_advice_prints():
    text = str(advice())
    assert text.startswith("Speculate: 64 requests at 8,192 cached tokens on NVIDIA H200.")
    assert "budget_ratio=0.05 (410 positions)" in text
    assert "at the speed of light" in text
    assert "With this batch speculation pays from " in text
    assert "pays at no length of this model" in str(advice(acceptance=0.0))


def test_a_compiled_model_explains_itself(capsys):
    fast = ss.optimize(tiny("qwen3"), ss.SpecConfig(draft_tokens=4, min_budget=64))
    got = fast.explain(lengths=[900, 1100], batch=10, device="H200")
    assert "10 requests at 1,000 cached tokens, k = 4, NVIDIA H200" in capsys.readouterr().out
    text = str(got)
    for words in (
        "verify attention",
        "512*L*V",
        "104448*T",
        "launches",
        "speed of light",
        "longest: launches",
        "10 requests share 1",
    ):
        assert words in text
    assert got.prediction.light_seconds < got.prediction.seconds
    assert got.plain.seconds != got.prediction.seconds
    drafted = next(term for term in got.prediction.terms if term.name == "draft attention")
    assert drafted.bytes == 8 * (512 * (64 + 4 + 1) + 16 * 64)  # 8 of 10 requests draft, b = 64


def test_the_full_drafter_reads_everything():
    fast = ss.optimize(tiny("qwen3"), ss.SpecConfig(draft_tokens=1, drafter="full"))
    terms = {term.name: term for term in fast.explain(1000, 2, "H200").prediction.terms}
    assert terms["draft attention"].bytes > 512 * 1000


def test_an_explanation_is_of_texts_that_the_model_can_have():
    fast = ss.optimize(tiny("qwen3", num_hidden_layers=1))
    with pytest.warns(ContextLengthWarning, match="1025 positions"):
        fast.explain([10, 1025], 2, "H200")


def test_a_device_without_ceilings_is_refused():
    fast = ss.optimize(tiny("qwen3"))
    with pytest.raises(CeilingsError, match=r"'cpu'.*or a Ceilings"):
        fast.explain(1000, 2)
