"""Inflated models: they compute what the small model computes, and nothing that is random enters it."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import sparsespec_compile as ss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from countdown_model import held_out_prompts, load
from inflate import inflated_config, inflated_model, write_checkpoint
from inflated_shape import PRESETS, InflateError, Shape, preset

from ..support.models import tiny

TOKENS = 1280
SHAPES = {
    "wide": Shape(512, 8, 12, 3, 128, 1024, 1500, 16384, tied=False),
    "spare places in a group": Shape(640, 7, 20, 4, 128, 900, 1300, 16384, tied=False),
    "groups split over KV heads": Shape(384, 7, 8, 4, 128, 800, 1281, 20000, tied=True),
    "tied, little wider": Shape(257, 6, 8, 2, 64, 768, 1281, 16384, tied=True),
}
shapes = pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])


@cache
def countdown():
    model, tokenizer = load("cpu", torch.float32)
    return model, held_out_prompts(tokenizer, 1, "cpu")["input_ids"]


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits[0]


def norm_in_the_models_dtype(self, hidden_states):
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


@shapes
def test_the_function_is_the_same_in_float64(shape, monkeypatch):
    """Far below float32 rounding, so that no term, however small, can be missing: eps, say."""
    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm_in_the_models_dtype)
    small, ids = load("cpu", torch.float64)[0], countdown()[1]
    expected = logits(small, ids)
    got = logits(inflated_model(shape, "cpu", torch.float64, small=small), ids)[:, :TOKENS]
    assert float((got - expected).abs().max()) < 1e-11 * float(expected.abs().max())


@shapes
def test_logits_agree_to_float32_rounding(shape):
    """Rounding is measured: the small model's own float32 error. Another order of sums gives an error of that size."""
    small, ids = countdown()
    exact = logits(load("cpu", torch.float64)[0], ids)
    rounding = float((logits(small, ids) - exact).abs().max())
    got = logits(inflated_model(shape, "cpu", torch.float32, small=small), ids)[:, :TOKENS]
    assert float((got - exact).abs().max()) < 4 * rounding


@shapes
def test_the_error_of_bfloat16_is_that_of_the_small_model(shape):
    """Norm weights are rounded once more where sizes have no power of two for the root of their ratio."""
    small, ids = countdown()
    exact = logits(small, ids)
    own, inflated = (
        float((logits(model, ids)[:, :TOKENS].float() - exact).abs().mean())
        for model in (load("cpu", torch.bfloat16)[0], inflated_model(shape, "cpu", torch.bfloat16, small=small))
    )
    assert inflated < 1.5 * own


@shapes
def test_padded_tokens_are_out_of_reach(shape):
    small, ids = countdown()
    got = logits(inflated_model(shape, "cpu", torch.bfloat16, small=small), ids)
    assert bool(got.isfinite().all())
    assert float(got[:, TOKENS:].max()) < -1e9


@shapes
def test_what_is_random_does_not_enter(shape):
    small, ids = countdown()
    models = [inflated_model(shape, "cpu", torch.float32, small=small, seed=seed) for seed in (0, 1)]
    first, second = (logits(model, ids)[:, :TOKENS] for model in models)
    assert torch.equal(first, second)
    changed = {
        name.removeprefix("model.layers.")
        for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True)
        if not torch.equal(one, other)
    }
    live = {f"{i}.self_attn.{kind}_proj.weight" for i in range(6) for kind in "qkv"}
    dead = {f"{i}.mlp.{kind}_proj.weight" for i in range(shape.layers) for kind in ("gate", "up")}
    assert live | dead <= changed


def test_weights_are_random_where_they_may_be():
    """Zeros draw less power than trained weights; a live layer has them only where the function needs them."""
    model = inflated_model(SHAPES["wide"], "cpu", torch.float32, small=countdown()[0])
    for name, parameter in model.named_parameters():
        if any(kind in name for kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            assert int((parameter == 0).sum()) <= 1e-3 * parameter.numel(), name
        if name.startswith(("model.layers.6", "model.layers.7")) and "o_proj" in name:
            assert not parameter.any()


def test_a_checkpoint_loads_as_the_model_on_the_device(tmp_path):
    shape, (small, ids) = SHAPES["wide"], countdown()
    write_checkpoint(tmp_path, shape, torch.float32, small=small, shard_bytes=2**23)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert isinstance(loaded, Qwen3ForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    built = inflated_model(shape, "cpu", torch.float32, small=small)
    assert torch.equal(logits(loaded, ids), logits(built, ids))
    assert loaded.generation_config.eos_token_id == small.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids[0])


def test_a_tied_checkpoint_in_one_file_loads(tmp_path):
    shape = SHAPES["tied, little wider"]
    write_checkpoint(tmp_path, shape, torch.bfloat16, small=countdown()[0])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.bfloat16


def test_greedy_text_is_the_same():
    small, ids = countdown()
    big = inflated_model(SHAPES["spare places in a group"], "cpu", torch.float32, small=small)
    greedy = {"max_new_tokens": 250, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = small.generate(ids, **greedy)
    assert expected.shape[1] == ids.shape[1] + 250
    assert torch.equal(big.generate(ids, **greedy), expected)


@pytest.mark.slow
def test_text_and_acceptance_are_those_of_the_small_model():
    """The pillars of a group come from its query heads alone: here from three copies of each, averaged."""
    small, ids = countdown()
    big = inflated_model(Shape(288, 7, 24, 2, 64, 800, 1290, 16384, True), "cpu", torch.float32, small=small)
    outputs, accepted = [], []
    for model in (small, big):
        fast = ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=8))
        outputs.append(fast.generate(ids, max_new_tokens=120, do_sample=False))
        accepted.append(fast.stats.accepted_per_cycle)
    assert torch.equal(outputs[0], outputs[1])
    assert 1.0 < accepted[0] < 4.0, "a drafter that is always right or always wrong shows nothing"
    assert accepted[0] == accepted[1]


def test_presets_have_the_sizes_of_the_published_models():
    config = countdown()[0].config
    sizes = {"Qwen3-1.7B": 1_720_574_976, "Qwen3-8B": 8_190_735_360, "Qwen3-14B": 14_768_307_200}
    assert sizes.keys() == PRESETS.keys()
    for name, size in sizes.items():
        with torch.device("meta"):
            model = Qwen3ForCausalLM(inflated_config(config, preset(name), torch.bfloat16))
        assert sum(parameter.numel() for parameter in model.parameters()) == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", 256),
        ("layers", 5),
        ("heads", 7),
        ("kv_heads", 1),
        ("head_dim", 32),
        ("mlp", 767),
        ("vocabulary", 1279),
        ("positions", 16383),
    ],
)
def test_a_shape_that_is_too_small_is_refused_by_name(name, value):
    least = 257 if name == "hidden" else value + 1
    with pytest.raises(InflateError, match=rf"^{name} is {value}\b") as refusal:
        inflated_model(replace(SHAPES["wide"], **{name: value}), "cpu", torch.float32, small=countdown()[0])
    assert name in ("kv_heads", "head_dim") or str(least) in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 96}, "head_dim is 96; it must be a multiple of 64"),
        ({"heads": 13}, "heads is 13; it must be a multiple of kv_heads, 3"),
        ({"heads": 9}, "kv_heads is 3; with 3 query heads each, 4 are needed"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused(changes, message):
    with pytest.raises(InflateError, match=message):
        inflated_model(replace(SHAPES["wide"], **changes), "cpu", torch.float32, small=countdown()[0])


def test_another_family_is_refused():
    with pytest.raises(InflateError, match="got a LlamaForCausalLM"):
        inflated_model(SHAPES["wide"], "cpu", torch.float32, small=tiny("llama"))


def test_a_dtype_of_small_range_and_an_unknown_preset_are_refused():
    with pytest.raises(InflateError, match=r"torch\.float16.*Use bfloat16 or float32"):
        inflated_model(SHAPES["wide"], "cpu", torch.float16, small=countdown()[0])
    with pytest.raises(InflateError, match=r"Allowed: Qwen3-1\.7B, Qwen3-8B, Qwen3-14B"):
        preset("Qwen3-7B")
