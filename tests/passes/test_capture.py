"""Capture: the graph computes what the model computes, and the model is left as it was found."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial, update_wrapper
from types import MethodType

import pytest
import torch

from sparsespec_compile.kernels.ops import ExpertsCall, ExpertsSettings, SiteCall, attention_site, experts_site
from sparsespec_compile.passes.base import attribute, call_of, fake_mode, find_calls
from sparsespec_compile.passes.capture.capture import PackedModel, capture
from sparsespec_compile.passes.capture.interface import model_configs
from sparsespec_compile.passes.capture.twin import twin_of
from sparsespec_compile.passes.errors import (
    AttentionInterfaceError,
    ExportError,
    PositionError,
    RowMixingError,
    UnsupportedAttentionError,
    UnsupportedModelError,
)
from sparsespec_compile.passes.pipeline import compile_model

from .families import DOZEN, OTHERS, each, logits, tiny, tokens

FAMILIES = (*DOZEN, "qwen3_moe", "olmoe", "deepseek_v3", "opt")


def run(captured, sequence, kept):
    with torch.no_grad():
        return captured.graph_module(
            input_ids=sequence[None], position_ids=torch.arange(len(sequence))[None], logits_to_keep=kept
        )[0]


@pytest.mark.parametrize("family", each(FAMILIES))
def test_captured_graph_gives_the_models_logits(bench, family):
    case = bench(family)
    for sequence, expected in zip(case.sequences, case.expected, strict=True):
        assert case.close(run(case.captured, sequence, torch.arange(len(sequence))), expected)


def test_any_number_of_rows_and_of_logits_from_two_up(bench):
    case = bench("llama")
    for rows in (2, 3, 64, 200):
        sequence = tokens(rows, seed=rows)
        kept = torch.tensor([rows - 1, 0])
        with torch.no_grad():
            expected = case.model(sequence[None]).logits[0, kept]
        assert case.close(run(case.captured, sequence, kept), expected)


def test_shapes_are_derived_without_torch_s_cache(bench):
    assert not fake_mode(bench("llama").captured.graph_module).cache_enabled


@pytest.mark.parametrize("vocabulary", [2, 8])
def test_a_small_vocabulary(vocabulary):
    model = tiny("llama", vocab_size=vocabulary, bos_token_id=0, eos_token_id=None, pad_token_id=None)
    sequence = torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        expected = model(sequence[None]).logits[0]
    assert torch.allclose(run(capture(model), sequence, torch.arange(5)), expected, atol=1e-5)


def test_parameters_are_the_models_own():
    model = tiny("qwen2")
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in capture(model).graph_module.parameters()} <= own


def test_sites_say_what_the_model_does():
    layers = [site.layer for site in capture(tiny("gemma2")).sites]
    assert [layer.window for layer in layers] == [20, 0]
    assert {layer.softcap for layer in layers} == {5.0}
    assert {layer.scale for layer in layers} == {8**-0.5}
    assert {(layer.q_heads, layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers} == {(6, 2, 8, 8)}
    latent = capture(tiny("deepseek_v3")).sites[0].layer
    assert (latent.key_dim, latent.value_dim) == (24, 12)


def fingerprint(model):
    """All that a capture could change: flags, settings, objects in every module, and their values."""
    modules = [
        (path, module.training, tuple(map(id, module._parameters.values())), tuple(map(id, module._buffers.values())))
        for path, module in model.named_modules()
    ]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    return modules, [copy.deepcopy(vars(config)) for config in model_configs(model)], attributes, values


def assert_untouched(before, after):
    assert before[:3] == after[:3]
    assert before[3].keys() == after[3].keys()
    assert all(torch.equal(before[3][name], after[3][name]) for name in before[3])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_model_is_left_as_it_was(family):
    model = tiny(family).train()
    model.get_submodule("model.layers.1").eval()
    model.config._attn_implementation = "eager"
    if family == "mixtral":
        model.config._experts_implementation = "eager"
    before = fingerprint(model)
    capture(model)
    assert_untouched(before, fingerprint(model))


@pytest.mark.parametrize("refused", [True, False])
def test_model_is_left_as_it_was_after_a_failure(refused, monkeypatch):
    model = tiny("llama").train()
    if refused:
        model.config.sliding_window = 9
    else:
        monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x if x.sum() > 0 else -x)
    before = fingerprint(model)
    with pytest.raises((UnsupportedAttentionError, ExportError)):
        capture(model)
    assert_untouched(before, fingerprint(model))


def test_random_state_is_left_alone():
    model = tiny("llama")
    state = torch.get_rng_state()
    capture(model)
    assert torch.equal(state, torch.get_rng_state())


def test_sinks_are_those_of_the_model():
    model = tiny("gpt_oss")
    graph_module = capture(model).graph_module
    sinks = [call_of(SiteCall, site).sinks for site in find_calls(graph_module.graph, attention_site)]
    for layer, given in zip(model.model.layers, sinks, strict=True):
        assert attribute(graph_module, given.target).data_ptr() == layer.self_attn.sinks.data_ptr()


def test_other_masks_are_refused_by_name(monkeypatch):
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama import modeling_llama

    def every_other(**options):
        return create_causal_mask(**options, and_mask_function=lambda b, h, q, k: (q - k) % 2 == 0)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", every_other)
    with pytest.raises(UnsupportedAttentionError, match=r"model\.layers\.0\.self_attn.*neither causal nor"):
        capture(tiny("llama"))


def test_chunks_and_temperatures_are_the_models(monkeypatch):
    """Positions far from those of the rehearsal, too: the temperature rises every 12 tokens, chunks have 16."""
    model = tiny("llama4_text")
    captured = capture(model)
    assert [(site.layer.window, site.layer.chunked) for site in captured.sites] == [(16, True), (0, False), (16, True)]
    sequence = tokens(61)
    torch.testing.assert_close(run(captured, sequence, torch.arange(61)), logits(model, sequence))
    monkeypatch.setattr("sparsespec_compile.passes.capture.capture.count_positions", lambda twin: None)
    with pytest.raises(RowMixingError, match=r"positions = .*depends on the number of a row"):
        compile_model(model, page_size=16)


def test_a_temperature_of_unknown_places_is_refused():
    model = tiny("llama4_text")
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("Other", (type(attention),), {"forward": lambda self, hidden_states: hidden_states})
    with pytest.raises(PositionError, match=r"layers\.1\.self_attn scales its queries.*cache or past_key_values"):
        capture(model)


@pytest.mark.parametrize("chosen", [1, 3])
def test_experts_of_scored_inputs(chosen):
    model = tiny("llama4_text", num_experts_per_tok=chosen, num_hidden_layers=1, no_rope_layers=[1], moe_layers=[0])
    captured = capture(model)
    (site,) = find_calls(captured.graph_module.graph, experts_site)
    assert not captured.notes
    assert ExpertsCall.of(site.args[:-1]).settings == ExpertsSettings("silu")
    sequence = tokens(23)
    torch.testing.assert_close(run(captured, sequence, torch.arange(23)), logits(model, sequence))


def test_experts_of_scored_inputs_that_do_something_else_are_refused(monkeypatch):
    """As a later version of transformers may."""
    model = tiny("llama4_text", num_hidden_layers=1, no_rope_layers=[1], moe_layers=[0])
    kind = type(model.model.layers[0].feed_forward)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, rows: (own(self, rows)[0] * 1.01, None))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.feed_forward \(Llama4TextMoe\) gives other numbers"):
        capture(model)


def test_a_window_in_the_cache_alone_is_refused():
    """The masks show everything, transformers' cache would keep a window: with it the text is another."""
    model = tiny("llama")
    model.config.sliding_window = 9
    with pytest.raises(UnsupportedAttentionError, match=r"config\.sliding_window is 9"):
        capture(model)


def test_a_mask_that_the_model_changed_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    create = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **options: create(**options).float() * 2)
    with pytest.raises(UnsupportedAttentionError, match="additive"):
        capture(tiny("llama"))


def test_bidirectional_attention_is_refused():
    model = tiny("llama")
    model.config.is_causal = False
    with pytest.raises(UnsupportedAttentionError, match="bidirectional"):
        capture(model)


def test_attention_outside_the_interface_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    def own(self, hidden_states, **options):
        return hidden_states, None

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", own)
    with pytest.raises(AttentionInterfaceError, match="no call to transformers' AttentionInterface"):
        capture(tiny("llama"))


def test_a_model_without_positions_is_refused(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, use_cache=None: None)
    with pytest.raises(PositionError, match="takes no position_ids"):
        capture(model)


def test_errors_of_export_are_named_and_chained(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(ExportError, match=r"traced by torch\.export") as caught:
        capture(model)
    assert caught.value.__cause__ is not None


def test_errors_of_the_model_are_named_and_chained(monkeypatch):
    model = tiny("llama")

    def broken(self, x):
        raise ZeroDivisionError("the model's own")

    monkeypatch.setattr(type(model.model.norm), "forward", broken)
    with pytest.raises(ExportError, match="ZeroDivisionError: the model's own") as caught:
        capture(model)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_different_number_of_calls_in_the_trace_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaDecoderLayer.forward
    calls = []

    def growing(self, hidden_states, **options):
        calls.append(self)
        output = forward(self, hidden_states, **options)
        return forward(self, output, **options) if len(calls) > 3 else output

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", growing)
    with pytest.raises(AttentionInterfaceError, match="differs between two runs"):
        capture(tiny("llama"))


def test_logits_are_cut_when_the_model_cannot(monkeypatch):
    model = tiny("llama")
    forward = type(model).forward
    sequence = tokens(9)
    expected = model(sequence[None]).logits[0, [2, 5]].detach()

    def older(self, input_ids, position_ids=None, use_cache=None, return_dict=None):
        return forward(self, input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", older)
    got = run(capture(model), sequence, torch.tensor([2, 5]))
    assert torch.allclose(got, expected, atol=1e-4)


def test_families_in_this_module_exist():
    assert set(FAMILIES) - set(OTHERS) <= set(DOZEN)


def in_threads(*jobs):
    """Runs each in a thread of its own, with threads that change as often as may be; raises the first error."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            for future in [pool.submit(job) for job in jobs]:
                future.result()
    finally:
        sys.setswitchinterval(interval)


def test_a_model_generates_in_other_threads_while_it_is_compiled():
    model, prompt, done = tiny("gemma3_text"), tokens(9)[None], threading.Event()
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
    texts = []

    def generate():
        while not done.is_set():
            texts.append(model.generate(prompt, max_new_tokens=12, do_sample=False))

    def compile_it():
        try:
            compile_model(model, page_size=16)
        finally:
            done.set()

    in_threads(generate, generate, compile_it)
    assert len(texts) > 1
    assert all(torch.equal(text, expected) for text in texts)


def test_models_are_compiled_in_several_threads_at_once():
    model = tiny("llama")
    in_threads(*(partial(compile_model, model, page_size=16) for _ in range(3)))
    assert torch.equal(model.lm_head.weight, tiny("llama").lm_head.weight)
    compile_model(tiny("mistral"), page_size=16)


def doubled(module):
    """`forward` set on a module: what it was, with its first output doubled, found through a closure and a default."""
    before = module.forward

    def forward(*args, again=before, **kwargs):
        output, *rest = before(*args, **kwargs)
        return (output + again(*args, **kwargs)[0], *rest)

    module.forward = forward


def test_what_was_set_on_a_module_is_captured_with_it():
    """Whether it is reached by a closure, a default, a method, a partial or a list, attention is the twin's."""
    model = tiny("llama")
    doubled(model.model.layers[0].self_attn)
    attention = model.model.layers[1].self_attn
    attention.forward = partial(attention.forward)
    attention.notes = [attention, {"of": attention}]
    graph = capture(model)
    assert len(graph.sites) == 3
    sequence = tokens(11)
    positions = torch.arange(11)[None]
    got = graph.graph_module(input_ids=sequence[None], position_ids=positions, logits_to_keep=torch.arange(11))
    assert torch.allclose(got[0], logits(model, sequence), atol=1e-4)


def test_a_forward_that_was_wrapped_keeps_its_signature():
    """As Accelerate's hooks wrap it. Without `logits_to_keep` in it, every row would get logits."""
    model = tiny("llama")
    model.before = model.forward
    model.forward = update_wrapper(
        partial(lambda module, *args, **named: module.before(*args, **named), model), model.before
    )
    twin = twin_of(model)
    assert PackedModel(twin).selects_rows
    assert twin.forward.args == (twin,)
    assert twin.before.__self__ is twin


@pytest.mark.parametrize("passes_on", [True, False])
def test_a_method_around_the_forward_takes_anything(passes_on):
    """As TRL's trainers set one: a function of theirs, bound to the model, with the model's own in a closure."""
    model = tiny("llama")
    before = model.forward

    def forward(self, *args, logits_to_keep=None, **named):
        return before(*args, **named)

    def anything(self, *args, **named):
        return before(*args, **named)

    model.forward = MethodType(anything if passes_on else lambda self, *a, **named: forward(self, *a, **named), model)
    graph = capture(model)
    assert len(graph.sites) == 2
    rows = torch.tensor([2, 10])
    sequence, positions = tokens(11), torch.arange(11)[None]
    got = graph.graph_module(input_ids=sequence[None], position_ids=positions, logits_to_keep=rows)
    assert torch.allclose(got[0], logits(model, sequence)[rows], atol=1e-4)


def test_a_twin_shares_tensors_and_nothing_that_changes():
    model = tiny("mixtral").train()
    attention = model.model.layers[0].self_attn
    attention.again = [attention]
    other = twin_of(model)
    assert all(a is b for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(other.buffers(), model.buffers(), strict=True))
    assert not {id(module) for module in other.modules()} & {id(module) for module in model.modules()}
    assert not {id(config) for config in model_configs(other)} & {id(config) for config in model_configs(model)}
    assert other.model.layers[0].self_attn.again == [other.model.layers[0].self_attn]
    assert not any(module.training for module in other.modules())
    assert all(module.training for module in model.modules())
    other.register_buffer("added", torch.zeros(1))
    del other.model
    other.config.added = 1
    assert (hasattr(model, "added"), hasattr(model, "model"), hasattr(model.config, "added")) == (False, True, False)
