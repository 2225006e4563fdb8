"""Normalise: what export leaves behind goes, what computes something stays."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule

from sparsespec_compile.passes.base import INPUTS, PassContext
from sparsespec_compile.passes.capture.capture import capture
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.passes.report import CompileReport
from sparsespec_compile.passes.rewrites.normalise import CASTS, CHECKS, Normalise

from .families import tiny

aten = torch.ops.aten


class Steps(nn.Module):
    """Each named step once as a no-op and once doing something."""

    def forward(self, input_ids, position_ids, logits_to_keep):
        x = input_ids.float()[..., None].expand(-1, -1, 8)
        x = x.to(torch.float32)
        x = x.expand(1, x.shape[1], 8)
        x = x[:, : x.shape[1]]
        x = x[:, :]
        x = torch.dropout(x, 0.5, False)
        x = x.detach()
        x = x[..., 1:].to(torch.float64)
        x = x.to(torch.float64, copy=True)
        position_ids + 1
        return x[..., :1] + logits_to_keep.sum() + position_ids.sum()


def normalised(module):
    rows, kept = Dim("rows", min=2), Dim("kept", min=2)
    inputs = (torch.arange(7)[None], torch.arange(7)[None], torch.arange(3))
    shapes = ({1: rows}, {1: rows}, {0: kept})
    graph_module = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    graph_module = GraphModule(graph_module, graph_module.graph)
    expected = graph_module(*inputs)
    graph_pass = Normalise(PassContext(tiny("llama"), KVLayout((), 16), CompileReport("", "")))
    graph_pass(graph_module)
    return graph_module, graph_pass, expected, inputs


def targets(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def test_no_ops_go_and_the_rest_stays():
    graph_module, graph_pass, expected, inputs = normalised(Steps())
    found = targets(graph_module)
    assert torch.equal(graph_module(*inputs), expected)
    assert found.count(aten.slice.Tensor) == 2
    assert found.count(aten.expand.default) == 1
    assert [target for target in found if target in CASTS] == [aten.to.dtype, aten.to.dtype, aten.to.dtype]
    assert not set(found) & {aten.dropout.default, aten.detach.default, aten.detach_.default, *CHECKS}
    assert graph_pass.matches > 5


def test_dead_nodes_go():
    graph_module, *_ = normalised(Steps())
    assert all(node.users for node in graph_module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_signature_is_positional_and_a_tensor_comes_out(bench, family):
    model = bench(family).model
    graph_pass = Normalise(PassContext(model, KVLayout((), 16), CompileReport("", "")))
    graph_module = capture(model).graph_module
    graph_pass(graph_module)
    assert tuple(node.target for node in graph_module.graph.find_nodes(op="placeholder")) == INPUTS
    with torch.no_grad():
        logits = graph_module(torch.arange(9)[None], torch.arange(9)[None], torch.arange(4))
    assert logits.shape[:2] == (1, 4)
    assert not set(targets(graph_module)) & CHECKS
    for node in graph_module.graph.nodes:
        if node.target in CASTS:
            assert node.args[0].meta["val"].dtype != node.meta["val"].dtype
