"""Models with PEFT's adapters: captured as they are, and followed when adapters are merged, switched or taken away."""

import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import sparsespec_compile as ss
from sparsespec_compile.compile.forms import MOST_FORMS, Forms
from sparsespec_compile.errors import ParallelPlanError, StaleParametersError, TrainingModeError, UnsupportedModelError
from sparsespec_compile.passes.capture.adapters import adapter_layers
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.ranks import Ranks

from .support.models import left_padded, tiny

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft", reason="needs '.[formats]'")

NEW = 16
IDS, MASK = left_padded(4, 11)
LINEARS = ["q_proj", "v_proj", "o_proj", "down_proj"]
SETTINGS = ss.SpecConfig(draft_tokens=3, min_budget=6)


def adapted(*names, kind=None, family="llama", **settings):
    """A PEFT model with adapters of these names, all of which change the text."""
    names = names or ("default",)
    kind = kind or peft.LoraConfig
    if kind is peft.LoraConfig:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **settings}
    model = peft.get_peft_model(tiny(family, num_hidden_layers=1), kind(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, kind(**settings))
    base = tiny(family, num_hidden_layers=1).state_dict().keys()
    torch.manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.get_base_model().named_parameters():
            if path.replace("base_layer.", "").replace("original_module.", "") not in base:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def own_text(model):
    return model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False)


def text(fast):
    return fast.generate(IDS, MASK, max_new_tokens=NEW)


@pytest.fixture
def compilations(monkeypatch):
    """How often a model was compiled, as a list of that length."""
    found, compile_form = [], Forms._compile

    def counted(forms):
        found.append(None)
        return compile_form(forms)

    monkeypatch.setattr(Forms, "_compile", counted)
    return found


KINDS = {
    "LoRA": {},
    "with dropout and rslora": {"lora_dropout": 0.1, "use_rslora": True},
    "with biases": {"lora_bias": True, "bias": "all"},
    "DoRA": {"use_dora": True},
    "on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "beside whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "beside trained tokens": {"trainable_token_indices": [5, 6, 7]},
    "IA3": {"kind": "IA3Config", "target_modules": LINEARS, "feedforward_modules": ["down_proj"]},
    "LoHa": {"kind": "LoHaConfig", "r": 4, "target_modules": LINEARS},
    "VeRA": {"kind": "VeraConfig", "r": 4, "target_modules": ["q_proj", "o_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_that_of_the_peft_model(kind):
    settings = dict(KINDS[kind])
    given = settings.pop("kind", None)
    model = adapted(kind=None if given is None else getattr(peft, given), **settings)
    expected = own_text(model)
    with model.disable_adapter():
        assert not torch.equal(own_text(model), expected)
    assert torch.equal(text(ss.optimize(model, SETTINGS)), expected)


def test_adapters_take_effect_at_once_and_each_state_is_compiled_once(compilations):
    model = adapted("default", "other")
    fast = ss.optimize(model.get_base_model(), SETTINGS)
    texts = set()
    for _ in range(2):
        texts.add(str(own_text(model)))
        assert torch.equal(text(fast), own_text(model))
        model.merge_adapter()
        assert torch.equal(text(fast), own_text(model))
        model.unmerge_adapter()
        model.set_adapter("other")
        texts.add(str(own_text(model)))
        assert torch.equal(text(fast), own_text(model))
        model.set_adapter("default")
        with model.disable_adapter():
            texts.add(str(own_text(model)))
            assert torch.equal(text(fast), own_text(model))
    assert len(texts) == 3
    assert len(compilations) == 4  # adapters apart, merged, the other, none
    with torch.no_grad():
        model.get_base_model().get_parameter("model.layers.0.mlp.down_proj.lora_B.default.weight").mul_(-3)
    assert torch.equal(text(fast), own_text(model))
    assert len(compilations) == 4 <= MOST_FORMS


def test_adapters_that_move_weights_come_and_go(compilations):
    model = adapted()
    fast = ss.optimize(model.get_base_model(), SETTINGS)
    model.merge_adapter(safe_merge=True)  # gives each weight other memory
    assert torch.equal(text(fast), own_text(model))
    model.unmerge_adapter()
    assert torch.equal(text(fast), own_text(model))
    for layer in adapter_layers(model).values():
        layer.set_scale("default", 3.0)
    assert torch.equal(text(fast), own_text(model))
    whole = model.merge_and_unload()
    assert torch.equal(text(fast), own_text(whole))
    assert len(compilations) == 5


def test_adapters_that_are_put_in_later(compilations):
    model = tiny("llama", num_hidden_layers=1)
    fast = ss.optimize(model, SETTINGS)
    around = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False)).eval()
    assert torch.equal(text(fast), own_text(around))
    assert len(compilations) == 2


def test_merged_adapters_that_are_disabled_are_unmerged_once():
    model = adapted()
    base = model.get_base_model()
    fast = ss.optimize(base, SETTINGS)
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    before = weight.clone()
    with model.disable_adapter():
        expected = own_text(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(text(fast), expected)
        assert torch.equal(own_text(model), expected)
    torch.testing.assert_close(weight, before)
    assert torch.equal(text(fast), own_text(model))


def test_what_goes_on_keeps_adapters_as_they_were():
    model = adapted()
    fast = ss.optimize(model.get_base_model(), SETTINGS)
    with fast.stream([[5, 6]], ss.SamplingParams(max_new_tokens=NEW)) as stream:
        with model.disable_adapter():
            for begin in (lambda: text(fast), lambda: stream.add([[5, 6]])):
                with pytest.raises(StaleParametersError, match="_disable_adapters was False"):
                    begin()
        assert sum(len(piece.token_ids) for piece in stream) == NEW
    with model.disable_adapter():
        assert torch.equal(text(fast), own_text(model))
    assert torch.equal(text(fast), own_text(model))


def test_what_else_has_changed_is_refused_as_ever():
    model = adapted(lora_dropout=0.1)
    fast = ss.optimize(model.get_base_model(), SETTINGS)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.scaling *= 2
    with pytest.raises(StaleParametersError, match=r"self_attn\.scaling"):
        text(fast)
    attention.scaling /= 2
    model.train()
    with pytest.raises(TrainingModeError, match="lora_dropout"):
        text(fast)
    model.eval()
    assert torch.equal(text(fast), own_text(model))


@pytest.mark.parametrize("equip", [ss.optimize, ss.install])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_what_is_not_in_layers_is_refused(kind, equip):
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=1), config)
    with pytest.raises(UnsupportedModelError, match=r"'default' is of type P.*Allowed: adapters in layers"):
        equip(model)


def test_the_guide():
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    (code,) = re.findall(r"^```python peft\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, "models.md", "exec"), {"ss": ss, "peft_model": adapted(), "input_ids": IDS[1:]})


def test_ranks_cannot_share_them():
    with pytest.raises(ParallelPlanError, match=r"q_proj has adapters.*merge_and_unload"):
        compile_model(adapted().get_base_model(), page_size=16, ranks=Ranks(0, 2, ""))


def test_rollouts_follow_adapters():
    model = adapted()
    ss.install(model, SETTINGS)
    base = model.get_base_model()
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompt = IDS[1:].tolist()[0]

    def both():
        (output,) = base.generate_batch([prompt], generation_config=greedy).values()
        own = base.generate(IDS[1:], generation_config=greedy)[0, len(prompt) :].tolist()
        return output.generated_tokens, own

    for change in (lambda: None, model.merge_adapter, model.unmerge_adapter):
        change()
        found, own = both()
        assert found == own
    with model.disable_adapter():
        found, own = both()
        assert found == own
