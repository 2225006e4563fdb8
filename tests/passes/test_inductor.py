"""The regions under Inductor: one compilation for all sizes, and the pool never copied.

An op that writes into views of one pool makes a compiler that works on values copy the pool, in the worst case in
every layer. The generated code shows it: then the pool goes somewhere else than into the attention op.
"""

import re
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from sparsespec_compile.kernels.ops import dual_mode_attention
from sparsespec_compile.passes.pipeline import compile_model
from sparsespec_compile.passes.regions.run import inductor

from .families import tiny, tokens
from .prefill import prefill_step

OP = "torch.ops.sparsespec.dual_mode_attention.default"


def pool_argument(line):
    """The tensor of which the op's fourth argument is a view, in a line of generated code that calls the op."""
    arguments, depth = [""], 0
    for character in line[line.index(OP) + len(OP) + 1 :]:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return re.search(r"\b(arg\d+_1|buf\d+)\b", arguments[3]).group()


def uses_outside_attention(code):
    """Lines of the generated call that do something with the pool but view it as an argument of the op.

    When the op works on a buffer of the generated code instead of the pool itself, those are the lines that call it.
    """
    lines = [line.strip() for line in code[: code.index("def get_args")].splitlines()]
    calls = [line for line in lines if OP + "(" in line]
    pools = {pool_argument(line) for line in calls}
    mentions = [line for line in lines if any(re.search(rf"\b{pool}\b", line) for pool in pools)]
    deleted = "|".join(rf"del {pool}" for pool in pools)
    passive = re.compile(rf"assert_size_stride\(|{deleted}|.* = args$|\w+_size = \w+\.size\(\)$")
    copied = [line for line in calls if pool_argument(line).startswith("buf")]
    return copied + [line for line in mentions if line not in calls and not passive.match(line)]


def run(forward, layout, sequences, slots):
    step = prefill_step(layout, sequences, slots)
    with torch.no_grad():
        return forward(*step.inputs)[0], step.pool, step.scores


def narrow(family):
    """Three layers, of which the latter two are alike."""
    return compile_model(tiny(family, num_hidden_layers=3), page_size=16)


@pytest.fixture(scope="module")
def compiled():
    """A compiled model, its forward pass, and the code that Inductor made, one for each distinct region."""
    result = narrow("qwen3")
    forward, codes = run_and_get_code(result.compile_regions)
    return result, forward, codes


def compilations():
    """Graphs that AOTAutograd was given, and those that Dynamo was."""
    return counters["aot_autograd"]["total"], counters["stats"]["unique_graphs"]


def test_one_compilation_serves_all_layers_and_sizes(compiled):
    result, forward, _ = compiled
    before = compilations()
    first, second = tokens(11, seed=1), tokens(37, seed=2)
    for sequences, slots in ([first, second], 3), ([second], 4), ([first[:2]], 1), ([second, first, second[:5]], 53):
        got = run(forward, result.layout, sequences, slots)
        expected = run(result.graph_module, result.layout, sequences, slots)
        for ours, eager in zip(got, expected, strict=True):
            assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-4)
    assert compilations() == before


def test_regions_copy_no_pool(compiled):
    result, _, codes = compiled
    assert len(codes) == len(result.split.distinct) == 3
    with_attention = [code for code in codes if OP + "(" in code]
    assert len(with_attention) == 2
    assert all(code.count(OP + "(") == 1 and uses_outside_attention(code) == [] for code in with_attention)


def test_the_same_model_again_comes_from_the_cache(compiled):
    counters.clear()
    narrow("qwen3").compile_regions()
    assert counters["inductor"]["fxgraph_cache_hit"] == 3
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_the_search_for_copies_finds_one(compiled):
    """A region with one index_put into its view of the pool, which Inductor can only do on a copy of it."""
    result, _, _ = compiled

    def with_copy(region, inputs):
        attention = region.graph.find_nodes(op="call_function", target=dual_mode_attention)
        for node in attention:
            with region.graph.inserting_before(node):
                pages = region.graph.call_function(torch.ops.aten.slice.Tensor, (node.args[3], 0, 0, 1))
                index = region.graph.call_function(torch.ops.aten.slice.Tensor, (node.args[6], 0, 0, 1))
                put = region.graph.call_function(torch.ops.aten.index_put.default, (node.args[3], [index], pages))
            node.args = (*node.args[:3], put, *node.args[4:])
        region.recompile()
        return inductor(region, inputs) if attention else region

    _, codes = run_and_get_code(lambda: result.compile_regions(with_copy))
    assert len(codes) == 2
    assert all(uses_outside_attention(code) for code in codes)


@pytest.mark.gpu
def test_what_does_not_depend_on_each_other_shares_a_launch():
    """Norm and rotation of queries and keys: a launch less in each region that has attention."""
    result = compile_model(tiny("qwen3", num_hidden_layers=3).cuda(), page_size=16)

    def apart(region, inputs):
        return torch._inductor.compile(region, inputs)

    together, separate = (
        sum(code.count(".run(") for code in run_and_get_code(partial(result.compile_regions, compiler))[1])
        for compiler in (inductor, apart)
    )
    assert together <= separate - 2
