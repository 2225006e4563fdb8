"""Models with torchao's weights: the graph reads the parts of each weight, and rewrites let them be."""

import pytest
import torch

from sparsespec_compile.errors import ParallelPlanError, StaleParametersError, UnsupportedModelError
from sparsespec_compile.passes.capture.quantised import inner_tensors, plain_tensors
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.ranks import Ranks

from .families import tiny

pytestmark = pytest.mark.slow
quantization = pytest.importorskip("torchao.quantization", reason="needs '.[formats]'")


def quantised(config=None, **settings):
    model = tiny("llama", hidden_size=96, intermediate_size=128, head_dim=16, num_hidden_layers=1, **settings)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig() if config is None else config)
    return model


@pytest.fixture(scope="module")
def model():
    return quantised()


@pytest.fixture(scope="module")
def compiled(model):
    return compile_model(model, page_size=16)


def test_the_graph_reads_the_very_tensors_of_the_model(model, compiled):
    read = {value.data_ptr() for value in compiled.graph_module.buffers()}
    for linear in ("self_attn.q_proj", "mlp.down_proj"):
        weight = model.get_parameter(f"model.layers.0.{linear}.weight")
        assert {weight.qdata.data_ptr(), weight.scale.data_ptr()} <= read
    assert not any("subclass" in str(node.target) for node in compiled.graph_module.graph.nodes)


def test_projections_are_not_fused(compiled):
    assert not any("fused" in name for name, _ in compiled.graph_module.named_parameters())


def test_cost_counts_the_bytes_that_hold_weights(model, compiled):
    terms = {term.name: term for term in graph_cost(compiled.graph_module).terms}
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert terms["projections"].bytes == sum(weight.numel() for weight in weights)  # scales come after the products
    assert sum(value.numel() * value.itemsize for value in plain_tensors(weights)) < 1.1 * terms["projections"].bytes


def test_a_part_that_was_replaced_is_noticed(model, compiled):
    weight = model.model.layers[0].self_attn.q_proj.weight
    scale = weight.scale
    compiled.record.require()
    weight.scale = scale.clone()
    with pytest.raises(StaleParametersError, match=r"q_proj\.weight\.scale was moved"):
        compiled.record.require()
    weight.scale = scale
    compiled.record.require()


def test_parts_at_any_depth():
    plain = torch.ones(2)
    assert [(name, id(value)) for name, value in inner_tensors(plain)] == [("", id(plain))]
    names = [name for name, _ in inner_tensors(quantised().lm_head.weight)]
    assert {"qdata", "scale"} <= set(names)


def test_ranks_cannot_share_it():
    with pytest.raises(ParallelPlanError, match="Int8Tensor"):
        compile_model(quantised(), page_size=16, ranks=Ranks(0, 2, ""))


def test_rounded_activations_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"rounds activations to torch.int8.*Allowed: .* weights alone"):
        compile_model(quantised(quantization.Int8DynamicActivationInt8WeightConfig()), page_size=16)
