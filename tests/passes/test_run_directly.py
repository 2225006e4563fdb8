"""The graph that runs operation by operation: the same values from the same parameters, with fewer detours."""

import pytest
import torch
from torch._ops import OpOverload

from sparsespec_compile.passes.regions.run import run_directly

from .families import DOZEN, telling
from .prefill import prefill_step


def run(forward, case):
    inputs = prefill_step(case.compiled.layout, case.sequences).inputs
    with torch.no_grad():
        return forward(*inputs)


@pytest.mark.parametrize("family", telling([*DOZEN, "qwen3_moe"]))
def test_values_are_the_same(bench, family):
    case = bench(family)
    graph_module = case.compiled.graph_module
    assert torch.equal(run(run_directly(graph_module), case), run(graph_module, case))


def test_parameters_are_shared(bench):
    """A change in place is seen, and nothing is copied."""
    case = bench("llama")
    direct = run_directly(case.compiled.graph_module)
    ours = {tensor.data_ptr() for tensor in direct.state_dict().values()}
    assert ours <= {tensor.data_ptr() for tensor in case.compiled.graph_module.state_dict().values()}
    before = run(direct, case)
    norm = case.model.model.norm.weight
    try:
        with torch.no_grad():
            norm.mul_(2)
        torch.testing.assert_close(run(direct, case), 2 * before)
    finally:
        with torch.no_grad():
            norm.div_(2)


def test_detours_are_gone(bench):
    graph_module = bench("llama").compiled.graph_module
    nodes = run_directly(graph_module).graph.nodes
    assert not any("." in str(node.target) for node in nodes if node.op == "get_attr")
    slow, before = (
        sum(isinstance(node.target, OpOverload) for node in graph.nodes)
        for graph in (run_directly(graph_module).graph, graph_module.graph)
    )
    assert slow < before / 2
