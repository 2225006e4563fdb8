"""Derives the cost of an iteration from a compiled graph.

Sizes come from `meta["val"]`: symbols of the graph's inputs become T and R, everything else is a number. What a
request's mode decides (how much of the cache is read) is not in the graph's shapes; it comes with each attention node
from `terms.attention`. Weights of one dimension (norms, biases) and the rotary angles are left out, they are below
a thousandth of a model. Quantised weights count by the bytes that hold them. Of a model that ranks share, it is the
cost of a rank's part, without the sums over ranks.

Requires: a graph that `compile_model` gave.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from sympy import Expr, Rational
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from sparsespec_compile.kernels.ops import (
    AttentionCall,
    ExpertsCall,
    dual_mode_attention,
    embed_part,
    experts,
    fp8_product,
    halved_product,
    quantised_product,
)

from ..base import argument, call_of, describe, input_node
from ..errors import CostModelError
from . import terms
from .terms import IterationCost, R, T, Term, attention, collect, embedding, logits, projection

aten = torch.ops.aten

_WEIGHTS: dict[object, tuple[str, str, int]] = {
    aten.linear.default: ("input", "weight", 1),
    aten.addmm.default: ("mat1", "mat2", 0),
    aten.mm.default: ("self", "mat2", 0),
    aten.matmul.default: ("self", "other", 0),
    halved_product: ("x", "weight", 1),
    quantised_product: ("x", "weight", 1),
    fp8_product: ("x", "weight", 1),
}
"""Products with a weight: the arguments of what is multiplied and of the weight, whose dimension is summed over."""


_GROUPED = frozenset({"transformers::grouped_mm_fallback", "aten::_grouped_mm"})
"""Products of rows [S, K] with matrices [experts, K, N], which experts that are no sites take."""

_EXPERTS_LAUNCHES = 4
"""Kernels of `experts`."""


def graph_cost(graph_module: GraphModule) -> IterationCost:
    """Bytes and FLOPs of one iteration of a compiled graph.

    Raises:
        CostModelError: a weight is used in a way whose cost is not known.
    """
    sizes = _Sizes(graph_module)
    return collect(term for node in graph_module.graph.nodes for term in _terms(node, sizes))


class _Sizes:
    """Translates the graph's symbolic sizes.

    Attributes:
        sources: as `_sources` gives them.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.sources = _sources(graph_module)
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
    if node.target in _WEIGHTS and sizes.sources[_weight(node)] and _weight(node).meta["val"].dim() == 2:
        yield _projection(node, sizes)
    elif node.target in (aten.embedding.default, embed_part):
        value = node.meta["val"]
        yield embedding(sizes.rows(node, value.shape[-1]), value.shape[-1], value.itemsize)
    elif node.target is dual_mode_attention:
        call = call_of(AttentionCall, node)
        q, key, value = (tensor.meta["val"] for tensor in (call.q, call.k, call.v))
        heads = q.shape[1], key.shape[1], key.shape[2], value.shape[2]
        yield from attention(*heads, call.settings.window, key.itemsize, chunked=call.settings.chunked)
    elif node.target is experts:
        yield _experts(node, sizes)
    elif _is_grouped(node):
        count, inner, columns = input_node(node, 1).meta["val"].shape
        chosen = sizes.rows(input_node(node, 0), inner) / T
        yield terms.experts(T, count, chosen, inner * columns, node.meta["val"].itemsize, launches=1)
    elif node.target is aten.transpose.int and all(user.target is experts or _is_grouped(user) for user in node.users):
        return  # the matrices of experts as they are read
    elif node.op == "output":
        value = input_node(node, 0).meta["val"]
        yield logits(sizes.rows(input_node(node, 0), value.shape[-1]), value.shape[-1], value.itemsize)
    elif node.op == "call_function" and not sizes.sources[node]:  # what gives a weight is counted where it is read
        _refuse_other_weights(node)


def _experts(node: Node, sizes: _Sizes) -> Term:
    call = ExpertsCall.of(node.args)
    index, up, down = (one.meta["val"] for one in (call.choice, call.up, call.down))  # type: ignore[attr-defined]
    chosen, elements = index.shape[1], (up.numel() + down.numel()) // up.shape[0]
    rows = sizes.rows(input_node(node, 1), chosen)
    return terms.experts(rows, up.shape[0], chosen, elements, up.itemsize, _EXPERTS_LAUNCHES)


def _is_grouped(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and str(node.target._schema.name) in _GROUPED


def _weight(node: Node) -> Node:
    weight = argument(node, _WEIGHTS[node.target][1])
    return weight if isinstance(weight, Node) else node


def _projection(node: Node, sizes: _Sizes) -> Term:
    multiplied, _, summed = _WEIGHTS[node.target]
    weight = _weight(node).meta["val"]
    inputs, outputs = weight.shape[summed], weight.numel() // weight.shape[summed]
    held = sum(
        value.numel() * value.itemsize for value in (source.meta["val"] for source in sizes.sources[_weight(node)])
    )
    itemsize = Rational(held, weight.numel())  # of quantised weights: with scales, and less than that of their dtype
    return projection(sizes.rows(argument(node, multiplied), inputs), inputs, outputs, itemsize)


def _sources(graph_module: GraphModule) -> dict[Node, set[Node]]:
    """The weights from which alone each value is computed, as a quantised weight's is; none for all other values."""
    sources: dict[Node, set[Node]] = {}
    for node in graph_module.graph.nodes:
        found = [sources[source] for source in node.all_input_nodes] if node.op == "call_function" else []
        sources[node] = {node} if node.op == "get_attr" else set().union(*found) if all(found) else set()
    return sources


def _refuse_other_weights(node: Node) -> None:
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if source.op == "get_attr" and isinstance(value, Tensor) and sum(size > 1 for size in value.shape) > 1:
            raise CostModelError(
                f"The cost of {describe(node)} is not known: it reads {source.target}, a weight of shape "
                f"{tuple(value.shape)}. Allowed: embeddings, linear layers and experts of transformers' interface."
            )
