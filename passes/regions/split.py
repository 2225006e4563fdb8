"""The last stage: cuts the rewritten graph after each attention node, so that equal layers are compiled once.

Before, flat, for layers i and i + 1:
    x1 = ... o_proj, norm, MLP, norm, qkv of layers i and i + 1 ...; rows1 = dual_mode_attention(q1, k1, v1, kv1, ...)
After:
    kv1 = aten.view(aten.slice(kv_pool, 1, o1, o1 + n), ...); s1 = aten.slice(scores, ...); p1 = ...
    x1, rows1 = region_1(x0, rows0, o_proj0, ..., qkv1, kv1, s1, ..., p1)
    x2, rows2 = region_1(x1, rows1, o_proj1, ..., qkv2, kv2, s2, ..., p2)

The cut is behind the attention, not between layers, because it is the one place where nothing can be fused anyway:
residual, norm and projection of neighbouring layers stay together. What differs from layer to layer is handed to the
region: parameters, and the views of pool, scores and pillars, whose offsets would otherwise be constants inside it.
A size that a region needs is read from a tensor that the region has, and never handed over: an integer input would be
a second symbol for the same size.

Requires: a rewritten graph with `meta["val"]` on all nodes.
Ensures: the same values; the outer graph has only inputs, parameters, views of the state and calls of regions.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from sparsespec_compile.kernels.ops import dual_mode_attention

from ..base import LAYERED_INPUTS, attribute, describe, input_node
from ..compat import FakeTensor
from ..errors import GraphInvariantError

aten = torch.ops.aten

STATE_VIEWS = frozenset({aten.slice.Tensor, aten.view.default, aten.select.int})
"""What layers take their part of a `LAYERED_INPUTS` by."""


@dataclass(frozen=True)
class SplitGraph:
    """A graph as a sequence of calls of regions.

    Attributes:
        graph_module: computes what the flat graph does; its only submodules are the distinct regions.
        calls: name of the submodule that each region of the sequence is.
        whole: why the graph is one single region; None when it is cut.
    """

    graph_module: GraphModule
    calls: tuple[str, ...]
    whole: str | None = None

    @property
    def distinct(self) -> tuple[str, ...]:
        """The submodules, in the order of their first call."""
        return tuple(dict.fromkeys(self.calls))

    def region(self, name: str) -> GraphModule:
        """The graph of a distinct region: tensors in, a tuple of tensors out."""
        module = self.graph_module.get_submodule(name)
        if not isinstance(module, GraphModule):
            raise GraphInvariantError(f"{name} is a {type(module).__name__}; a split graph calls only graphs.")
        return module

    def __str__(self) -> str:
        why = f" ({self.whole})" if self.whole else ""
        return f"{len(self.calls)} regions, {len(self.distinct)} distinct{why}"


def split(graph_module: GraphModule) -> SplitGraph:
    """Cuts a rewritten graph, which is left unchanged, after each attention node."""
    graph = graph_module.graph
    outside, pieces = _cut(graph)
    whole = _why_whole(pieces)
    if whole is not None:
        pieces = [[node for piece in pieces for node in piece]]
    wanted = set(graph.output_node().all_input_nodes).union(*map(inputs_of, pieces))
    regions = [extract(piece, wanted) for piece in pieces]
    names: dict[Hashable, str] = {}
    calls = tuple(names.setdefault(region.signature, f"region_{len(names)}") for region in regions)
    joined = _join(graph_module, outside, list(zip(calls, regions, strict=True)))
    return SplitGraph(joined, calls, whole)


def _cut(graph: Graph) -> tuple[list[Node], list[list[Node]]]:
    """The nodes outside of regions, and those of each region. Sizes are in neither, since each region reads its own."""
    outside: list[Node] = []
    pieces: list[list[Node]] = [[]]
    piece_of: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "output" or is_size(node):
            continue
        if node.op in ("placeholder", "get_attr") or is_state_view(node):
            outside.append(node)
            continue
        # Part of a tuple: with the call that gives the tuple, so that only tensors are handed over.
        piece = piece_of[input_node(node, 0)] if node.target is operator.getitem else pieces[-1]
        piece.append(node)
        piece_of[node] = piece
        if node.target is dual_mode_attention:
            pieces.append([])
    return outside, [piece for piece in pieces if piece]


def is_state_view(node: Node) -> bool:
    """Whether a node is one layer's part of an input that holds something for every layer."""
    if node.target not in STATE_VIEWS or len(node.all_input_nodes) != 1:
        return False
    source = input_node(node, 0)
    return source.target in LAYERED_INPUTS or is_state_view(source)


def _why_whole(pieces: list[list[Node]]) -> str | None:
    """The reason why the graph must be one region: a write in place whose result several regions would read."""
    piece_of = {node: number for number, piece in enumerate(pieces) for node in piece}
    family: dict[Node, set[Node]] = {}
    for node in piece_of:
        aliases = [family.get(source, {source}) for source in _aliased(node)]
        family[node] = {node}.union(*aliases)
        for member in family[node]:
            family[member] = family[node]
    for node in piece_of:
        for written in _aliased(node, writes=True):
            if node.target is not dual_mode_attention and len({piece_of.get(member) for member in family[written]}) > 1:
                return f"{describe(node)} writes in place into a value that several regions would share"
    return None


def _aliased(node: Node, writes: bool = False) -> list[Node]:
    """The inputs of which the output may be a view, or that are written into."""
    if not isinstance(node.target, OpOverload):
        return [input_node(node, 0)] if node.target is operator.getitem else []
    pairs = zip(node.target._schema.arguments, node.args, strict=False)
    infos = [(declared.alias_info, value) for declared, value in pairs if isinstance(value, Node)]
    return [value for info, value in infos if info is not None and (info.is_write or not writes)]


def _join(source: GraphModule, outside: list[Node], calls: list[tuple[str, Region]]) -> GraphModule:
    """The outer graph, on the parameters of `source` and one module for each name."""
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in outside:
        values[node] = graph.node_copy(node, values.__getitem__)
    modules: dict[str, GraphModule] = {}
    for name, region in calls:
        if name not in modules:  # creating a module generates its code, which is slow
            modules[name] = GraphModule(nn.Module(), region.graph)
        call = graph.call_module(name, tuple(values[node] for node in region.inputs))
        for number, node in enumerate(region.outputs):
            values[node] = graph.call_function(operator.getitem, (call, number))
            values[node].meta["val"] = node.meta["val"]
    graph.output(map_arg(source.graph.output_node().args[0], values.__getitem__))
    paths = [str(node.target) for node in graph.find_nodes(op="get_attr")]
    return GraphModule({**{path: attribute(source, path) for path in paths}, **modules}, graph)


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
    """A region with copies of `nodes`.

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
        copies[node].meta["val"] = _example(node)

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


def _example(node: Node) -> object:
    """A view's place in memory differs from layer to layer: an odd one promises no alignment to the compiler."""
    value = node.meta["val"]
    if not isinstance(value, FakeTensor) or _is_at_start(node):
        return value
    with value.fake_mode, torch.no_grad():
        return value.as_strided(value.shape, value.stride(), 1)


def _is_at_start(node: Node) -> bool:
    """Whether a compiler may take a value's address for aligned. A layer's part of the state is one of many."""
    return not is_state_view(node) and statically_known_true(node.meta["val"].storage_offset() == 0)


def _calls(graph: Graph) -> Hashable:
    """The computation of a graph without its nodes' names: targets, and arguments with nodes by number."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    return tuple(
        (node.target, repr(map_arg((node.args, node.kwargs), numbers.__getitem__)))
        for node in graph.nodes
        if node.op != "placeholder"
    )


def _kind(node: Node) -> Hashable:
    """The properties of a value that compiled code may depend on."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return str(value)
    return value.dtype, value.device, _is_at_start(node), *map(str, (*value.shape, *value.stride()))
