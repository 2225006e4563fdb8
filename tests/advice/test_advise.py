"""Advice and explanations: when speculation pays, what is refused, what is printed."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

import sparsespec_compile as ss
from sparsespec_compile.advice.advise import advise
from sparsespec_compile.advice.config_cost import config_cost
from sparsespec_compile.advice.explain import explain
from sparsespec_compile.advice.prediction import accepted
from sparsespec_compile.errors import AdviceError, CeilingsError, ConfigError, ContextLengthWarning, CostModelError
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.host.phases import phases_in_use

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
    """With exact weights, unless `changes` say otherwise."""
    model, device = changes.get("model", LLAMA_8B), changes.get("device", "H200")
    weights, ngrams = changes.get("draft_weights", "exact"), changes.get("ngram_acceptance")
    return advise(model, device, lengths, batch, acceptance, weights, ngrams)


def test_speculation_pays_for_long_contexts():
    got = advice()
    assert got.speculate
    assert 1.3 < got.speedup < got.light_speedup < 3.0
    assert got.best is got.speculative
    settings = {"draft_tokens": got.best.draft_tokens, "draft_proposals": 0, "draft_weights": "exact"}
    expected = ss.SpecConfig(drafter="pillar", **settings)
    assert got.config() == expected
    assert got.best.budget == 410
    assert got.best.accepted == pytest.approx(sum(0.9**i for i in range(1, got.best.draft_tokens + 1)))


def test_drafts_from_the_text_pay_where_rows_cost_little():
    """With one request every draft that is right is a gain; at length drafts by the model save the cache's bytes."""
    alone, many = (advice(1024, batch, acceptance=0.7, ngram_acceptance=0.3) for batch in (1, 64))
    assert alone.best is alone.ngrams
    settings = {"draft_tokens": alone.best.draft_tokens, "draft_proposals": 0, "draft_weights": "exact"}
    assert alone.config() == ss.SpecConfig(drafter="ngram", **settings)
    assert alone.best.tokens_per_second == pytest.approx(alone.plain.tokens_per_second / 0.7, rel=0.02)
    assert many.ngrams.draft_tokens < alone.ngrams.draft_tokens, "rows of 64 requests are no longer free"
    assert many.ngrams.tokens_per_second > many.speculative.tokens_per_second
    long = advice(16384, 64, acceptance=0.9, ngram_acceptance=0.3)
    assert long.best.drafter == "pillar"
    assert "drafts from the text: " in str(long)
    assert long.ngrams.budget == 0
    assert advice().ngrams is None
    assert "from the text" not in str(advice())
    with pytest.raises(
        AdviceError, match=r"^ngram_acceptance must be a probability in \[0, 1\], a function of k, got 1.5"
    ):
        advice(ngram_acceptance=1.5)
    asked = set()
    advice(ngram_acceptance=lambda k: asked.add(k) or 0.3)
    assert asked == set(range(1, 17))


def test_both_pay_where_iterations_of_drafts_have_few_rows():
    few, many = (advice(8192, batch, 0.98, ngram_acceptance=0.4, draft_weights="fp8") for batch in (16, 64))
    assert few.best is few.both
    assert few.both.tokens_per_second > 1.2 * max(few.speculative.tokens_per_second, few.ngrams.tokens_per_second)
    assert few.config().draft_proposals == few.both.draft_proposals >= 2
    assert f"draft_proposals={few.both.draft_proposals}" in str(few)
    gain = [got.both.tokens_per_second / got.speculative.tokens_per_second for got in (few, many)]
    assert gain[0] > gain[1]
    assert few.both.accepted < few.both.draft_tokens
    assert few.speedup == few.both.tokens_per_second / few.plain.tokens_per_second
    assert few.light_speedup == few.both.light_tokens_per_second / few.plain.light_tokens_per_second
    without = advice(8192, 16, 0.98, ngram_acceptance=0.0, draft_weights="fp8")
    assert without.best is without.speculative
    assert advice().both is None


def test_an_explanation_says_what_else_auto_chooses_among():
    cost = config_cost(LLAMA_8B, torch.bfloat16)
    shown = explain(cost, ss.SpecConfig(), 8192, 64, "H200")
    assert list(shown.ngrams) == [1, 3, 8]
    needed = shown.ngrams[3].seconds / shown.plain.seconds - 1
    line = next(line for line in shown.lines() if line.startswith("3 drafts from the text"))
    assert line.endswith(f"if more than {needed:.2f} of them are accepted")
    assert not explain(cost, ss.SpecConfig(drafter="pillar"), 8192, 64, "H200").ngrams
    ngrams = explain(cost, ss.SpecConfig(drafter="ngram", draft_tokens=3), 8192, 64, "H200")
    assert "all requests verify in every iteration" in ngrams.lines()
    assert ngrams.prediction == shown.ngrams[3]


def test_an_explanation_has_cycles_that_judge_proposals():
    cost = config_cost(LLAMA_8B, torch.bfloat16)
    shown = explain(cost, ss.SpecConfig(max_draft_tokens=12), 8192, 16, "H200")
    assert [(kind.passes, kind.proposals, kind.drafts) for kind in shown.judging] == [(8, 1, 12), (6, 3, 12)]
    lines = [line for line in shown.lines() if "proposal" in line]
    assert lines[1].startswith("6 draft iterations that judge 3 proposals, for up to 12 drafts: predicted ")
    assert len(lines) == 2
    assert not explain(cost, ss.SpecConfig(draft_proposals=0), 8192, 16, "H200").judging
    fixed = explain(cost, ss.SpecConfig(draft_tokens=12, draft_proposals=2), 8192, 16, "H200")
    assert not fixed.judging
    assert "iterations of nothing but drafts judge 2 proposals of each request" in fixed.lines()
    assert '"auto" chooses among 71 kinds of cycles; shown is that of the most passes' in shown.lines()
    assert not any("kinds of cycles" in line for line in fixed.lines())


def test_advice_is_for_requests_that_are_decoded_together():
    assert advice(batch=128).config().max_requests == 128
    assert advice(batch=4).config().max_requests == ss.SpecConfig().max_requests
    for wrong in (0, 1025):
        with pytest.raises(AdviceError, match=f"batch must be an integer from 1 to 1,024, got {wrong}"):
            advice(batch=wrong)


def test_an_explanation_counts_rows_for_proposals():
    cost = config_cost(LLAMA_8B, torch.bfloat16)
    alone, judged = (
        explain(cost, ss.SpecConfig(draft_tokens=12, draft_proposals=proposals), 8192, 64, "H200")
        for proposals in (0, 2)
    )
    assert any(line.startswith("each request verifies in one of 13 iterations") for line in alone.lines())
    assert any(line.startswith("each request verifies in one of 8 iterations") for line in judged.lines())
    assert alone.plain == judged.plain
    # A cycle of fewer iterations, each of which takes longer: it verifies more often, and has more rows.
    assert 13 * alone.prediction.seconds > 8 * judged.prediction.seconds > 8 * alone.prediction.seconds


def test_8_bit_draft_weights_pay_more_and_sooner():
    def draft_iterations(choice):
        (kind,) = cycles_of(ss.SpecConfig(draft_tokens=choice.draft_tokens))
        return 1 - phases_in_use("grouped", kind, 64) / (kind.passes + 1)

    exact, auto = advice(), advice(draft_weights="auto")
    assert auto.plain == exact.plain
    assert 1.05 < auto.speedup / exact.speedup < 1.5
    assert auto.light_speedup > exact.light_speedup
    assert auto.break_even_length < exact.break_even_length
    assert draft_iterations(auto.best) > draft_iterations(exact.best), "by longer cycles, or fewer groups"
    assert (auto.config().draft_weights, exact.config().draft_weights) == ("auto", "exact")
    assert advice(draft_weights="fp8").speculative == auto.speculative
    assert ", 8-bit draft weights\n" in str(auto)
    assert ", exact weights\n" in str(exact)


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


def test_drafts_of_few_requests_read_few_experts_of_a_mixture():
    """Qwen3-30B-A3B: a request's drafts read 8 of 128 experts, 64 requests' nearly all, a verification more."""
    mixture = Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        max_position_embeddings=40960,
        dtype=torch.bfloat16,
    )
    few, many = (advice(8192, batch, model=mixture) for batch in (1, 64))
    assert few.experts == (pytest.approx(8.0), 128)
    assert many.experts == (pytest.approx(128 * (1 - (15 / 16) ** 64)), 128)
    assert "1 draft row chooses 8 of 128 on average\n  draft steps of few requests read few experts" in str(few)
    assert "64 draft rows choose 126 of 128 on average" in str(many)
    assert "read few experts" not in str(many)
    assert max(map(len, str(few).splitlines())) <= 80
    assert advice().experts is None
    assert "experts" not in str(advice())
    # 15.6 ms at 4.3 TB/s, of which the experts that 64 rows choose are most.
    light = 64 / many.plain.light_tokens_per_second
    assert 14e-3 < 64 / advice(1024, 64, model=mixture).plain.light_tokens_per_second < 17e-3
    assert light > 14e-3


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
        ({"batch": 0}, AdviceError, "batch must be an integer from 1 to 1,024, got 0"),
        ({"batch": True}, AdviceError, "batch must be"),
        ({"acceptance": 1.5}, AdviceError, "a probability in .0, 1."),
        ({"acceptance": "high"}, AdviceError, "a probability in"),
        ({"acceptance": lambda k: k + 1}, AdviceError, "must be from 0 to 1, got 2"),
        ({"acceptance": {}}, AdviceError, "empty mapping"),
        ({"acceptance": {0.0: 0.9}}, ConfigError, "budget_ratio"),
        ({"draft_weights": "int4"}, ConfigError, "draft_weights must be one of"),
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
    assert "pay from " in text
    assert max(map(len, str(advice(ngram_acceptance=0.3)).splitlines())) <= 80
    assert "pay at no length of this model" in str(advice(acceptance=0.0))


def test_a_compiled_model_explains_itself(capsys):
    fast = ss.optimize(tiny("qwen3"), ss.SpecConfig(draft_tokens=4, min_budget=64))
    got = fast.explain(lengths=[900, 1100], batch=10, device="H200")
    assert "10 requests at 1,000 cached tokens, k = 4, NVIDIA H200" in capsys.readouterr().out
    text = str(got)
    assert max(map(len, text.splitlines())) <= 80
    assert "verify attention" in got._repr_mimebundle_((), ())["text/html"]
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


def test_an_explanation_knows_what_drafts_read():
    settings = {"draft_tokens": 4, "min_budget": 64}
    exact = ss.optimize(tiny("qwen3"), ss.SpecConfig(**settings)).explain(1000, 10, "H200")
    fast = ss.optimize(tiny("qwen3"), ss.SpecConfig(**settings, draft_weights="int8"))
    got = fast.explain(1000, 10, "H200")
    elements = 2 * 48 * ((6 + 2 * 2) * 16 + 6 * 16 + 3 * 96) + 48 * 151
    read = f"read {elements / 1e9:.3g} GB of weights in place of {4 * elements / 1e9:.3g}"
    assert f"iterations of nothing but drafts {read}" in " ".join(str(got).split())
    assert "nothing but drafts" not in str(exact)
    # One of five iterations verifies, so four read a quarter of the weights.
    products = [sum(t.bytes for t in one.prediction.terms if "projection" in t.name) for one in (got, exact)]
    assert products == pytest.approx([elements * (4 * 1 + 4) / 5, elements * 4])
    assert got.plain == exact.plain


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
