"""Removes leftovers of the export and gives the graph a plain signature.

Before (keyword arguments in a pytree, a tuple out):
    a: f32[1, T, H] = aten.slice(x: f32[1, T, H], 1, 0, 9223372036854775807)
    aten._assert_tensor_metadata(a, dtype=float32)
    b: f32[1, T, H] = aten.to.dtype(a, float32)
    c: f32[1, T, H] = aten.mul(b, w)
    output((c,))
After (positional arguments, one tensor out):
    c: f32[1, T, H] = aten.mul(x, w)
    output(c)

Requires: a graph of `torch.export`, `meta["val"]` on its nodes, in evaluation mode.
Ensures: no assertion nodes, no casts, slices, expansions or dropouts that return their input, no dead nodes;
placeholders input_ids, position_ids, logits_to_keep in this order; the output is the logits tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.graph import CodeGen

from ..base import INPUTS, GraphPass, argument, input_node
from ..errors import GraphInvariantError

aten = torch.ops.aten

CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
"""Ops that only check what export assumed."""

CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other})


class Normalise(GraphPass):
    """See the module's docstring."""

    name = "normalise"

    def rewrite(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        before = len(graph.nodes)
        for node in list(graph.nodes):
            if node.target in CHECKS:
                graph.erase_node(node)
            elif node.op == "call_function" and _returns_its_input(node):
                node.replace_all_uses_with(input_node(node, 0))
                graph.erase_node(node)
        _plain_signature(graph_module)
        graph.eliminate_dead_code()
        self.matches = before - len(graph.nodes)

    def ensures(self, graph_module: GraphModule) -> None:
        names = tuple(node.target for node in graph_module.graph.find_nodes(op="placeholder"))
        if names != INPUTS:
            raise GraphInvariantError(f"normalise must leave the inputs {INPUTS}, it left {names}.")


def _plain_signature(graph_module: GraphModule) -> None:
    graph = graph_module.graph
    (output,) = graph.find_nodes(op="output")
    (logits,) = output.all_input_nodes
    output.args = (logits,)
    placeholders = {node.target: node for node in graph.find_nodes(op="placeholder")}
    for name in reversed(INPUTS):
        next(iter(graph.nodes)).prepend(placeholders[name])
    graph.set_codegen(CodeGen())


def _returns_its_input(node: Node) -> bool:
    check = _NO_OPS.get(node.target)
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if check is None or source is None:
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and check(node, before, after)


def _same_type(node: Node, before: Tensor, after: Tensor) -> bool:
    return not argument(node, "copy") and before.dtype == after.dtype and before.device == after.device


def _whole_slice(node: Node, before: Tensor, after: Tensor) -> bool:
    if argument(node, "start") not in (0, None) or argument(node, "step") != 1:
        return False
    end = argument(node, "end")
    size = end.meta["val"] if isinstance(end, Node) else end
    if size is None or (isinstance(size, int) and size >= 2**62):
        return True
    return statically_known_true(size == before.shape[argument(node, "dim")])


def _same_sizes(node: Node, before: Tensor, after: Tensor) -> bool:
    return before.dim() == after.dim() and all(
        statically_known_true(old == new) for old, new in zip(before.shape, after.shape, strict=True)
    )


def _evaluating(node: Node, before: Tensor, after: Tensor) -> bool:
    return argument(node, "train") is False


def _always(node: Node, before: Tensor, after: Tensor) -> bool:
    return True


_NO_OPS: dict[object, Callable[[Node, Tensor, Tensor], bool]] = {
    **dict.fromkeys(CASTS, _same_type),
    aten.slice.Tensor: _whole_slice,
    aten.expand.default: _same_sizes,
    aten.dropout.default: _evaluating,
    aten.alias.default: _always,
    aten.detach.default: _always,
}
