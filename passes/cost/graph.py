"""Derives the cost of an iteration from a compiled graph.

Sizes come from `meta["val"]`: symbols of the graph's inputs become T and R, everything else is a number. What a
request's mode decides (how much of the cache is read) is not in the graph's shapes; it comes with each attention node
from `terms.attention`. Weights of one dimension (norms, biases) and the rotary angles are left out, they are below
a thousandth of a model.

Requires: a graph that `compile_model` gave.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from sympy import Expr
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsespec_compile.kernels.ops import AttentionCall, dual_mode_attention, halved_product

from ..base import argument, call_of, describe, input_node
from ..errors import CostModelError
from .terms import IterationCost, R, T, Term, attention, collect, embedding, logits, projection

aten = torch.ops.aten

_WEIGHTS: dict[object, tuple[str, str, int]] = {
    aten.linear.default: ("input", "weight", 1),
    aten.addmm.default: ("mat1", "mat2", 0),
    aten.mm.default: ("self", "mat2", 0),
    halved_product: ("x", "weight", 1),
}
"""Products with a weight: the arguments of what is multiplied and of the weight, whose dimension is summed over."""


def graph_cost(graph_module: GraphModule) -> IterationCost:
    """Bytes and FLOPs of one iteration of a compiled graph.

    Raises:
        CostModelError: a weight is used in a way whose cost is not known, as the experts of a mixture are.
    """
    sizes = _Sizes(graph_module)
    return collect(term for node in graph_module.graph.nodes for term in _terms(node, sizes))


class _Sizes:
    """Translates the graph's symbolic sizes."""

    def __init__(self, graph_module: GraphModule) -> None:
        inputs = {node.target: node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")}
        self._names: dict[Expr, Expr] = {
            inputs["input_ids"].shape[1].node.expr: T,
            inputs["logits_to_keep"].shape[0].node.expr: R,
        }

    def rows(self, node: Node, features: int) -> Expr:
        """How many vectors of `features` elements a node's value has."""
        count = sympy.sympify(1)
        for size in node.meta["val"].shape:
            count *= size if isinstance(size, int) else size.node.expr.subs(self._names)
        return count / features


def _terms(node: Node, sizes: _Sizes) -> Iterator[Term]:
    if node.target in _WEIGHTS and _weight(node).op == "get_attr":
        yield _projection(node, sizes)
    elif node.target is aten.embedding.default:
        value = node.meta["val"]
        yield embedding(sizes.rows(node, value.shape[-1]), value.shape[-1], value.itemsize)
    elif node.target is dual_mode_attention:
        call = call_of(AttentionCall, node)
        q, key, value = (tensor.meta["val"] for tensor in (call.q, call.k, call.v))
        yield from attention(q.shape[1], key.shape[1], key.shape[2], value.shape[2], call.settings.window, key.itemsize)
    elif node.op == "output":
        value = input_node(node, 0).meta["val"]
        yield logits(sizes.rows(input_node(node, 0), value.shape[-1]), value.shape[-1], value.itemsize)
    elif node.op == "call_function":
        _refuse_other_weights(node)


def _weight(node: Node) -> Node:
    weight = argument(node, _WEIGHTS[node.target][1])
    return weight if isinstance(weight, Node) else node


def _projection(node: Node, sizes: _Sizes) -> Term:
    multiplied, _, summed = _WEIGHTS[node.target]
    weight = _weight(node).meta["val"]
    inputs = weight.shape[summed]
    return projection(sizes.rows(argument(node, multiplied), inputs), inputs, weight.numel() // inputs, weight.itemsize)


def _refuse_other_weights(node: Node) -> None:
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if source.op == "get_attr" and isinstance(value, Tensor) and value.dim() > 1:
            raise CostModelError(
                f"The cost of {describe(node)} is not known: it reads {source.target}, a weight of shape "
                f"{tuple(value.shape)}. Allowed: embeddings and linear layers. Mixtures of experts read as many "
                "experts as their tokens choose, which no shape tells."
            )
