"""Fused projections: one tensor, the model's parameters in its memory, in every use of either."""

import copy
import gc

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from sparsespec_compile.passes.pipeline import compile_model

from .families import DOZEN, logits, telling, tiny, tokens
from .prefill import prefill

aten = torch.ops.aten
SEQUENCE = tokens(13)


def compiled_logits(compiled):
    return prefill(compiled, [SEQUENCE])[0]


def linears(compiled):
    return len(compiled.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default))


def bytes_held(*modules):
    """Bytes of memory in all storages, those that several cover counted once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = [tensor.untyped_storage() for tensor in tensors]
    held, end = 0, 0
    for first, last in sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages):
        held += max(last - max(first, end), 0)
        end = max(end, last)
    return held


@pytest.mark.parametrize("family", telling(DOZEN))
def test_linears_that_share_an_input_are_one(bench, family):
    case = bench(family)
    inputs = [
        node.args[0]
        for node in case.compiled.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    ]
    left = [note for note in case.compiled.report.notes("fuse projections") if note.startswith("left")]
    assert len(set(inputs)) == len(inputs) or left


def test_llama_has_four_linears_a_layer(bench):
    compiled = bench("llama").compiled
    assert linears(compiled) == 4 * len(compiled.layout.layers) + 1
    assert len(compiled.report.notes("fuse projections")) == 2 * len(compiled.layout.layers)


def test_biases_are_fused_with_the_weights():
    model = tiny("qwen2")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    expected = logits(model, SEQUENCE)
    compiled = compile_model(model, page_size=16)
    assert any(name.startswith("fused_bias") for name, _ in compiled.graph_module.named_parameters())
    assert torch.allclose(compiled_logits(compiled), expected, atol=1e-4)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.bias += 1
    changed = logits(model, SEQUENCE)
    assert not torch.allclose(changed, expected, atol=1e-2)
    assert torch.allclose(compiled_logits(compiled), changed, atol=1e-4)


def test_changes_in_place_reach_the_graph():
    model = tiny("llama")
    compiled = compile_model(model, page_size=16)
    for path in (
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "lm_head",
    ):
        before = compiled_logits(compiled)
        with torch.no_grad():
            model.get_submodule(path).weight.mul_(1.5)
        expected = logits(model, SEQUENCE)
        assert not torch.allclose(before, expected, atol=1e-2), path
        assert torch.allclose(compiled_logits(compiled), expected, atol=1e-4), path
    model.load_state_dict(tiny("llama", seed=3).state_dict())
    assert torch.allclose(compiled_logits(compiled), logits(model, SEQUENCE), atol=1e-4)
    compiled.record.require()


def test_compiling_in_inference_mode_leaves_parameters_that_an_optimizer_can_change():
    model = tiny("llama")
    with torch.inference_mode():
        compiled = compile_model(model, page_size=16)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    before = compiled_logits(compiled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(SEQUENCE[None], labels=SEQUENCE[None]).loss.backward()
    optimizer.step()
    expected = logits(model, SEQUENCE)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.allclose(compiled_logits(compiled), expected, atol=1e-4)


def test_saved_model_is_the_same(tmp_path):
    model = tiny("qwen3")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected_logits = logits(model, SEQUENCE)
    compile_model(model, page_size=16)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, SEQUENCE), expected_logits)


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "gemma2"))]
)
def test_libraries_that_look_at_storages_find_each_parameter_in_its_own(family, tmp_path):
    model = tiny(family)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = compile_model(model, page_size=16)
    with torch.no_grad():  # what is saved is what the graph reads
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    save_model(model, tmp_path / "model.safetensors")
    save_file(dict(model.state_dict()), tmp_path / "file.safetensors")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    sizes = [(tmp_path / name).stat().st_size for name in ("file.safetensors", "state.pt")]
    assert max(sizes) < sum(tensor.nbytes for tensor in expected.values()) + 30_000
    again = tiny(family, seed=5)
    load_model(again, tmp_path / "model.safetensors")
    assert torch.allclose(compiled_logits(compiled), logits(again, SEQUENCE), atol=1e-4)
    load_model(model, tmp_path / "model.safetensors")
    model.load_state_dict(expected)
    assert torch.allclose(compiled_logits(compiled), logits(model, SEQUENCE), atol=1e-4)
    compiled.record.require()


def test_the_memory_of_fused_parameters_outlives_the_graph():
    model = tiny("llama")
    expected = logits(model, SEQUENCE)
    compile_model(model, page_size=16)
    gc.collect()
    filler = [torch.full((64, 48), float("nan")) for _ in range(200)]  # takes what memory was given back
    assert torch.equal(logits(model, SEQUENCE), expected)
    del filler


def test_a_copied_model_has_parameters_of_its_own():
    model = tiny("llama")
    compiled = compile_model(model, page_size=16)
    expected = compiled_logits(compiled)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(compiled_logits(compiled), expected)


def test_no_bytes_are_doubled():
    model = tiny("qwen3", tie_word_embeddings=False)
    before = bytes_held(model)
    compiled = compile_model(model, page_size=16)
    gc.collect()
    assert bytes_held(model, compiled.graph_module) == before


def test_compiling_twice_shares_the_same_storage():
    model = tiny("llama")
    first = compile_model(model, page_size=16)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    second = compile_model(model, page_size=16)
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    assert linears(second) == linears(first)
    first.record.require()
    assert torch.equal(compiled_logits(first), compiled_logits(second))


def tie(model):
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.v_proj.weight


def repeat(model):
    model.model.layers[0].forward = lambda x, **options: twice(type(model.model.layers[0]), model, x, options)


def twice(layer, model, x, options):
    return layer.forward(model.model.layers[0], layer.forward(model.model.layers[0], x, **options), **options)


def transpose(model):
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(tie, "is tied"), (transpose, "not contiguous"), (repeat, "used more than once")],
)
def test_odd_parameters_are_left_alone_with_the_reason(change, reason):
    model = tiny("llama")
    change(model)
    weight = model.model.layers[0].self_attn.k_proj.weight
    address = weight.data_ptr()
    compiled = compile_model(model, page_size=16)
    left = [note for note in compiled.report.notes("fuse projections") if note.startswith("left")]
    assert any("layers.0.self_attn" in note and reason in note for note in left)
    assert weight.data_ptr() == address
    assert torch.allclose(compiled_logits(compiled), logits(model, SEQUENCE), atol=1e-4)


def test_an_input_that_is_written_between_projections_is_not_shared(monkeypatch):
    """The second projection reads another value of the same tensor; fused, it would read the first one's."""
    forward = modeling_llama.LlamaMLP.forward

    def writing(self, x):
        x = x.clone()
        gate = self.act_fn(self.gate_proj(x))
        x[0].mul_(0.5)
        return self.down_proj(gate * self.up_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", writing)
    model = tiny("llama")
    compiled = compile_model(model, page_size=16)
    expected = logits(model, SEQUENCE)
    assert torch.allclose(compiled_logits(compiled), expected, atol=1e-4)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert not torch.allclose(logits(model, SEQUENCE), expected, atol=1e-2)
    assert any("written in place" in note for note in compiled.report.notes("fuse projections"))


def test_a_lone_bias_keeps_its_projection_apart():
    model = tiny("llama")
    projection = model.model.layers[0].self_attn.v_proj
    projection.bias = torch.nn.Parameter(torch.randn(projection.out_features))
    compiled = compile_model(model, page_size=16)
    notes = compiled.report.notes("fuse projections")
    assert any(note.startswith("left model.layers.0.self_attn.v_proj.weight") and "bias" in note for note in notes)
    assert torch.allclose(compiled_logits(compiled), logits(model, SEQUENCE), atol=1e-4)
