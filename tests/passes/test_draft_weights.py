"""The form of a graph that drafts run: which products read copies, what they give, and what they leave alone."""

import pytest
import torch

from sparsespec_compile.errors import GraphInvariantError
from sparsespec_compile.kernels.ops import fp8_product, halved_product, quantise_rows, quantised_product, unpaired
from sparsespec_compile.passes.base import find_calls
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.proofs.verify import verify
from sparsespec_compile.passes.rewrites import draft_weights, halve_products

from .families import DOZEN, logits, telling, tiny, tokens
from .prefill import prefill_step

aten = torch.ops.aten
SEQUENCE = tokens(13)


def with_drafts(model, dtype=torch.int8):
    return compile_model(model, page_size=16, draft_dtype=dtype)


def fill(draft, kind="int8"):
    """Give the copies memory, and the values of the weights."""
    for weight, copy, scale, paired in draft.copies:
        for tensor in (copy, scale):
            tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
        quantise_rows(weight, kind, copy, scale, paired)


def run(forward, layout, sequence=SEQUENCE):
    with torch.no_grad():
        return forward(*prefill_step(layout, [sequence]).inputs)[0]


def coarse(model, draft):
    """The model, its weights rounded to what the copies stand for."""
    for weight, copy, scale, _ in draft.copies:
        weight.data.copy_(unpaired(copy).float() * scale[:, None])
    return model


@pytest.mark.parametrize("family", telling(name for name in DOZEN if name != "mixtral"))
def test_drafts_compute_with_rounded_weights_and_the_exact_graph_with_the_weights(family):
    model = tiny(family)
    compiled = with_drafts(model)
    fill(compiled.draft)
    own = logits(model, SEQUENCE)
    assert torch.allclose(run(compiled.graph_module, compiled.layout), own, rtol=1e-4, atol=1e-5 * own.abs().max())
    got = run(compiled.draft.graph_module, compiled.layout)
    expected = logits(coarse(model, compiled.draft), SEQUENCE)
    if not model.config.tie_word_embeddings:  # else the embedding that the model reads was rounded too
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert not torch.allclose(got, own, rtol=1e-3, atol=1e-4 * own.abs().max())


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_every_product_of_a_dense_model_reads_a_copy(kind, dtype):
    compiled = with_drafts(tiny("qwen3"), dtype)
    graph = compiled.draft.graph_module.graph
    products = len(find_calls(graph, quantised_product)) + len(find_calls(graph, fp8_product))
    assert products == 4 * len(compiled.layout.layers) + 1
    assert not find_calls(graph, aten.linear.default)
    assert {(copy.dtype, scale.dtype) for _, copy, scale, _ in compiled.draft.copies} == {(dtype, torch.float32)}
    assert not find_calls(compiled.graph_module.graph, quantised_product)
    fill(compiled.draft, kind)
    exact = run(compiled.graph_module, compiled.layout)
    error = run(compiled.draft.graph_module, compiled.layout) - exact
    assert 0 < error.norm() < (0.05 if kind == "int8" else 0.2) * exact.norm()


def test_a_tied_embedding_is_read_as_it_is():
    model = tiny("llama", tie_word_embeddings=True)
    compiled = with_drafts(model)
    (embedding,) = find_calls(compiled.draft.graph_module.graph, aten.embedding.default)
    assert embedding.args[0].meta["val"].dtype == torch.float32
    fill(compiled.draft)
    tied = [copy for weight, copy, *_ in compiled.draft.copies if weight.data_ptr() == model.lm_head.weight.data_ptr()]
    assert len(tied) == 1
    names = {node.target for node in compiled.draft.graph_module.graph.find_nodes(op="get_attr")}
    assert len([name for name in names if "draft_weight" in name]) == len(compiled.draft.copies)


def test_halved_products_become_one_product_with_a_copy(monkeypatch):
    monkeypatch.setattr(halve_products, "suits", lambda weight: weight.shape[1] % 16 == 0)
    compiled = with_drafts(tiny("qwen2"))
    assert len(find_calls(compiled.graph_module.graph, halved_product)) == 4
    graph = compiled.draft.graph_module.graph
    assert not find_calls(graph, halved_product)
    assert len(find_calls(graph, quantised_product)) == 9
    fill(compiled.draft)
    exact = run(compiled.graph_module, compiled.layout)
    assert (run(compiled.draft.graph_module, compiled.layout) - exact).norm() < 0.05 * exact.norm()


def test_equal_layers_of_drafts_are_compiled_once_and_in_the_same_stage():
    compiled = with_drafts(tiny("llama", num_hidden_layers=5))
    graphs, progress = [], []

    def compiler(region, inputs):
        graphs.append(region)
        return region

    forward = compiled.compile_regions(compiler, lambda *counts: progress.append(counts))
    assert len(compiled.split.distinct) == len(compiled.draft.split.distinct) == 3
    assert progress == [(done, 6) for done in range(1, 7)]
    reads = [bool(find_calls(graph.graph, quantised_product)) for graph in graphs]
    assert reads == [False] * 3 + [True] * 3
    fill(compiled.draft)
    expected = run(compiled.draft.graph_module, compiled.layout)
    assert torch.equal(run(forward.drafts, compiled.layout), expected)
    assert torch.equal(run(forward, compiled.layout), run(compiled.graph_module, compiled.layout))
    names = [record.name for record in compiled.report.passes]
    assert names[-2:] == ["compile regions", "compile regions of drafts"]


def test_both_forms_know_under_which_sizes_their_code_is_right():
    """What is taken for granted while the first is compiled is not put down again for the second."""
    compiled = with_drafts(tiny("llama"))

    def takes_for_granted(region, inputs):
        rows = next(size for value in inputs for size in value.shape if isinstance(size, torch.SymInt))
        assert rows * 1000 <= 100_000
        return region

    forward = compiled.compile_regions(takes_for_granted)
    assert forward.sizes.conditions
    assert forward.drafts.sizes.conditions == forward.sizes.conditions


@pytest.mark.slow
def test_inductor_compiles_both_forms():
    compiled = with_drafts(tiny("qwen3"))
    forward = compiled.compile_regions()
    fill(compiled.draft)
    for compiled_form, form in ((forward, compiled), (forward.drafts, compiled.draft)):
        for sequence in (SEQUENCE, tokens(37, seed=2)):
            expected = run(form.graph_module, compiled.layout, sequence)
            got = run(compiled_form, compiled.layout, sequence)
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_copies_take_no_memory_until_they_are_given_some():
    compiled = with_drafts(tiny("qwen3"))
    assert {tensor.untyped_storage().nbytes() for _, *made, _ in compiled.draft.copies for tensor in made} == {0}


def test_a_mixture_s_experts_stay_as_they_are():
    compiled = with_drafts(tiny("mixtral"))
    graph = compiled.draft.graph_module.graph
    assert {tuple(weight.shape) for weight, *_ in compiled.draft.copies} == {(151, 48), (80, 48), (48, 48), (4, 48)}
    fill(compiled.draft)
    exact = run(compiled.graph_module, compiled.layout)
    assert run(compiled.draft.graph_module, compiled.layout).shape == exact.shape
    assert graph.find_nodes(op="call_function", target=quantised_product)
    assert "left the experts of 2 layers" in str(compiled.report)


@pytest.mark.parametrize(("elements", "copied"), [(2**20, True), (2**20 - 1024, False)])
def test_small_products_on_a_gpu_wait_for_their_launch_alone(elements, copied):
    with torch.device("meta"):
        value = torch.empty(elements // 1024, 1024, dtype=torch.bfloat16)
    node = torch.fx.Graph().get_attr("weight")
    node.meta["val"] = value
    assert (draft_weights.why_exact(node) is None) == copied
    node.meta["val"] = value.t()
    assert "not contiguous" in draft_weights.why_exact(node)


def test_the_verifier_keeps_copies_out_of_the_exact_graph_and_with_their_own_scales():
    compiled = with_drafts(tiny("llama"))
    draft = compiled.draft.graph_module
    verify(draft, compiled.layout, drafts=True)
    with pytest.raises(GraphInvariantError, match="must not be in a graph that verifies"):
        verify(draft, compiled.layout)
    first, second = find_calls(draft.graph, quantised_product)[:2]
    second.args = (*second.args[:2], first.args[2])
    with pytest.raises(GraphInvariantError, match="do not belong together"):
        verify(draft, compiled.layout, drafts=True)


def test_nothing_is_made_unless_it_is_asked_for():
    compiled = compile_model(tiny("llama"), page_size=16)
    assert compiled.draft is None
    assert not compiled.report.notes(draft_weights.DraftWeights.name)


def test_rows_are_rounded_to_fp8_where_sizes_allow():
    """All products but the output layer's, whose 151 columns are no multiple of 16."""
    model = tiny("qwen3")
    compiled = with_drafts(model, torch.float8_e4m3fn)
    graph = compiled.draft.graph_module.graph
    assert len(find_calls(graph, fp8_product)) == 4 * len(compiled.layout.layers)
    assert len(find_calls(graph, quantised_product)) == 1
    for node in find_calls(graph, fp8_product):
        assert node.args[0].meta["val"].dtype == torch.float8_e4m3fn
    fill(compiled.draft, "fp8")
    exact = run(compiled.graph_module, compiled.layout)
    assert (run(compiled.draft.graph_module, compiled.layout) - exact).norm() < 0.2 * exact.norm()


def test_products_of_8_bit_rows_take_the_scales_of_their_own_weight():
    compiled = with_drafts(tiny("qwen3"), torch.float8_e4m3fn)
    draft = compiled.draft.graph_module
    verify(draft, compiled.layout, drafts=True)
    first, second = find_calls(draft.graph, fp8_product)[:2]
    scaled, other = next(iter(first.users)), next(iter(second.users))
    other.update_arg(1, scaled.args[1])
    with pytest.raises(GraphInvariantError, match="do not belong together"):
        verify(draft, compiled.layout, drafts=True)
    with pytest.raises(GraphInvariantError, match="must not be in a graph that verifies"):
        verify(draft, compiled.layout)
