"""The graph for steps that run operation by operation, without what Python can be spared.

Before: every parameter is looked up along its path through the model's modules, and every op is called through
`torch.ops`, which parses arguments by the op's schema.
After: parameters lie side by side, and an op for which torch has a function with the same arguments, in the same order,
is called by that. The same kernels run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.nn import functional

from ..base import attribute

aten = torch.ops.aten

_FUNCTIONS: dict[object, Callable[..., object]] = {
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.cos.default: torch.cos,
    aten.embedding.default: torch.embedding,
    aten.linear.default: functional.linear,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.select.int: torch.select,
    aten.sin.default: torch.sin,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}


def run_directly(graph_module: GraphModule) -> GraphModule:
    """A module that computes what `graph_module` does, with the same parameters."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    held: dict[str, Tensor] = {}
    for number, node in enumerate(graph.nodes):
        if node.op == "get_attr":
            name = f"held_{number}"
            held[name] = attribute(graph_module, str(node.target))
            node.target = name
        elif node.op == "call_function":
            node.target = _FUNCTIONS.get(node.target, node.target)
    return GraphModule(held, graph)
