"""Regions: runs of a graph's nodes as modules of their own, with parameters as inputs, so that layers can be equal.

Before, two layers of a graph:
    a: [1, T, H] = aten.linear(x, w0); b: [1, T, H] = aten.relu(a)
    c: [1, T, H] = aten.linear(b, w1); d: [1, T, H] = aten.relu(c)
After, two regions of one signature, so that one compilation serves both:
    b = region(x, w0); d = region(b, w1), where region(x, w) = relu(linear(x, w))

A size that a region needs is read from a tensor that the region has, and never handed over: an integer input would be
a second symbol for the same size.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

aten = torch.ops.aten


@dataclass(frozen=True)
class Region:
    """Some nodes of a graph as a graph of their own.

    Attributes:
        graph: takes the values of `inputs`, gives a tuple of the values of `outputs`.
        inputs: the outer nodes that it reads, in the order of their first use.
        outputs: those of its nodes that others read, in the order of the graph.
        signature: equal for two regions when the graph of one can run in place of the other's.
    """

    graph: Graph
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    signature: Hashable


def extract(nodes: Sequence[Node], wanted: Container[Node]) -> Region:
    """The region of `nodes`, which stay where they are.

    Args:
        nodes: calls in the order of their graph, none of them a size.
        wanted: what the rest of the graph reads: the outputs are those of the nodes that are in it.
    """
    inputs = inputs_of(nodes)
    outputs = tuple(node for node in nodes if node in wanted)
    graph = _copy(nodes, inputs, outputs)
    return Region(graph, inputs, outputs, (_calls(graph), *map(_kind, (*inputs, *outputs))))


def inputs_of(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """What `nodes` read from elsewhere, in the order of first use; then tensors of which only a size is read."""
    inside = set(nodes)
    read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
    inputs = dict.fromkeys(source for source in read if source not in inside and not is_size(source))
    for size in _sizes_read(filter(is_size, read)):
        owner = size.all_input_nodes[0]
        if owner not in inside and _owner(size, inputs) is None:
            inputs[owner] = None
    return tuple(inputs)


def is_size(node: Node) -> bool:
    """Whether a node is a size of a tensor or arithmetic on sizes."""
    if node.target is aten.sym_size.int:
        return True
    is_number = isinstance(node.meta.get("val"), (SymInt, SymFloat, SymBool, int, float, bool))
    return is_number and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def _sizes_read(sizes: Iterable[Node]) -> list[Node]:
    """The `sym_size` nodes that the given sizes are computed from."""
    found: dict[Node, None] = {}
    for size in sizes:
        leaf = size.target is aten.sym_size.int
        found.update(dict.fromkeys([size] if leaf else _sizes_read(size.all_input_nodes)))
    return list(found)


def _owner(size: Node, inputs: Iterable[Node]) -> tuple[Node, int] | None:
    """The first of `inputs` with a dimension of that size, and the dimension; None when there is none."""
    for node in inputs:
        value = node.meta.get("val")
        shape = map(str, value.shape) if isinstance(value, Tensor) else ()
        for dimension, length in enumerate(shape):
            if length == str(size.meta["val"]):
                return node, dimension
    return None


def _copy(nodes: Sequence[Node], inputs: tuple[Node, ...], outputs: tuple[Node, ...]) -> Graph:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"input_{number}")
        copies[node].meta["val"] = _example(node.meta["val"])

    def copy_of(node: Node) -> Node:
        if node not in copies:  # a size, since all else is an input or was copied before
            owner = _owner(node, inputs) if node.target is aten.sym_size.int else None
            if owner is None:
                copies[node] = graph.node_copy(node, copy_of)
            else:
                copies[node] = graph.call_function(aten.sym_size.int, (copies[owner[0]], owner[1]))
                copies[node].meta["val"] = node.meta["val"]
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    graph.output(tuple(copies[node] for node in outputs))
    graph.lint()
    return graph


def _example(value: object) -> object:
    """A view's place in memory differs from layer to layer: an odd one promises no alignment to the compiler."""
    if not isinstance(value, FakeTensor) or _is_at_start(value):
        return value
    with value.fake_mode, torch.no_grad():
        return value.as_strided(value.shape, value.stride(), 1)


def _is_at_start(value: Tensor) -> bool:
    return statically_known_true(value.storage_offset() == 0)


def _calls(graph: Graph) -> Hashable:
    """What the graph computes, whatever its nodes are called: targets, and arguments with nodes by number."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    return tuple(
        (node.target, repr(map_arg((node.args, node.kwargs), numbers.__getitem__)))
        for node in graph.nodes
        if node.op != "placeholder"
    )


def _kind(node: Node) -> Hashable:
    """What a compilation may rely on about a value."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return str(value)
    return value.dtype, value.device, _is_at_start(value), *map(str, (*value.shape, *value.stride()))
