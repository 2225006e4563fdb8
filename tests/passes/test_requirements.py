"""What is refused at the front, and how it is said: what was got, what is allowed, what to do."""

from functools import partial, wraps

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    BartForConditionalGeneration,
    LlamaModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from sparsespec_compile.kernels.ops import SparseSpecError
from sparsespec_compile.passes import errors
from sparsespec_compile.passes.capture.interface import model_configs
from sparsespec_compile.passes.capture.requirements import check_model, check_versions
from sparsespec_compile.passes.pipeline import compile_model

from .families import tiny


@pytest.mark.parametrize(
    ("torch_version", "transformers_version", "named"),
    [
        ("2.10.1+cu130", "5.23.0", r"torch 2\.10\.1\+cu130 is installed.*2\.11 or newer.*pip install 'torch>=2\.11'"),
        ("2.9.0", "5.23.0", "torch 2.9.0"),
        ("2.11.0", "5.5.9", r"transformers 5\.5\.9 is installed.*5\.6 or newer"),
        ("2.11.0", "4.57.3", "transformers 4.57.3"),
    ],
)
def test_old_versions_are_refused(torch_version, transformers_version, named):
    with pytest.raises(errors.VersionError, match=named):
        check_versions(torch_version, transformers_version)


@pytest.mark.parametrize(
    ("torch_version", "transformers_version"),
    [("2.11.0a0+git1234", "5.6.0"), ("2.13.0+cpu", "5.23.0"), ("2.11.0", "5.10.0"), ("3.0.0", "5.6.0.dev0")],
)
def test_versions_from_the_oldest_on_are_accepted(torch_version, transformers_version):
    check_versions(torch_version, transformers_version)


def test_installed_versions_are_checked(monkeypatch):
    monkeypatch.setattr(
        "sparsespec_compile.passes.capture.requirements.OLDEST", {"torch": "99.0", "transformers": "5.6"}
    )
    with pytest.raises(errors.VersionError, match=r"99\.0 or newer"):
        compile_model(tiny("llama"), page_size=16)


def with_setting(name, value):
    model = tiny("llama")
    setattr(model.config, name, value)
    return model


def with_unknown_rotary(rope_parameters):
    """A model whose rotary module does not say what it computes."""
    model = with_setting("rope_parameters", rope_parameters)
    del model.model.rotary_emb.rope_type
    return model


def on_two_devices():
    model = tiny("llama")
    model.lm_head.to("meta")
    return model


def quantised():
    model = tiny("llama")
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = weight
    return model


def encoder_decoder():
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(AutoConfig.for_model("bart", vocab_size=64, d_model=16, **small))


def scaling(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query * 2, key, value, attention_mask, **options)


@wraps(sdpa_attention_forward)
def disguised(*arguments, **options):
    return scaling(*arguments, **options)


def attending_by(function, name="scaling", mask=None):
    model = tiny("llama")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask or sdpa_mask)
    model.set_attn_implementation(name)
    return model


def in_inference_mode():
    with torch.inference_mode():
        return tiny("llama")


def moved_in_inference_mode():
    model = tiny("llama")
    with torch.inference_mode():
        return model.to(torch.bfloat16)


CASES = {
    "double": (lambda: tiny("llama").double(), errors.UnsupportedModelError, r"weight is of torch\.float64.*float\(\)"),
    "built in inference mode": (
        in_inference_mode,
        errors.UnsupportedModelError,
        r"weight was made inside of torch\.inference_mode",
    ),
    "moved in inference mode": (
        moved_in_inference_mode,
        errors.UnsupportedModelError,
        r"made inside of torch\.inference_mode",
    ),
    "an attention function of the user's": (
        lambda: attending_by(scaling),
        errors.UnsupportedAttentionError,
        "attends by 'scaling', which is scaling of",
    ),
    "one with arguments bound, and a known name": (
        lambda: attending_by(partial(disguised, dropout=0.0), "disguised"),
        errors.UnsupportedAttentionError,
        "attends by 'disguised'",
    ),
    "masks of the user's": (
        lambda: attending_by(sdpa_attention_forward, "masked", lambda **options: None),
        errors.UnsupportedAttentionError,
        "attends by 'masked', which is .*lambda",
    ),
    "not a model": (lambda: torch.nn.Linear(2, 2), errors.UnsupportedModelError, "got a Linear"),
    "no head": (lambda: LlamaModel(tiny("llama").config), errors.UnsupportedModelError, "no language-modelling head"),
    "encoder-decoder": (encoder_decoder, errors.EncoderDecoderError, "is an encoder-decoder"),
    "decoder of an encoder-decoder": (
        lambda: tiny("bart"),
        errors.EncoderDecoderError,
        "encoder_attn attends to an encoder",
    ),
    "two devices": (on_two_devices, errors.UnsupportedModelError, r"parameters on \['cpu', 'meta'\]"),
    "quantised": (quantised, errors.UnsupportedModelError, r"up_proj.weight is a Parameter of torch.int8"),
    "bloom": (lambda: with_setting("model_type", "bloom"), errors.UnsupportedAttentionError, "ALiBi"),
    "mpt": (lambda: with_setting("model_type", "mpt"), errors.UnsupportedAttentionError, "ALiBi"),
    "falcon": (lambda: with_setting("alibi", True), errors.UnsupportedAttentionError, "ALiBi"),
    "mamba": (lambda: with_setting("layer_types", ["mamba", "full_attention"]), errors.RowMixingError, "mamba"),
    "hybrid": (lambda: tiny("falcon_h1"), errors.RowMixingError, "hybrid"),
    "conv": (lambda: tiny("lfm2"), errors.RowMixingError, r"\['conv'\]"),
    "indexer": (
        lambda: with_setting("layer_types", ["indexed_attention", "full_attention"]),
        errors.UnsupportedAttentionError,
        "select the tokens",
    ),
    "longrope": (
        lambda: with_unknown_rotary({"rope_type": "longrope", "rope_theta": 1e4}),
        errors.PositionError,
        "longrope",
    ),
    "dynamic rope of one layer type": (
        lambda: with_unknown_rotary({"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4}}),
        errors.PositionError,
        "dynamic",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_unsupported_models_are_refused_by_name(case):
    build, error, named = CASES[case]
    model = build()
    with pytest.raises(error, match=named) as caught:
        compile_model(model, page_size=16)
    assert type(caught.value) is error
    assert "Allowed:" in str(caught.value)


def test_another_function_under_the_name_of_transformers_own_is_refused(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", scaling)
    with pytest.raises(errors.UnsupportedAttentionError, match="attends by 'sdpa', which is scaling of"):
        compile_model(tiny("llama"), page_size=16)


def test_another_function_in_the_models_own_file_is_refused(monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", scaling)
    check_model(tiny("llama"))  # which attends by sdpa
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(errors.UnsupportedAttentionError, match="attends by 'eager', which is scaling"):
        compile_model(model, page_size=16)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "paged|sdpa"])
def test_transformers_own_functions_pass(name):
    model = tiny("llama")
    for config in model_configs(model):
        config._attn_implementation_internal = name
    check_model(model)


def test_transformers_own_function_under_another_name_passes():
    check_model(attending_by(partial(sdpa_attention_forward, dropout=0.0), "another_name"))


def test_supported_models_pass(bench):
    for family in ("llama", "gemma2", "mixtral", "gpt2"):
        check_model(bench(family).model)


def test_every_error_of_the_compiler_is_a_named_one():
    own = [value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__]
    named = [value for value in own if not issubclass(value, Warning)]
    assert len(named) > 10
    assert all(issubclass(error, SparseSpecError) and error.__doc__ for error in named)
    refusals = set(named) - {
        errors.CompileError,
        errors.CostModelError,
        errors.PassMatchError,
        errors.GraphInvariantError,
        errors.StaleParametersError,
        errors.TrainingModeError,
    }
    assert all(issubclass(error, errors.UnsupportedModelError) for error in refusals)
