"""The compiled graph: whole prompts through the dual-mode op give HuggingFace's logits, packed in any company."""

import pytest
import torch

from sparsespec_compile.kernels.ops import STEP_TENSORS, SiteCall, attention_site, dual_mode_attention
from sparsespec_compile.passes.base import INPUTS, STATE_INPUTS, PassContext, call_of, find_calls
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.errors import GraphInvariantError, PassMatchError, UnsupportedAttentionError
from sparsespec_compile.passes.rewrites.dual_mode import AttentionToDualMode
from sparsespec_compile.passes.rewrites.normalise import Normalise

from .families import DOZEN, each, tokens
from .prefill import PAGES_PER_REQUEST, prefill, prefill_step

FAMILIES = (*DOZEN, "qwen3_moe", "olmoe", "deepseek_v3", "opt")


@pytest.mark.parametrize("family", each(FAMILIES))
def test_prefill_gives_the_models_logits_alone_and_packed(bench, family):
    case = bench(family)
    for sequence, expected in zip(case.sequences, case.expected, strict=True):
        assert case.close(prefill(case.compiled, [sequence])[0], expected)
    for got, expected in zip(prefill(case.compiled, case.sequences), case.expected, strict=True):
        assert case.close(got, expected)


@pytest.mark.parametrize("family", each(DOZEN))
def test_nothing_is_specialised(bench, family):
    """Signature, symbols and sizes: rows, kept rows, requests, pages, score rows and positions, pillars."""
    case = bench(family)
    graph_module, layout = case.compiled.graph_module, case.compiled.layout
    inputs = graph_module.graph.find_nodes(op="placeholder")
    assert tuple(node.target for node in inputs) == (*INPUTS, *STATE_INPUTS, *STEP_TENSORS)
    shapes = {node.target: tuple(node.meta["val"].shape) for node in inputs}
    free = [shapes["input_ids"][1], shapes["logits_to_keep"][0], shapes["kv_pool"][0], shapes["page_table"][2]]
    free += [shapes["scores"][0], shapes["scores"][2], shapes["pillar_index"][0], shapes["pillar_index"][2]]
    assert all(isinstance(size, torch.SymInt) for size in free)
    assert len({str(size) for size in free}) == len(free)
    assert shapes["kv_pool"][1] == layout.elements_per_page
    assert shapes["page_table"][0] == len(layout.groups)
    (tables,) = (node for node in inputs if node.target == "page_table")
    assert len(tables.users) == len(layout.groups), "layers of a group share one tensor, which plans are kept by"
    assert shapes["scores"][1] == shapes["pillar_index"][1] == layout.total_kv_heads
    shape_env = inputs[0].meta["val"].fake_mode.shape_env
    ranges = [shape_env.var_to_range[size.node.expr] for size in free[:2]]
    assert all(found.lower <= 2 and found.upper > 10**9 for found in ranges)


@pytest.mark.parametrize("slots", [2, 5])
def test_number_of_slots_and_of_rows_is_free(bench, slots):
    case = bench("qwen3")
    sequences = [tokens(2, seed=8), case.sequences[1]]
    alone = prefill(case.compiled, sequences[:1])[0]
    packed = prefill(case.compiled, sequences, slots)
    assert case.close(packed[0], alone)
    assert case.close(packed[1], case.expected[1])


def test_each_layer_writes_its_own_part_of_the_pool_and_of_the_scores(bench):
    case = bench("gemma2")
    layout = case.compiled.layout
    step = prefill_step(layout, [case.sequences[1]])
    with torch.no_grad():
        case.compiled.graph_module(*step.inputs)
    rows = len(case.sequences[1])
    tables = step.inputs[6 + STEP_TENSORS.index("page_table")]
    assert len(tables) == 2
    for index, layer in enumerate(layout.layers):
        start, pages = layout.page_offset(index), tables[layout.group_of(index), 0]
        part = step.pool[:, start : start + layout.page_elements(index)]
        kv = part.view(-1, layer.kv_heads, layout.page_size, layer.key_dim + layer.value_dim)[pages.long()]
        filled = kv.transpose(1, 2).flatten(0, 1)[: PAGES_PER_REQUEST * layout.page_size].abs().sum((1, 2)) > 0
        assert filled[:rows].all()
        assert not filled[rows:].any()
        heads = slice(layout.head_offset(index), layout.head_offset(index) + layer.kv_heads)
        seen = step.scores[0, heads, : rows - 2] > 0
        first_seen = max(rows - 1 - layer.window, 0) if layer.window else 0
        assert seen[:, first_seen:].all()
        assert not seen[:, : first_seen - 1].any() or not layer.window
    assert not step.scores[1:].any()


def at_site_stage(bench, family):
    """A normalised graph with its sites, and the context of its passes."""
    case = bench(family)
    compiled = case.compiled
    context = PassContext(case.model, compiled.layout, compiled.report)
    graph_module = capture(case.model).graph_module
    Normalise(context)(graph_module)
    return graph_module, context


def test_a_missing_site_is_reported_with_the_nearest_nodes(bench):
    graph_module, context = at_site_stage(bench, "llama")
    site = find_calls(graph_module.graph, attention_site)[0]
    site.target = dual_mode_attention
    with pytest.raises(PassMatchError, match=r"found 1 nodes.*must find 2") as caught:
        AttentionToDualMode(context)(graph_module)
    nearest = str(caught.value).split("Nearest nodes:\n")[1].splitlines()
    assert "sparsespec.attention_site" in nearest[0]
    assert "sparsespec.dual_mode_attention" in nearest[1]
    assert "in model.model.layers" in nearest[0]


def test_sites_out_of_order_are_refused(bench):
    graph_module, context = at_site_stage(bench, "llama")
    first, second = find_calls(graph_module.graph, attention_site)
    for layer, node in ((1, first), (0, second)):
        node.args = call_of(SiteCall, node)._replace(layer=layer).arguments()
    with pytest.raises(GraphInvariantError, match="not in the layout's order"):
        AttentionToDualMode(context)(graph_module)


def test_attention_in_another_type_than_the_models_is_refused(bench):
    graph_module, context = at_site_stage(bench, "llama")
    site = find_calls(graph_module.graph, attention_site)[0]
    site.all_input_nodes[0].meta["val"] = site.all_input_nodes[0].meta["val"].double()
    with pytest.raises(UnsupportedAttentionError, match=r"layers\.0\.self_attn attends in .*float64"):
        AttentionToDualMode(context)(graph_module)
