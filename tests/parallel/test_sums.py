"""Where a tensor-parallel graph sums over ranks, and the proof that it does so once for every sum."""

from typing import NamedTuple

import pytest
import torch
from torch.fx import Graph, GraphModule

from sparsespec_compile.errors import GraphInvariantError, ParallelPlanError, ShardedModelError
from sparsespec_compile.kernels.ops import (
    AttentionCall,
    all_reduce,
    dual_mode_attention,
    fp8_product,
    quantised_product,
)
from sparsespec_compile.passes import pipeline
from sparsespec_compile.passes.base import GraphPass, call_of, find_calls
from sparsespec_compile.passes.cost.graph import graph_cost
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.passes.parallel.division import SUMMAND, WHOLE, Placement, piece
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.proofs.placing import Misplaced
from sparsespec_compile.passes.proofs.sums import verify_sums
from sparsespec_compile.passes.proofs.verify import verify
from sparsespec_compile.passes.ranks import Ranks
from sparsespec_compile.passes.rewrites.draft_weights import DraftWeights
from sparsespec_compile.passes.rewrites.fuse_projections import FuseProjections
from sparsespec_compile.passes.rewrites.reduce_sums import ReduceSums

from ..passes.families import tiny

FIRST_OF_TWO = Ranks(0, 2, "")
"""Of a group whose sums are this rank's own summands: a graph of a part can be made and run in one process."""


ROUND = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Of which two ranks hold parts whose products may read 8-bit rows."""

KINDS = [torch.int8, torch.float8_e4m3fn]


def compiled(family, ranks=FIRST_OF_TWO, draft_dtype=None, **settings):
    return compile_model(tiny(family, **settings), page_size=16, ranks=ranks, draft_dtype=draft_dtype)


def sums(result):
    return find_calls(result.graph_module.graph, all_reduce)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", 5),
        ("qwen2", 5),  # with biases
        ("gemma3_text", 5),  # summed up before the norm behind it
        ("qwen3_moe", 5),  # summed up behind the weighting of experts
        ("granite_swa", 5),  # with sinks, which are split with the query heads
        ("deepseek_v3", 3),  # whole attention; routed and shared experts are one sum
        pytest.param("olmo2", 3, marks=pytest.mark.slow),  # whole attention
        pytest.param("qwen3", 5, marks=pytest.mark.slow),
        pytest.param("granite", 5, marks=pytest.mark.slow),
        pytest.param("mixtral", 5, marks=pytest.mark.slow),
        pytest.param("smollm3", 5, marks=pytest.mark.slow),
    ],
)
def test_every_layer_is_summed_up_as_rarely_as_can_be(family, expected):
    """And so is the embedding, once."""
    result = compiled(family)
    assert len(sums(result)) == expected
    layout = result.layout.layers[0]
    split = family not in ("deepseek_v3", "olmo2")
    assert layout.q_heads * (2 if split else 1) == tiny(family).config.num_attention_heads
    for node in find_calls(result.graph_module.graph, dual_mode_attention):
        sinks = call_of(AttentionCall, node).sinks
        assert (sinks is not None) == (family == "granite_swa")
        assert sinks is None or sinks.meta["val"].shape == (layout.q_heads,)


def test_the_sum_of_experts_is_taken_of_tokens_and_not_of_their_copies():
    for node in sums(compiled("qwen3_moe")):
        assert node.meta["val"].shape[-2:][0] == node.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1]


def test_kv_heads_fewer_than_ranks_are_held_by_several_and_the_report_says_so():
    result = compiled("llama", Ranks(3, 6, ""))
    layer = result.layout.layers[0]
    assert (layer.q_heads, layer.kv_heads) == (1, 1)
    assert "model.layers.*.self_attn.k_proj.weight: 3 ranks hold each KV head" in str(result.report)


def test_the_cost_of_a_part_is_the_whole_ones_share():
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 160}
    whole, part = compile_model(tiny("llama", **settings), page_size=16), compiled("llama", **settings)
    costs = [{term.name: term for term in graph_cost(one.graph_module).terms} for one in (whole, part)]
    for name in ("projections", "KV written", "output projection", "logits"):
        assert costs[0][name].bytes.equals(2 * costs[1][name].bytes), name
    assert costs[0]["embedding"].bytes.equals(costs[1]["embedding"].bytes)  # a row for each token, zeros or not


@pytest.mark.parametrize("dtype", KINDS)
def test_drafts_with_8_bit_weights_sum_up_where_the_exact_graph_does(dtype):
    result = compiled("llama", draft_dtype=dtype, **ROUND)
    draft = result.draft.graph_module.graph
    products = find_calls(draft, quantised_product) + find_calls(draft, fp8_product)
    assert len(products) == 4 * len(result.layout.layers) + 1
    assert bool(find_calls(draft, fp8_product)) == (dtype == torch.float8_e4m3fn)
    read = [
        [node.args[0].name for node in find_calls(graph, all_reduce)] for graph in (result.graph_module.graph, draft)
    ]
    assert len(read[1]) == len(read[0]) == 5
    assert any(weight.shape[0] == result.vocabulary.length for weight, *_ in result.draft.copies)


class Stage(NamedTuple):
    """A graph behind a pass of the pipeline, and which part of its weights the rank has."""

    graph_module: GraphModule
    layout: KVLayout
    weights: dict[str, Placement]

    def copy(self):
        graph = Graph()
        graph.output(graph.graph_copy(self.graph_module.graph, {}))
        return Stage(GraphModule(self.graph_module, graph), self.layout, dict(self.weights))

    def verify(self, drafts=False):
        """What the pipeline does behind each pass."""
        verify(self.graph_module, self.layout, drafts=drafts)
        verify_sums(self.graph_module, self.weights)


def stages_of(**settings):
    """By the kind of the pass: what is behind those that sum up, and behind all later ones."""
    found = {}
    run_pass = pipeline._run_pass

    def note(number, graph_pass, graph_module, dumper):
        run_pass(number, graph_pass, graph_module, dumper)
        context = graph_pass.context
        if context.parallel.reduced:
            found[type(graph_pass)] = Stage(graph_module, context.layout, context.parallel.weights).copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_run_pass", note)
        compiled("llama", **settings)
    return found


@pytest.fixture(scope="module")
def stages():
    return stages_of()


@pytest.fixture(scope="module", params=KINDS)
def drafts(request):
    return stages_of(draft_dtype=request.param, **ROUND)[DraftWeights]


def remove(weights, node):
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def double(weights, node):
    with node.graph.inserting_after(node):
        again = node.graph.call_function(all_reduce, (node, ""))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    again.meta["val"] = node.meta["val"]


def sum_up_the_residual(weights, node):
    (add,) = node.users
    add.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    add.args = (add.args[0], node.args[0])
    node.args = (add, node.args[1])
    add.append(node)


def sum_up_a_norm(weights, node):
    norm = next(one for one in node.graph.nodes if one.target is torch.ops.aten.rsqrt.default)
    with node.graph.inserting_after(norm):
        total = node.graph.call_function(all_reduce, (norm, ""))
    norm.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    total.meta["val"] = norm.meta["val"]


@pytest.mark.parametrize("place", [ReduceSums, FuseProjections])
@pytest.mark.parametrize("change", [remove, double, sum_up_the_residual, sum_up_a_norm])
def test_a_broken_sum_is_found(stages, change, place):
    stage = stages[place].copy()
    stage.verify()
    change(stage.weights, find_calls(stage.graph_module.graph, all_reduce)[1])
    with pytest.raises(Misplaced):
        stage.verify()


@pytest.mark.parametrize("place", [ReduceSums, FuseProjections])
def test_a_pass_that_breaks_a_sum_is_caught(monkeypatch, place):
    class Broken(GraphPass):
        name = "sabotage"

        def rewrite(self, graph_module):
            remove(self.context.parallel.weights, find_calls(graph_module.graph, all_reduce)[1])

    number = pipeline.PASSES.index(place) + 1
    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:number], Broken, *pipeline.PASSES[number:]))
    with pytest.raises(Misplaced):
        compiled("llama")


def read_rounded_rows(weights, node):
    """What is a rank's own is read as a value of the model."""
    (add,) = node.users
    rows = find_calls(node.graph, fp8_product)[1].args[0].args[0]
    add.args = (rows, node)


def read_scales(weights, node):
    (add,) = node.users
    with node.graph.inserting_before(add):
        scaled = node.graph.call_function(torch.ops.aten.mul.Tensor, (node, scales_of(node.graph)))
    add.replace_input_with(node, scaled)
    scaled.meta["val"] = node.meta["val"]


def scales_of(graph):
    return next(node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith("draft_scale_"))


def swap_units(weights, node):
    first, second = (next(iter(next(iter(one.users)).users)) for one in find_calls(node.graph, fp8_product)[:2])
    second.update_arg(1, first.args[1])


def take_the_copy_for_whole(weights, node):
    for name in weights:
        if name.startswith("draft_weight_"):
            weights[name] = WHOLE


@pytest.mark.parametrize(
    "change", [remove, double, read_scales, take_the_copy_for_whole, read_rounded_rows, swap_units]
)
def test_a_broken_sum_of_drafts_is_found(drafts, change):
    stage = drafts.copy()
    if change in (read_rounded_rows, swap_units) and not find_calls(stage.graph_module.graph, fp8_product):
        pytest.skip("no rows in 8 bits")
    stage.verify(drafts=True)
    change(stage.weights, find_calls(stage.graph_module.graph, all_reduce)[1])
    with pytest.raises(GraphInvariantError):
        stage.verify(drafts=True)


def test_a_pass_that_breaks_a_sum_of_drafts_is_caught(monkeypatch):
    rewrite = DraftWeights.rewrite

    def broken(draft_weights, graph_module):
        rewrite(draft_weights, graph_module)
        remove(draft_weights.context.parallel.weights, find_calls(graph_module.graph, all_reduce)[1])

    monkeypatch.setattr(DraftWeights, "rewrite", broken)
    with pytest.raises(Misplaced):
        compiled("llama", draft_dtype=torch.int8, **ROUND)


@pytest.mark.parametrize(
    ("weight", "placement"),
    [
        ("self_attn.o_proj.weight", piece(0, 24)),
        ("self_attn.o_proj.weight", WHOLE),
        ("mlp.up_proj.weight", piece(1, 24)),
        ("mlp.up_proj.weight", SUMMAND),
        ("self_attn.k_proj.weight", WHOLE),
        ("post_attention_layernorm.weight", piece(0, 24)),
    ],
)
def test_a_weight_that_is_divided_otherwise_is_caught(stages, weight, placement):
    stage = stages[ReduceSums].copy()
    name = f"model.model.layers.1.{weight}"
    assert name in stage.weights or placement != WHOLE, "what is not listed is whole"
    stage.weights[name] = placement
    with pytest.raises(GraphInvariantError, match=r"layers\.1"):
        stage.verify()


def test_a_plan_that_does_not_fit_the_model_is_refused_by_name():
    model = tiny("llama")
    model.tp_plan = {**model.tp_plan, "model.layers.*.self_attn.o_proj": "replicate"}
    with pytest.raises(ParallelPlanError, match=r"does not run: .* shapes cannot be multiplied"):
        compile_model(model, page_size=16, ranks=FIRST_OF_TWO)


def test_a_part_refuses_to_be_run_alone_or_divided_anew():
    model = tiny("llama")
    compile_model(model, page_size=16, ranks=FIRST_OF_TWO)
    with pytest.raises(ShardedModelError, match="one rank's part"):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ShardedModelError, match="load the model again"):
        compile_model(model, page_size=16, ranks=Ranks(0, 6, ""))
    assert len(sums(compile_model(model, page_size=16, ranks=FIRST_OF_TWO))) == 5  # the same part once more
