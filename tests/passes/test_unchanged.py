"""What a capture can have read of a model: changes are noticed and named, harmless ones are let through."""

import copy
import sys
import time
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from sparsespec_compile.passes.capture.requirements import check_model
from sparsespec_compile.passes.errors import (
    MixedPrecisionError,
    StaleParametersError,
    TrainingModeError,
    UnsupportedModelError,
)
from sparsespec_compile.passes.proofs.unchanged import ModelRecord

from .families import FAST, each, tiny, tokens

IDS = tokens(9)[None]


class Adapted(nn.Module):
    """A linear layer with low-rank adapters, built as PEFT builds its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.scaling = {"a": 2.0, "b": 0.5}
        self.merged_adapters = []
        self._active = ["a"]
        self._disabled = False
        self.dropout = nn.Dropout(0.1)
        for name in "ab":
            self.register_parameter(f"down_{name}", nn.Parameter(torch.randn(2, base.in_features)))
            self.register_parameter(f"up_{name}", nn.Parameter(torch.randn(base.out_features, 2)))

    @property
    def active(self):
        return [] if self._disabled else [name for name in self._active if name not in self.merged_adapters]

    def term(self, name):
        return self.scaling[name] * getattr(self, f"up_{name}") @ getattr(self, f"down_{name}")

    def merge(self, name):
        self.base.weight.data += self.term(name).data
        self.merged_adapters.append(name)

    def forward(self, x):
        return self.base(x) + sum(self.dropout(x) @ self.term(name).T for name in self.active)


COEFFICIENT = 1.0
SETTINGS = {"shift": [0.0, 1.0]}


def reads_globals(module, inputs, output):
    return output * COEFFICIENT + SETTINGS["shift"][0]


def scales_inputs(scale, module, inputs):
    return (inputs[0] * scale,)


class Steering:
    """A hook with state of its own."""

    def __init__(self):
        self.strength = 1.0
        self.calls = 0

    def __call__(self, module, inputs, output):
        return output * self.strength


class Judge(nn.Module):
    """A module outside of the model that a hook reads."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(48, 48)
        self.threshold = 0.5

    def forward(self, x):
        return self.inner(x).clamp(min=self.threshold)


def with_adapters():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = Adapted(model.model.layers[1].mlp.up_proj)
    return model.eval()


def closing_over(value):
    """A hook that closes over `value`, and what sets it."""

    def hook(module, inputs, output):
        return output + value

    def change(new):
        nonlocal value
        value = new

    return hook, change


def with_hooks():
    model = tiny("llama")
    layers = model.model.layers
    model.steering, model.judge = Steering(), [Judge()]
    hook, model.set_value = closing_over(0.5)
    layers[0].mlp.register_forward_hook(reads_globals)
    layers[0].self_attn.o_proj.register_forward_hook(model.steering)
    layers[1].mlp.register_forward_hook(hook)
    layers[1].self_attn.o_proj.register_forward_pre_hook(partial(scales_inputs, 0.5))
    layers[1].self_attn.register_forward_hook(closing_over(model.judge[0])[0])
    return model


def adapter(model):
    return model.model.layers[1].mlp.up_proj


def mlp(model):
    return model.model.layers[0].mlp


def replace_forward(model):
    module = mlp(model)
    module.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), module)


def transpose(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T


def select_own_attention(model):
    def doubled(module, query, *others, **options):
        return sdpa_attention_forward(module, 2 * query, *others, **options)

    AttentionInterface.register("tests_doubled", doubled)
    model.config._attn_implementation = "tests_doubled"


def set_last_hook(model, **values):
    for name, value in values.items():
        setattr(model.steering, name, value)


def set_global(name, value):
    def change(model):
        setattr(sys.modules[__name__], name, value)

    return change


CHANGES = {
    "adapter switched": (
        with_adapters,
        lambda m: setattr(adapter(m), "_active", ["b"]),
        r"up_proj\._active\[0\] was 'a'.*is 'b' now",
    ),
    "adapter disabled": (with_adapters, lambda m: setattr(adapter(m), "_disabled", True), r"_disabled was False"),
    "adapter scaled": (
        with_adapters,
        lambda m: adapter(m).scaling.update(a=3.0),
        r"scaling\['a'\] was 2\.0 .* 3\.0 now",
    ),
    "adapter merged": (with_adapters, lambda m: adapter(m).merge("a"), r"merged_adapters\[0\] was absent .* 'a' now"),
    "adapter added": (
        tiny,
        lambda m: setattr(mlp(m), "up_proj", Adapted(mlp(m).up_proj).eval()),
        r"layers\.0\.mlp\.up_proj\.class was torch\.\S+\.Linear",
    ),
    "forward": (tiny, replace_forward, r"layers\.0\.mlp\.forward was absent .* <lambda> \(test_unchanged\.py:\d+\)"),
    "attention's scale": (
        tiny,
        lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.5),
        r"layers\.1\.self_attn\.scaling was 0\.35",
    ),
    "rope's scale": (
        tiny,
        lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.5),
        r"rotary_emb\.attention_scaling was 1\.0",
    ),
    "epsilon": (tiny, lambda m: setattr(m.model.norm, "variance_epsilon", 0.1), r"norm\.variance_epsilon was 1e-06"),
    "activation": (
        tiny,
        lambda m: setattr(mlp(m), "act_fn", nn.GELU()),
        r"act_fn\.class was transformers\.activations\.SiLUActivation .*\.GELU now",
    ),
    "window": (
        partial(tiny, "mistral"),
        lambda m: setattr(m.config, "sliding_window", 7),
        r"config\.sliding_window was 24",
    ),
    "own attention": (tiny, select_own_attention, r"implementations.*doubled \(test_unchanged\.py"),
    "hook added": (
        tiny,
        lambda m: mlp(m).register_forward_hook(reads_globals),
        r"mlp\.hook 0 was absent .* reads_globals",
    ),
    "pre-hook added": (
        tiny,
        lambda m: mlp(m).register_forward_pre_hook(lambda module, x: None),
        r"mlp\.hook 0 was absent",
    ),
    "closure": (with_hooks, lambda m: m.set_value(0.7), r"layers\.1\.mlp\.hook 0\.value was 0\.5 .* 0\.7 now"),
    "closure's array": (with_hooks, lambda m: m.set_value(np.ones(3)), r"hook 0\.value was 0\.5"),
    "object": (with_hooks, lambda m: set_last_hook(m, strength=2.0), r"o_proj\.hook 0\.strength was 1\.0"),
    "module outside": (with_hooks, lambda m: setattr(m.judge[0], "threshold", 0.1), r"value\.threshold was 0\.5"),
    "its parameters": (with_hooks, lambda m: m.judge[0].double(), r"value\._parameters.*|value\._modules\['inner'\]"),
    "global": (with_hooks, set_global("COEFFICIENT", 2.0), r"hook 0\.COEFFICIENT was 1\.0"),
    "global container": (
        with_hooks,
        set_global("SETTINGS", {"shift": [0.5, 1.0]}),
        r"SETTINGS\['shift'\]\[0\] was 0\.0",
    ),
    "double": (tiny, lambda m: m.double(), r"weight was moved, replaced.*float32, and is .*float64 now"),
    "replaced": (
        tiny,
        lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.ones(48))),
        r"norm\.weight was moved, replaced",
    ),
    "assigned": (
        tiny,
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        r"weight was moved, replaced",
    ),
    "data": (
        tiny,
        lambda m: setattr(mlp(m).up_proj.weight, "data", torch.zeros(96, 48)),
        r"mlp\.up_proj\.weight was moved",
    ),
    "transposed": (tiny, transpose, r"q_proj\.weight was moved"),
    "buffer": (
        tiny,
        lambda m: setattr(m.model.rotary_emb, "inv_freq", m.model.rotary_emb.inv_freq * 2),
        r"inv_freq was moved",
    ),
    "layer removed": (
        tiny,
        lambda m: m.model.layers.__delitem__(1),
        r"model\.layers\.1 was \S+\.LlamaDecoderLayer .* absent now",
    ),
    "embedding": (tiny, lambda m: m.set_input_embeddings(nn.Embedding(151, 48)), r"embed_tokens\."),
    "wrapped": (
        tiny,
        lambda m: setattr(mlp(m), "down_proj", nn.Sequential(mlp(m).down_proj)),
        r"down_proj\.class was torch\.\S+\.Linear",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed_and_named_and_their_undoing_too(change, monkeypatch):
    build, apply, named = CHANGES[change]
    monkeypatch.setattr(sys.modules[__name__], "COEFFICIENT", 1.0)
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", {"shift": [0.0, 1.0]})
    model = build("llama") if build is tiny else build()
    record = ModelRecord(model)
    record.require()
    apply(model)
    with pytest.raises(StaleParametersError, match=rf"(?s){named}.*call optimize\(model\) again"):
        record.require()
    ModelRecord(model).require()


@pytest.mark.parametrize(
    ("owner", "name", "function"),
    [
        (modeling_llama.LlamaMLP, "forward", lambda self, x: x),
        (modeling_llama.LlamaRotaryEmbedding, "forward", modeling_llama.LlamaRMSNorm.forward),
        (modeling_llama, "apply_rotary_pos_emb", lambda q, k, *others: (q, k)),
        (nn.Linear, "forward", lambda self, x: x @ self.weight.T),
    ],
)
def test_functions_that_are_replaced_under_a_models_classes_are_noticed(owner, name, function, monkeypatch):
    record = ModelRecord(tiny("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        with pytest.raises(StaleParametersError, match=name):
            record.require()
    record.require()


def test_what_is_undone_is_no_change():
    model = with_adapters()
    record = ModelRecord(model)
    layer = adapter(model)
    layer._active, layer.scaling["a"], layer.base.marker = ["b"], 1.0, 3
    replace_forward(model)
    with pytest.raises(StaleParametersError):
        record.require()
    del mlp(model).forward
    layer._active, layer.scaling["a"] = ["a"], 2.0
    scaling = layer.scaling
    del layer.scaling
    layer.scaling = dict(reversed(scaling.items()))
    record.require()


def with_gradients(model):
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def without_gradients(model):
    with_gradients(model)
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


def rewrite_settings(model):
    model.config.use_cache = False
    model.config.pad_token_id = model.generation_config.eos_token_id = 3
    model.warnings_issued = {"estimate_tokens": True}
    model.config = copy.deepcopy(model.config)
    model.add_model_tags(["mine"])


HARMLESS = {
    "hidden states": lambda m: m(IDS, output_hidden_states=True),
    "attentions": lambda m: m(IDS, output_attentions=True),
    "router logits": lambda m: m(IDS, output_router_logits=True),
    "generate": lambda m: m.generate(IDS, max_new_tokens=3, do_sample=False),
    "static cache": lambda m: m.generate(IDS, max_new_tokens=3, cache_implementation="static"),
    "gradient checkpointing": with_gradients,
    "gradient checkpointing on and off": without_gradients,
    "to": lambda m: m.to("cpu").float(),
    "training": lambda m: m.train(),
    "frozen": lambda m: m.requires_grad_(False),
    "settings": rewrite_settings,
    "implementation": lambda m: m.set_attn_implementation("eager"),
    "compiled": lambda m: m.compile(),
    "compiled forward": lambda m: setattr(m, "forward", torch.compile(m.forward)),
    "its own forward": lambda m: setattr(m, "forward", m.forward),
    "dropout set": lambda m: setattr(m.model.layers[0].self_attn, "attention_dropout", 0.3),
    "in place": lambda m: m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}),
    "backward hook": lambda m: m.lm_head.register_full_backward_hook(lambda *gradients: None),
}


@pytest.mark.parametrize("call", HARMLESS)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_no_text_is_let_through(call):
    model = tiny("mixtral" if call == "router logits" else "llama")
    record = ModelRecord(model)
    HARMLESS[call](model)
    record.require()


@pytest.mark.parametrize("family", each(FAST))
def test_running_and_training_a_model_of_any_family_is_no_change(family):
    model = tiny(family)
    record = ModelRecord(model)
    model(IDS, output_hidden_states=True)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    model.eval()
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    record.require()


def test_a_foreign_hook_of_a_harmless_hooks_name_is_noticed():
    model = tiny("llama")
    record = ModelRecord(model)

    def output_capturing_hook(module, inputs, output):
        return 2 * output

    output_capturing_hook.__module__ = "transformers.utils.output_capturing"
    mlp(model).register_forward_hook(output_capturing_hook)
    with pytest.raises(StaleParametersError, match=r"hook 0 was absent.*output_capturing_hook"):
        record.require()


def test_hooks_of_the_whole_process_are_refused_when_compiling_and_noticed_later():
    model = tiny("llama")
    record = ModelRecord(model)
    handle = nn.modules.module.register_module_forward_hook(reads_globals)
    try:
        with pytest.raises(StaleParametersError, match=r"global hooks\[0\] was absent.*reads_globals"):
            record.require()
        with pytest.raises(UnsupportedModelError, match=r"reads_globals.*every module.*Allowed:.*Remove it"):
            check_model(model)
    finally:
        handle.remove()
    record.require()
    with FlopCounterMode(display=False):
        record.require()
        check_model(model)


@pytest.mark.parametrize(
    ("family", "named"),
    [("gpt2", r"transformer\.drop .* p=0\.1"), ("opt", r"model\.decoder .* dropout=0\.1")],
)
def test_dropout_in_training_mode_is_refused_until_it_is_off(family, named):
    model = tiny(family)
    record = ModelRecord(model)
    model.train()
    with pytest.raises(TrainingModeError, match=named + r".*model\.eval\(\)"):
        record.require()
    model.eval()
    record.require()


def test_dropout_of_an_adapter_and_rates_in_attributes_count_in_training_mode():
    model = with_adapters()
    record = ModelRecord(model)
    model.train()
    with pytest.raises(TrainingModeError, match=r"up_proj\.dropout .* p=0\.1"):
        record.require()
    adapter(model).dropout.p = 0.0
    record.require()
    model.model.layers[0].self_attn.attention_dropout = 0.25
    with pytest.raises(TrainingModeError, match=r"layers\.0\.self_attn .* attention_dropout=0\.25"):
        record.require()


def test_noise_of_a_trainer_counts_in_training_mode():
    model = tiny("llama")
    record = ModelRecord(model)
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    handle = embedding.register_forward_hook(neftune_post_forward_hook)
    record.require()
    model.train()
    with pytest.raises(TrainingModeError, match=r"embed_tokens .* NEFTune's noise"):
        record.require()
    handle.remove()
    record.require()


class ConvertOutputsToFp32:
    """Stands in for Accelerate's class of this name."""

    def __init__(self, function):
        self.function = self.__wrapped__ = function

    def __call__(self, *arguments, **options):
        return self.function(*arguments, **options)


def as_accelerate_prepares(model):
    """Sets `forward` as `Accelerator(mixed_precision="bf16").prepare(model)` does."""
    model._original_forward = model.forward
    converted = ConvertOutputsToFp32(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__))

    def forward(*arguments, **options):
        return converted(*arguments, **options)

    forward.__wrapped__ = converted
    model.forward = types.MethodType(forward, model)


def as_accelerate_unwraps(model):
    """Sets `forward` as `unwrap_model(model, keep_fp32_wrapper=False)` does: without transformers' decorators."""
    function = type(model).forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    model.forward = types.MethodType(function, model)
    del model._original_forward


def under_autocast(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


@pytest.mark.parametrize("wrap", [as_accelerate_prepares, under_autocast])
def test_mixed_precision_around_a_model_is_refused_by_name(wrap):
    model = tiny("llama")
    record = ModelRecord(model)
    wrap(model)
    for check in (record.require, partial(check_model, model)):
        with pytest.raises(MixedPrecisionError, match=r"LlamaForCausalLM.*autocast.*Allowed:.*keep_fp32_wrapper=False"):
            check()


def test_a_model_unwrapped_from_mixed_precision_is_as_before():
    model = tiny("llama")
    record = ModelRecord(model)
    as_accelerate_prepares(model)
    as_accelerate_unwraps(model)
    record.require()
    check_model(model)


def test_autocast_that_is_switched_off_is_no_mixed_precision():
    model = tiny("llama")
    model.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(model.forward)
    check_model(model)


def test_a_check_takes_milliseconds_for_36_layers():
    record = ModelRecord(tiny("qwen3", num_hidden_layers=36))
    taken = []
    for _ in range(9):
        started = time.process_time()
        record.require()
        taken.append(time.process_time() - started)
    assert min(taken) < 0.02  # 3 ms where nothing else runs
