"""Layers of experts become sites, and sites our op; what a site cannot express keeps transformers' grouped products."""

import importlib
import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN

from sparsespec_compile.errors import GraphInvariantError
from sparsespec_compile.kernels.ops import ExpertsCall, ExpertsSettings, experts, experts_site
from sparsespec_compile.passes.base import find_calls
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.capture.experts import ExpertsSite, read_experts
from sparsespec_compile.passes.capture.interface import EXPERTS, IMPLEMENTATION
from sparsespec_compile.passes.capture.twin import twin_of
from sparsespec_compile.passes.compat import (
    EXPERTS_SETTING,
    experts_of_another_table,
    grouped_experts,
    implementations,
)
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.cost.terms import distinct_experts
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.proofs.verify import verify

from .families import tiny, tokens
from .prefill import prefill_step

PLAIN = ExpertsSettings("silu")
OPENAI = ExpertsSettings("swish", 1.702, 7.0, 1.0)

LAYERS: dict[str, tuple[str, ExpertsSettings, bool, bool]] = {
    "mixtral": ("MixtralExperts", PLAIN, False, False),
    "qwen3_moe": ("Qwen3MoeExperts", PLAIN, False, False),
    "olmoe": ("OlmoeExperts", PLAIN, False, False),
    "deepseek_v3": ("DeepseekV3Experts", PLAIN, False, False),
    "granitemoe": ("GraniteMoeExperts", PLAIN, False, False),
    "gpt_oss": ("GptOssExperts", OPENAI._replace(interleaved=True), True, True),
    "nemotron_h": ("NemotronHExperts", ExpertsSettings("relu2"), False, False),
    "aria_text": ("AriaExperts", PLAIN, True, False),
    "deepseek_v4": ("DeepseekV4Experts", PLAIN._replace(limit=10.0), False, False),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", OPENAI, True, True),
    "gemma4_text": ("Gemma4TextExperts", ExpertsSettings("gelu_tanh"), False, False),
}
"""Family: the class of its experts, and what is read: settings, whether matrices are transposed, biases."""

SIZES = ("intermediate_size", "moe_intermediate_size", "moe_num_experts", "num_local_experts", "num_experts")


def layer_of(family: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A layer of experts as the family writes it, and what it may be called with."""
    try:
        config = AutoConfig.for_model(family, hidden_size=32)
        file = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
        kind = getattr(file, LAYERS[family][0])
    except (ValueError, AttributeError):
        pytest.skip(f"this transformers has no {family} whose experts are written so")
    for name, size in zip((*SIZES, "n_routed_experts"), (16, 16, 4, 4, 4, 4), strict=True):
        if hasattr(config, name):
            setattr(config, name, size)
    torch.manual_seed(0)
    module = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    weight, index = torch.rand(9, len(module.down_proj)).topk(2, dim=1)
    return module, (4 * torch.randn(9, width), index, weight)


@pytest.mark.parametrize("family", LAYERS)
@torch.no_grad()
def test_a_site_gives_the_bits_of_the_family_s_own_code(family):
    module, call = layer_of(family)
    _, settings, transposed, biased = LAYERS[family]
    site = read_experts(module, *call)
    assert isinstance(site, ExpertsSite), site
    assert (site.settings, site.transposed, site.biased) == (settings, transposed, biased)
    assert torch.equal(site.call(module, *call), grouped_experts(module, *call))
    module.config._experts_implementation_internal = "eager"
    assert torch.equal(site.call(module, *call), module(*call))


class _Odd(nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x) + 1e-6 * x


class _Quantised(torch.Tensor):
    pass


def _quantise(layer):
    layer.down_proj = nn.Parameter(layer.down_proj.detach().as_subclass(_Quantised))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: setattr(layer, "act_fn", _Odd()), "what it does between its products is not known"),
        (lambda layer: setattr(layer, "act_fn", ACT2FN["tanh"]), "what it does between its products is not known"),
        (lambda layer: setattr(layer, "act_fn", nn.PReLU()), "it holds act_fn.weight, down_proj, gate_up_proj"),
        (lambda layer: setattr(layer, "has_post_expert_norm", True), "it normalises what experts give"),
        (lambda layer: setattr(layer, "is_transposed", True), "gate_up_proj is .*, and would have to be"),
        (_quantise, "its weights are of type _Quantised"),
        (lambda layer: layer.double(), "its rows are in torch.float32 and its weights in torch.float64"),
    ],
)
@torch.no_grad()
def test_what_a_site_cannot_express_is_left(change, why):
    module, call = layer_of("mixtral")
    change(module)
    reason = read_experts(module, *call)
    assert isinstance(reason, str)
    assert re.search(why, reason), reason


def odd_model():
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = _Odd()
    return model


@torch.no_grad()
def run(compiled):
    return compiled.graph_module(*prefill_step(compiled.layout, [tokens(17)]).inputs)


def test_a_model_of_other_experts_keeps_its_grouped_products_and_the_report_says_so(bench):
    compiled = compile_model(odd_model(), page_size=16)
    assert not find_calls(compiled.graph_module.graph, experts)
    notes = compiled.report.notes("capture")
    assert len(notes) == 2
    assert "model.layers.0.mlp.experts keeps its grouped products: what it does between" in notes[0]
    usual = graph_cost(bench("mixtral").compiled.graph_module).term("experts")
    assert (graph_cost(compiled.graph_module).term("experts").bytes - usual.bytes).simplify() == 0


def test_every_layer_of_experts_becomes_one_node(bench):
    captured = find_calls(bench("mixtral").captured.graph_module.graph, experts_site)
    compiled = bench("mixtral").compiled
    nodes = find_calls(compiled.graph_module.graph, experts)
    assert len(captured) == len(nodes) == 2
    assert not find_calls(compiled.graph_module.graph, experts_site)
    assert not [node for node in compiled.graph_module.graph.nodes if "grouped" in str(node.target)]
    assert {record.name: record.matches for record in compiled.report.passes}["experts to kernel"] == 2
    said = compiled.report.notes("experts to kernel")
    assert said == ("2 layers of 4 experts of 64 hidden values, 2 of a row, silu",)


def test_another_choice_of_the_user_stays():
    model = tiny("mixtral")
    model.set_experts_implementation("batched_mm")
    assert not find_calls(capture(model).graph_module.graph, experts_site)
    model.set_experts_implementation("eager")
    assert len(find_calls(capture(model).graph_module.graph, experts_site)) == 2
    assert model.config._experts_implementation == "eager"


def test_experts_with_a_table_of_their_own_do_not_meet_a_name_that_it_lacks():
    """As those of quantised models, which look their implementation up elsewhere."""
    model = tiny("mixtral")
    assert implementations(twin_of(model).config)[EXPERTS_SETTING] == IMPLEMENTATION

    def decorated(experts_interface):
        def forward(self, *args):
            return experts_interface[self.config._experts_implementation](self, *args)

        return forward

    kind = type(model.model.layers[1].mlp.experts)
    model.model.layers[1].mlp.experts.__class__ = type("Quantised", (kind,), {"forward": decorated({})})
    twin = twin_of(model)
    assert implementations(twin.config)[EXPERTS_SETTING] == EXPERTS
    found = [experts_of_another_table(layer.mlp.experts) for layer in twin.model.layers]
    assert found == [False, True]


def test_the_verifier_leaves_no_site_behind(bench):
    compiled = bench("mixtral").compiled
    graph_module = compile_model(tiny("mixtral"), page_size=16).graph_module
    (node, *_) = find_calls(graph_module.graph, experts)
    with graph_module.graph.inserting_before(node):
        site = graph_module.graph.call_function(experts_site, (*node.args, False))
    node.replace_all_uses_with(site)
    with pytest.raises(GraphInvariantError, match=r"experts_site.* must not be in a graph after the attention rewrite"):
        verify(graph_module, compiled.layout)


def test_transposed_matrices_are_viewed_and_not_moved(bench):
    """As gpt-oss's are: a site whose matrices lie the other way becomes the same op on views."""
    model = tiny("mixtral")
    expected = run(bench("mixtral").compiled)
    for layer in model.model.layers:
        block = layer.mlp.experts
        block.is_transposed = True
        for name in ("gate_up_proj", "down_proj"):
            setattr(block, name, nn.Parameter(getattr(block, name).detach().transpose(1, 2).contiguous()))
    compiled = compile_model(model, page_size=16)
    assert torch.allclose(run(compiled), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for node in find_calls(compiled.graph_module.graph, experts):
        call = ExpertsCall.of(node.args)
        assert call.up.target is call.down.target is torch.ops.aten.transpose.int
        assert call.up.args[0].op == call.down.args[0].op == "get_attr"


@pytest.mark.parametrize(("count", "chosen", "rows"), [(128, 8, 1), (128, 8, 64), (8, 2, 3), (4, 4, 5)])
def test_expected_distinct_experts(count, chosen, rows):
    generator = torch.Generator().manual_seed(0)
    trials = 4000
    picks = torch.rand(trials, rows, count, generator=generator).topk(chosen, dim=2).indices.flatten(1)
    counted = torch.zeros(trials, count).scatter_(1, picks, 1.0).sum(1)
    expected = float(distinct_experts(rows, count, chosen))
    assert abs(float(counted.mean()) - expected) <= 5 * float(counted.std()) / trials**0.5 + 1e-4
    assert float(distinct_experts(1, count, chosen)) == pytest.approx(chosen)
