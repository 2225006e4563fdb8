"""The verifier, by passes that break a graph in each way it looks for."""

import itertools

import pytest
import torch
from torch.fx import GraphModule

from sparsespec_compile.kernels.ops import STEP_TENSORS, attention_site, dual_mode_attention
from sparsespec_compile.passes import pipeline
from sparsespec_compile.passes.base import GraphPass, PassContext, compute, find_calls
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.errors import GraphInvariantError
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.passes.proofs.verify import VERIFY_VARIABLE, verify, verify_shapes
from sparsespec_compile.passes.report import CompileReport
from sparsespec_compile.passes.rewrites.normalise import Normalise

from .families import tiny

aten = torch.ops.aten


def copy_of(bench):
    compiled = bench("gemma2").compiled
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(compiled.graph_module.graph, {}))
    return GraphModule(compiled.graph_module, graph), compiled.layout


def dual_nodes(graph_module):
    return find_calls(graph_module.graph, dual_mode_attention)


def drop_a_layer(graph_module):
    node = dual_nodes(graph_module)[1]
    node.replace_all_uses_with(node.args[0])
    graph_module.graph.erase_node(node)


def swap_layers(graph_module):
    first, second = dual_nodes(graph_module)
    first.args, second.args = (*first.args[:15], *second.args[15:]), (*second.args[:15], *first.args[15:])


def change_scale(graph_module):
    node = dual_nodes(graph_module)[0]
    node.args = (*node.args[:15], 1.0, *node.args[16:])


def take_another_part_of_the_pool(graph_module):
    part = dual_nodes(graph_module)[1].args[3].args[0]
    pool, axis, start, end = part.args
    part.args = (pool, axis, start + 1, end + 1)


def share_scores(graph_module):
    first, second = dual_nodes(graph_module)
    second.args = (*second.args[:4], first.args[4], *second.args[5:])


def scores_as_pillars(graph_module):
    node = dual_nodes(graph_module)[0]
    node.args = (*node.args[:14], node.args[4], *node.args[15:])


def share_page_tables(graph_module):
    first, second = dual_nodes(graph_module)
    place = 5 + STEP_TENSORS.index("page_table")
    second.args = (*second.args[:place], first.args[place], *second.args[place + 1 :])


def take_all_page_tables(graph_module):
    node = dual_nodes(graph_module)[0]
    place = 5 + STEP_TENSORS.index("page_table")
    node.args = (*node.args[:place], node.args[place].args[0], *node.args[place + 1 :])


def swap_step_tensors(graph_module):
    node = dual_nodes(graph_module)[0]
    node.args = (*node.args[:5], node.args[6], node.args[5], *node.args[7:])


def give_no_scores(graph_module):
    node = dual_nodes(graph_module)[0]
    node.args = (*node.args[:4], None, *node.args[5:])


def forget_the_settings(graph_module):
    node = dual_nodes(graph_module)[0]
    node.args = node.args[:15]


def leave_a_site(graph_module):
    dual_nodes(graph_module)[0].target = attention_site


def swap_inputs(graph_module):
    graph = graph_module.graph
    first, second, *_ = graph.find_nodes(op="placeholder")
    second.append(first)


def write_into_the_pool(graph_module):
    graph = graph_module.graph
    pool = next(node for node in graph.find_nodes(op="placeholder") if node.target == "kv_pool")
    with graph.inserting_before(dual_nodes(graph_module)[0]):
        graph.call_function(aten.zero_.default, (graph.call_function(aten.slice.Tensor, (pool, 0, 0, 1)),))


def write_into_a_weight(graph_module):
    graph = graph_module.graph
    weight = next(iter(graph.find_nodes(op="get_attr")))
    with graph.inserting_before(dual_nodes(graph_module)[0]):
        graph.call_function(aten.mul_.Scalar, (weight, 2.0))


BREAKS = {
    drop_a_layer: "1 attention nodes, the layout 2",
    swap_layers: r"has \(scale, window, softcap, chunked, layer\)",
    change_scale: r"has \(scale, window, softcap, chunked, layer\)",
    take_another_part_of_the_pool: r"must work on kv_pool\[:, \d+:\d+\]",
    share_scores: r"must work on scores\[:, 2:4\]",
    scores_as_pillars: r"must work on pillar_index\[:, 0:2\]",
    share_page_tables: r"must take page_table\[0\]",
    take_all_page_tables: r"must take page_table\[1\]",
    swap_step_tensors: r"must take request_mode",
    give_no_scores: "scores of .* is None; it must be a node",
    forget_the_settings: "has 15 arguments; it must have 20",
    leave_a_site: "must not be in a graph after the attention rewrite",
    swap_inputs: "inputs are",
    write_into_the_pool: r"aten\.zero_.*writes into an input",
    write_into_a_weight: r"aten\.mul_.*writes into an input, a parameter",
}


def test_a_good_graph_passes(bench):
    graph_module, layout = copy_of(bench)
    verify(graph_module, layout)
    verify_shapes(graph_module)


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_a_broken_graph_is_refused(bench, change):
    graph_module, layout = copy_of(bench)
    change(graph_module)
    with pytest.raises(GraphInvariantError, match=BREAKS[change]):
        verify(graph_module, layout)


def sites(graph_module):
    return find_calls(graph_module.graph, attention_site)


def drop_a_site(graph_module):
    node = sites(graph_module)[1]
    node.replace_all_uses_with(node.args[0])
    graph_module.graph.erase_node(node)


def change_a_sites_scale(graph_module):
    node = sites(graph_module)[0]
    node.args = (*node.args[:3], 1.0, *node.args[4:])


def rewrite_a_single_site(graph_module):
    sites(graph_module)[0].target = dual_mode_attention


EARLY_BREAKS = {
    drop_a_site: "1 attention nodes, the layout 2",
    change_a_sites_scale: r"has \(scale, window, softcap, chunked, layer\)",
    rewrite_a_single_site: "must not be in a graph before the attention rewrite",
    swap_inputs: "inputs are",
}


@pytest.mark.parametrize("change", EARLY_BREAKS, ids=lambda change: change.__name__)
def test_a_broken_graph_is_refused_before_the_rewrite(change):
    model = tiny("gemma2")
    captured = capture(model)
    layout = KVLayout(tuple(site.layer for site in captured.sites), page_size=16)
    graph_module = captured.graph_module
    Normalise(PassContext(model, layout, CompileReport("gemma2", "")))(graph_module)
    verify(graph_module, layout)
    change(graph_module)
    with pytest.raises(GraphInvariantError, match=EARLY_BREAKS[change]):
        verify(graph_module, layout)


def wrong_dtype(graph_module):
    node = find_calls(graph_module.graph, aten.linear.default)[0]
    node.meta["val"] = node.meta["val"].double()


def wrong_size(graph_module):
    node = find_calls(graph_module.graph, aten.linear.default)[0]
    node.meta["val"] = node.meta["val"][..., :1]


def wrong_rank(graph_module):
    node = find_calls(graph_module.graph, aten.linear.default)[0]
    node.meta["val"] = node.meta["val"][..., 0]


@pytest.mark.parametrize("change", [wrong_dtype, wrong_size, wrong_rank])
def test_a_wrong_record_of_a_shape_is_refused(bench, change):
    graph_module, _ = copy_of(bench)
    change(graph_module)
    with pytest.raises(GraphInvariantError, match=r"linear.*was recorded as"):
        verify_shapes(graph_module)


def other_weight(graph_module):
    """One that the product can be computed with, of another number of columns."""
    output, weight = (find_calls(graph_module.graph, aten.linear.default)[number] for number in (1, 0))
    output.args = (output.args[0], weight.args[1])


def other_target(graph_module):
    find_calls(graph_module.graph, aten.linear.default)[0].target = aten.outer.default


def other_constant(graph_module):
    node = find_calls(graph_module.graph, aten.unsqueeze.default)[0]
    node.args = (node.args[0], 0)


CHANGES = {
    other_weight: "linear.*was recorded as",
    other_target: "linear.* does not run on the shapes that reach it",
    other_constant: "unsqueeze.*was recorded as",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_call_that_has_been_changed_is_computed_anew(bench, change):
    graph_module, _ = copy_of(bench)
    change(graph_module)
    with pytest.raises(GraphInvariantError, match=CHANGES[change]):
        verify_shapes(graph_module)


def test_a_weight_of_another_shape_than_recorded_is_refused(bench):
    graph_module, _ = copy_of(bench)
    path = str(find_calls(graph_module.graph, aten.linear.default)[0].args[1].target)
    other = torch.nn.Parameter(graph_module.get_parameter(path)[:-1].detach())
    graph_module.get_submodule(path.rpartition(".")[0]).register_parameter(path.rpartition(".")[2], other)
    with pytest.raises(GraphInvariantError, match="was recorded as"):
        verify_shapes(graph_module)


def test_what_follows_from_the_same_values_is_not_computed_again(bench, monkeypatch):
    """And a record of other strides, which callers of regions read, is renewed, and what follows from it."""
    computed = []
    monkeypatch.setattr(
        "sparsespec_compile.passes.proofs.verify.compute", lambda *given: computed.append(given[0]) or compute(*given)
    )
    graph_module, _ = copy_of(bench)
    verify_shapes(graph_module)
    computed.clear()
    verify_shapes(graph_module)
    assert computed == []
    node = find_calls(graph_module.graph, aten.linear.default)[1]
    before = node.meta["val"]
    node.meta["val"] = before.transpose(1, 2).contiguous().transpose(1, 2)
    verify_shapes(graph_module)
    assert {node, *node.users} <= set(computed)
    assert node.meta["val"].stride() == before.stride()


class Sabotage(GraphPass):
    """A pass with a bug."""

    name = "sabotage"
    change = staticmethod(change_scale)

    def rewrite(self, graph_module):
        self.change(graph_module)


@pytest.mark.parametrize(("change", "strict"), [(take_another_part_of_the_pool, ""), (wrong_size, "1")])
def test_the_pipeline_stops_at_a_broken_pass(monkeypatch, change, strict):
    class Broken(Sabotage):
        pass

    Broken.change = staticmethod(change)
    monkeypatch.setenv(VERIFY_VARIABLE, strict)
    after = [kind.name for kind in pipeline.PASSES].index("attention to dual mode") + 1
    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:after], Broken))
    with pytest.raises(GraphInvariantError):
        pipeline.compile_model(tiny("llama"), page_size=16)


def test_shapes_are_checked_at_the_end_in_any_case(monkeypatch):
    class Broken(Sabotage):
        change = staticmethod(wrong_size)

    monkeypatch.setenv(VERIFY_VARIABLE, "")
    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES, Broken))
    model = tiny("llama")
    with pytest.raises(GraphInvariantError, match="was recorded as"):
        pipeline.compile_model(model, page_size=16)
    attention = model.model.layers[0].self_attn
    weights = [projection.weight for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    gaps = [after.data_ptr() - before.data_ptr() - before.nbytes for before, after in itertools.pairwise(weights)]
    assert gaps != [0, 0]  # fused ones were taken apart again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True))
