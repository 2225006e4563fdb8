"""Regions: equal layers are one, each call has its layer's own parameters, and the values are the flat graph's."""

import operator
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.kernels import ops
from sparsespec_compile.passes.errors import UncompiledStepWarning
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.regions import run as under_test
from sparsespec_compile.passes.regions.split import extract, split

from .families import tiny, tokens
from .prefill import prefill_step

aten = torch.ops.aten
LENGTHS = (11, 37)


class Counting:
    """A compiler that runs regions as they are, and remembers what it was given."""

    def __init__(self):
        self.inputs = []

    def __call__(self, region, inputs):
        self.inputs.append(inputs)
        return region


def run(forward, layout, lengths=LENGTHS, slots=3):
    step = prefill_step(layout, [tokens(length, seed=length) for length in lengths], slots)
    with torch.no_grad():
        return forward(*step.inputs), step.pool, step.scores


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def with_unlike_layers():
    """The same calls in each layer, on parameters of other shapes."""
    model = tiny("opt", num_hidden_layers=3)
    for number, layer in enumerate(model.model.decoder.layers):
        layer.fc1, layer.fc2 = nn.Linear(48, 64 + 16 * number), nn.Linear(64 + 16 * number, 48)
    return model.eval()


MIXED = [*["sliding_attention"] * 4, "full_attention", "sliding_attention", "full_attention"]

MODELS = {
    "equal layers": (lambda: tiny("llama", num_hidden_layers=4), 5, 3),
    "tied embedding": (lambda: tiny("qwen3", num_hidden_layers=3, tie_word_embeddings=True), 4, 3),
    "two kinds in turn": (lambda: tiny("gemma2", num_hidden_layers=4), 5, 4),
    "groups with pages of their own": (lambda: tiny("gemma3_text", num_hidden_layers=7, layer_types=MIXED), 8, 4),
    "dense, then experts": (lambda: tiny("deepseek_v3", num_hidden_layers=4), 5, 4),
    "no two alike": (with_unlike_layers, 4, 4),
}


FAST = ("two kinds in turn", "groups with pages of their own", "dense, then experts")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MODELS]
)
def test_each_distinct_region_is_compiled_once(name):
    build, regions, distinct = MODELS[name]
    compiled = compile_model(build(), page_size=16)
    counting, progress = Counting(), []
    forward = compiled.compile_regions(counting, on_compiled=lambda *counts: progress.append(counts))
    assert (len(compiled.split.calls), len(compiled.split.distinct)) == (regions, distinct)
    assert progress == [(done, distinct) for done in range(1, distinct + 1)]
    expected = run(compiled.graph_module, compiled.layout)
    assert equal(run(forward, compiled.layout), expected)
    assert equal(run(compiled.split.graph_module, compiled.layout), expected)
    assert len(counting.inputs) == distinct
    record = compiled.report.passes[-1]
    assert (record.name, record.matches, len(record.notes)) == ("compile regions", distinct, distinct)
    assert compiled.report.notes("split into regions") == (f"{regions} regions, {distinct} distinct",)


def test_one_compilation_runs_at_a_time(bench):
    """Inductor's settings and caches, and those of Triton, are the process's."""
    compiled, together, most = bench("llama").compiled, [0], [0]

    def compiler(region, inputs):
        together[0] += 1
        most[0] = max(most[0], together[0])
        time.sleep(0.01)
        together[0] -= 1
        return region

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(compiled.compile_regions, [compiler] * 3))
    assert most == [1]


def test_regions_take_only_tensors_and_promise_no_alignment_of_views(bench):
    compiled = bench("qwen3").compiled
    counting = Counting()
    compiled.compile_regions(counting)
    assert all(isinstance(value, torch.Tensor) for inputs in counting.inputs for value in inputs)
    views = [value for value in counting.inputs[1] if value.storage_offset() != 0]
    assert sorted((value.dim(), value.storage_offset()) for value in views) == [(2, 1), (3, 1), (3, 1), (4, 1)]


def test_parameters_stay_shared():
    model = tiny("llama", num_hidden_layers=3)
    compiled = compile_model(model, page_size=16)
    forward = compiled.compile_regions(Counting())
    before = run(forward, compiled.layout)
    with torch.no_grad():
        for name in ("self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
            model.model.layers[2].get_submodule(name).weight.mul_(1.5)
    after = run(forward, compiled.layout)
    assert not torch.equal(before[0], after[0])
    assert equal(after, run(compiled.graph_module, compiled.layout))


def test_the_outer_graph_only_makes_views_and_calls_regions(bench):
    split_graph = bench("gemma2").compiled.split
    nodes = split_graph.graph_module.graph.nodes
    functions = {node.target for node in nodes if node.op == "call_function"}
    called = [node.target for node in nodes if node.op == "call_module"]
    assert {str(target) for target in functions} == {
        "aten.slice.Tensor",
        "aten.select.int",
        "aten.view.default",
        "<built-in function getitem>",
    }
    assert tuple(called) == split_graph.calls


def copy_of(compiled):
    graph = Graph()
    graph.output(graph.graph_copy(compiled.graph_module.graph, {}))
    return GraphModule(compiled.graph_module, graph)


def test_parts_of_a_tuple_are_taken_where_the_tuple_is_made(bench):
    compiled = bench("deepseek_v3").compiled
    flat = copy_of(compiled)
    part = flat.graph.find_nodes(op="call_function", target=operator.getitem)[0]
    (logits,) = flat.graph.output_node().all_input_nodes
    with flat.graph.inserting_after(logits):
        late = flat.graph.node_copy(part)
    with flat.graph.inserting_after(late):
        total = flat.graph.call_function(aten.sum.default, (late,))
    total.meta["val"] = part.meta["val"].new_empty(())
    flat.graph.output_node().args = ((logits, total),)
    flat.recompile()
    (expected, expected_sum), *_ = run(flat, compiled.layout)
    regions = split(flat)
    (got, got_sum), *_ = run(regions.graph_module, compiled.layout)
    assert len(regions.calls) == 3
    assert torch.equal(got, expected)
    assert torch.equal(got_sum, expected_sum)
    values = [
        node.meta["val"]
        for name in regions.distinct
        for node in regions.region(name).graph.find_nodes(op="placeholder")
    ]
    assert all(isinstance(value, torch.Tensor) for value in values)


def test_a_size_that_no_input_of_a_region_has_is_read_from_its_tensor(bench):
    compiled = bench("llama").compiled
    flat = copy_of(compiled)
    (mode,) = (node for node in flat.graph.find_nodes(op="placeholder") if node.target == ops.STEP_TENSORS[0])
    (logits,) = flat.graph.output_node().all_input_nodes
    with flat.graph.inserting_after(logits):
        requests = flat.graph.call_function(aten.sym_size.int, (mode, 0))
    requests.meta["val"] = mode.meta["val"].shape[0]
    with flat.graph.inserting_after(requests):
        scaled = flat.graph.call_function(aten.mul.Tensor, (logits, requests))
    scaled.meta["val"] = logits.meta["val"]
    flat.graph.output_node().args = (scaled,)
    flat.recompile()
    assert equal(run(split(flat).graph_module, compiled.layout), run(flat, compiled.layout))


def test_a_write_in_place_that_regions_share_keeps_the_graph_whole(bench):
    compiled = bench("llama").compiled
    flat = copy_of(compiled)
    graph = flat.graph
    (embedding,) = graph.find_nodes(op="call_function", target=aten.embedding.default)
    *_, last = graph.find_nodes(op="call_function", target=aten.linear.default)
    with graph.inserting_before(last):
        graph.call_function(aten.mul_.Tensor, (embedding, 2.0)).meta["val"] = embedding.meta["val"]
    flat.recompile()
    whole = split(flat)
    assert whole.calls == ("region_0",)
    assert "mul_" in whole.whole
    assert str(whole).startswith("1 regions, 1 distinct (mul_")
    assert equal(run(whole.graph_module, compiled.layout), run(flat, compiled.layout))


def test_a_step_that_the_compiled_code_does_not_hold_for_runs_uncompiled():
    compiled = compile_model(tiny("llama"), page_size=16)
    ran = []

    def takes_for_granted(region, inputs):
        rows = next(size for value in inputs for size in value.shape if isinstance(size, torch.SymInt))
        assert rows * 1000 <= 100_000
        assert rows != 5
        return lambda *values: ran.append(region) or region(*values)

    forward = compiled.compile_regions(takes_for_granted)
    for lengths, broken in (
        ((50, 50), None),
        ((50, 51), "1000"),
        ((5,), "= 5 is dimension 1 of input_ids"),
        ((6,), None),
    ):
        ran.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = run(forward, compiled.layout, lengths)
        assert equal(got, run(compiled.graph_module, compiled.layout, lengths))
        assert bool(ran) == (broken is None)
        assert [warning.category for warning in caught] == [UncompiledStepWarning] * (broken is not None)
        assert all(broken in str(warning.message) for warning in caught)


def test_a_changed_fake_implementation_is_another_cache_entry(monkeypatch, tmp_path):
    tags = []

    def record(region, inputs, options):
        tags.append(torch.compiler.config.cache_key_tag)
        assert options == {"combo_kernels": True}
        return region

    monkeypatch.setattr(torch._inductor, "compile", record)
    under_test.inductor(None, [])
    under_test.inductor(None, [])
    changed = tmp_path / "ops.py"
    changed.write_text("another fake implementation")
    monkeypatch.setattr(ops, "__file__", str(changed))
    under_test.inductor(None, [])
    assert tags[0] == tags[1] != tags[2]
    assert torch.compiler.config.cache_key_tag == ""


def test_regions_are_unlike_where_a_compilation_may_rely_on_the_difference():
    graph = Graph()
    source = graph.placeholder("source")
    result = graph.call_function(aten.relu.default, (source,))
    result.meta["val"] = torch.empty(4, 6)

    def signature(value):
        source.meta["val"] = value
        return extract([result], [result]).signature

    values = (
        torch.zeros(4, 6),
        torch.zeros(4, 6).double(),
        torch.zeros(4, 7),
        torch.zeros(6, 4).t(),
        torch.zeros(5, 6)[1:],
    )
    assert signature(torch.zeros(4, 6)) == signature(torch.ones(4, 6))
    assert len({signature(value) for value in values}) == len(values)
