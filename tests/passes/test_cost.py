"""The cost of a compiled graph: equal to counts by hand, to those from a configuration, and refused where unknown."""

import pytest
import sympy
import torch

import sparsespec_compile.kernels  # noqa: F401  registers the ops
from sparsespec_compile.advice.config_cost import FAMILIES, config_cost
from sparsespec_compile.errors import CostModelError
from sparsespec_compile.passes import pipeline
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.cost.terms import SYMBOLS, Iteration, attention
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.rewrites.fuse_projections import FuseProjections

from .families import telling, tiny

T, R, D, V, L, k, b = SYMBOLS
HIDDEN, MLP, LAYERS, Q_HEADS, KV_HEADS, VOCABULARY = 48, 96, 2, 6, 2, 151


@pytest.fixture
def cost_of(bench):
    """A function from a family's name to the cost of its compiled graph."""
    return lambda family: graph_cost(bench(family).compiled.graph_module)


def equal(got, expected):
    return sympy.expand(got - expected) == 0


@pytest.mark.parametrize(("family", "head"), [("llama", 8), ("qwen3", 16)])
def test_equals_the_count_by_hand(cost_of, family, head):
    cost = cost_of(family)
    weights = LAYERS * HIDDEN * ((Q_HEADS + 2 * KV_HEADS) * head + Q_HEADS * head + 3 * MLP)
    token = LAYERS * KV_HEADS * 2 * head * 4  # K and V, float32
    row = LAYERS * Q_HEADS * 2 * head * 2  # multiply and add, for scores and for values
    drafted = sympy.Min(L, b) + k + 1
    heads = LAYERS * KV_HEADS
    expected = {
        "embedding": (T * HIDDEN * 4, 0, 0),
        "projections": (weights * 4, 2 * T * weights, 4 * LAYERS),
        "KV written": (T * token, 0, 0),
        "draft attention": (D * drafted * token + D * sympy.Min(L, b) * heads * 4, D * drafted * row, 0),
        "verify attention": (V * L * token, V * (k + 1) * L * row, LAYERS),
        "scores": (2 * sympy.Min(k, 1) * V * L * heads * 4, 0, 0),
        "output projection": (HIDDEN * VOCABULARY * 4, 2 * R * HIDDEN * VOCABULARY, 1),
        "logits": (2 * R * VOCABULARY * 4, 0, 0),
    }
    assert [term.name for term in cost.terms] == list(expected)
    for term in cost.terms:
        size, flops, launches = expected[term.name]
        assert equal(term.bytes, size), term
        assert equal(term.flops, flops), term
        assert term.launches == launches
    assert equal(cost.bytes, sum(size for size, _, _ in expected.values()))
    assert equal(cost.flops, sum(flops for _, flops, _ in expected.values()))


def test_equal_layers_are_written_out_once():
    assert attention(6, 2, 8, 8, 0, 4) is attention(6, 2, 8, 8, 0, 4)


def test_numbers_are_those_of_the_expressions(cost_of):
    cost = cost_of("gemma2")
    iteration = Iteration(rows=20, kept=17, drafting=4, verifying=3, length=100, draft_tokens=4, budget=32)
    values = dict(zip(SYMBOLS, iteration.values(), strict=True))
    for term, numbers in zip(cost.terms, cost.evaluate(iteration), strict=True):
        expressions = (term.bytes, term.flops, term.bytes_again)
        assert numbers == tuple(float(expression.subs(values)) for expression in expressions)


@pytest.mark.parametrize("family", telling(FAMILIES))
def test_a_configuration_gives_what_the_graph_gives(bench, cost_of, family):
    from_config, from_graph = config_cost(bench(family).model.config, torch.float32), cost_of(family)
    assert {term.name for term in from_config.terms} == {term.name for term in from_graph.terms}
    for term in from_graph.terms:
        other = from_config.term(term.name)
        assert equal(term.bytes, other.bytes), term
        assert equal(term.flops, other.flops), term
        assert (term.kind, term.launches, term.bytes_again) == (other.kind, other.launches, other.bytes_again)


@pytest.mark.parametrize("family", telling(FAMILIES))
def test_a_configuration_gives_what_the_form_for_drafts_gives(bench, family):
    """Products read a byte of each weight; everything else is that of the exact graph."""
    compiled = compile_model(tiny(family), page_size=16, draft_dtype=torch.int8)
    exact, drafts = (graph_cost(form.graph_module) for form in (compiled, compiled.draft))
    from_config = config_cost(bench(family).model.config, torch.float32, draft_weights=True)
    assert [term.name for term in drafts.terms] == [term.name for term in exact.terms]
    for term, whole in zip(drafts.terms, exact.terms, strict=True):
        other = from_config.term(term.name)
        assert equal(term.bytes, other.bytes), term
        copied = term.kind == "gemm" and term.name != "experts"
        assert equal(whole.bytes, term.bytes * (4 if copied else 1)), term
        assert equal(term.flops, whole.flops), term
        assert (term.kind, term.launches) == (other.kind, other.launches) == (whole.kind, whole.launches)


def test_projections_that_are_not_fused_are_launched_singly(cost_of, monkeypatch):
    fused = cost_of("llama").term("projections")
    monkeypatch.setattr(pipeline, "PASSES", tuple(kind for kind in pipeline.PASSES if kind is not FuseProjections))
    single = graph_cost(compile_model(tiny("llama"), page_size=16).graph_module).term("projections")
    assert (fused.launches, single.launches) == (4 * LAYERS, 7 * LAYERS)
    assert equal(fused.bytes, single.bytes)


def test_a_verification_reads_again_for_rows_beyond_a_tile(cost_of):
    """Groups of 3 heads: 21 rows at a time."""
    term = cost_of("llama").term("verify attention")
    for drafts, times in ((0, 1), (8, 1), (20, 1), (21, 2), (41, 2), (42, 3), (64, 4)):
        assert equal(term.bytes_again.subs({k: drafts}), (times - 1) * term.bytes)


def test_a_window_bounds_what_is_read(cost_of):
    cost = cost_of("mistral")  # window 24
    read = cost.term("verify attention").bytes
    assert read.subs({L: 24, V: 1}) == read.subs({L: 1000, V: 1})
    assert read.subs({L: 12, V: 1}) * 2 == read.subs({L: 24, V: 1})


def test_half_of_a_chunk_is_read_on_average():
    """Within the first chunk all; the whole cache where a layer has no chunks."""
    chunked, whole = (
        {term.name: term for term in attention(6, 2, 8, 8, window, 4, chunked=window > 0)} for window in (16, 0)
    )
    for name in ("verify attention", "draft attention"):
        at = {V: 1, D: 1, k: 0, b: 100}
        ours, all_of_it = (terms[name].flops.subs(at) for terms in (chunked, whole))
        assert ours.subs({L: 10}) == all_of_it.subs({L: 10})
        assert ours.subs({L: 500}) == ours.subs({L: 16})
        token = 2 * 6 * (8 + 8)
        assert ours.subs({L: 500}) == sympy.Rational(17, 2) * token
    budget = chunked["draft attention"].flops.subs({D: 1, k: 0, b: 3, L: 500})
    assert budget == 4 * token


def test_a_configuration_with_chunks_gives_what_the_graph_gives():
    """And with a shared expert, and a layer without experts."""
    model = tiny("llama4_text")
    from_graph = graph_cost(compile_model(model, page_size=16).graph_module)
    from_config = config_cost(model.config, torch.float32)
    for term in from_graph.terms:
        other = from_config.term(term.name)
        assert equal(term.bytes, other.bytes), term
        assert equal(term.flops, other.flops), term
        assert (term.kind, term.launches) == (other.kind, other.launches)


def test_parameters_in_half_precision_count_half(cost_of):
    model = tiny("llama").to(torch.bfloat16)
    half = graph_cost(compile_model(model, page_size=16).graph_module)
    assert equal(cost_of("llama").term("projections").bytes, 2 * half.term("projections").bytes)
    assert equal(cost_of("llama").term("verify attention").bytes, 2 * half.term("verify attention").bytes)


def test_weights_that_are_added_and_multiplied_in_one_op_count(cost_of):
    """GPT-2: addmm on weights [inputs, outputs], an MLP of 4 times the width, learned positions beside the tokens."""
    cost = cost_of("gpt2")
    weights = LAYERS * HIDDEN * (3 + 1 + 2 * 4) * HIDDEN
    assert equal(cost.term("projections").bytes, weights * 4)
    assert equal(cost.term("projections").flops, 2 * T * weights)
    assert equal(cost.term("embedding").bytes, 2 * T * HIDDEN * 4)


def test_experts_are_read_as_rows_choose_them(cost_of):
    """Mixtral: 4 experts of 3 matrices with 64 hidden values, 2 of a row."""
    term = cost_of("mixtral").term("experts")
    elements = 3 * HIDDEN * 64
    for rows in (1, 2, 7):
        distinct = 4 * (1 - sympy.Rational(1, 2) ** rows)
        assert equal(term.bytes.subs({T: rows}), LAYERS * distinct * elements * 4)
    assert equal(term.flops, LAYERS * 2 * T * 2 * elements)
    assert (term.kind, term.launches) == ("gemm", 4 * LAYERS)


def test_a_weight_that_is_used_in_another_way_is_refused_by_name():
    compiled = compile_model(tiny("llama"), page_size=16)
    linear = compiled.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    linear.target = torch.ops.aten.inner.default
    with pytest.raises(CostModelError, match=r"inner.*a weight of shape .*Allowed: embeddings, linear layers"):
        graph_cost(compiled.graph_module)
