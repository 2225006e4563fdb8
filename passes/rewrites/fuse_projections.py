"""Projections that share an input become one GEMM.

Before (q, k, v of one layer; gate and up of another):
    q: [1, T, a] = aten.linear(x, wq [a, H])
    k: [1, T, b] = aten.linear(x, wk [b, H])
    v: [1, T, c] = aten.linear(x, wv [c, H])
After:
    y: [1, T, a + b + c] = aten.linear(x, w [a + b + c, H])
    q: [1, T, a] = aten.slice(y, 2, 0, a); k: [1, T, b] = aten.slice(y, 2, a, a + b); v likewise

The model's own parameters move into the memory of `w`: a change in place of one reaches the graph, no bytes are
doubled, and `state_dict`, `save_pretrained` and `save_model` give what they gave before. Biases are joined likewise.
What cannot be joined (a parameter that is tied, used more than once, not contiguous, or of another type) is left as it
is, with the reason in the notes.

Requires: `meta["val"]` on all nodes.
Ensures: shapes and values of all other nodes are unchanged up to rounding.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ..base import GraphPass, attribute, fill, find_calls, input_node
from ..capture.adapters import adapter_layers, in_adapter
from ..errors import GraphInvariantError
from ..parallel.division import WHOLE, Placement

aten = torch.ops.aten

FUSED = "fused_{}_{}"


class FuseProjections(GraphPass):
    """See the module's docstring."""

    name = "fuse projections"

    def rewrite(self, graph_module: GraphModule) -> None:
        table = ParameterTable(self.context.model, graph_module)
        # Another thread may be running the model, with an op that reads the memory released here. That op has ended
        # once two further groups have been copied, as copying takes as long as reading.
        self._released: deque[list[Tensor]] = deque(maxlen=2)
        for source, linears in _by_input(graph_module.graph).items():
            group = [linear for linear in linears if self._can_fuse(table, linear)]
            for alike in self._split_by_kind(group):
                if len(alike) > 1 and _writes_between(alike):
                    self.notes.append(
                        f"left {_path(_weights(alike[0])[0])}: something is written in place before the next"
                    )
                elif len(alike) > 1:
                    self._fuse(graph_module, table, source, alike)
                elif len(group) > 1:
                    self.notes.append(
                        f"left {_path(_weights(alike[0])[0])}: no other projection of its input has its kind of bias"
                    )
        graph_module.graph.eliminate_dead_code()
        fill(graph_module)

    def _can_fuse(self, table: ParameterTable, linear: Node) -> bool:
        for argument in _weights(linear):
            reason = table.why_fixed(argument)
            if reason is not None:
                self.notes.append(f"left {_path(argument)}: {reason}")
                return False
        return True

    def _fuse(self, graph_module: GraphModule, table: ParameterTable, source: Node, linears: list[Node]) -> None:
        names = [FUSED.format(kind, self.matches) for kind in ("weight", "bias")]
        columns = list(zip(*map(_weights, linears), strict=True))
        self._released.append([table.parameter(node).data for node in chain(*columns)])
        for name, column in zip(names, columns, strict=False):
            fused = fuse_storage([table.parameter(node) for node in column], self.context.moved)
            graph_module.register_parameter(name, torch.nn.Parameter(fused, requires_grad=False))
            if self.context.parallel is not None:
                _place(self.context.parallel.weights, name, column)
        self.notes.append(f"fused {' + '.join(_path(_weights(linear)[0]) for linear in linears)}")
        _rewrite_group(graph_module.graph, source, linears, names[: len(columns)])
        self.matches += 1

    def _split_by_kind(self, linears: list[Node]) -> list[list[Node]]:
        """Linears whose weights and biases can lie in one storage: alike in bias, dtype, device, and in how they are
        divided among ranks."""
        kinds: dict[tuple, list[Node]] = defaultdict(list)
        parts = {} if self.context.parallel is None else self.context.parallel.weights
        for linear in linears:
            weight = input_node(linear, 1)
            value, part = weight.meta["val"], parts.get(str(weight.target), WHOLE)
            kinds[(len(linear.args), value.dtype, value.device, part.kind, part.dim)].append(linear)
        return list(kinds.values())


def _place(weights: dict[str, Placement], name: str, column: Sequence[Node]) -> None:
    """Records which part of a fused weight or bias a rank has, from the weights that it was made of."""
    parts = [weights.get(str(node.target), WHOLE) for node in column]
    blocks = [size for part in parts for size in part.blocks] if parts[0].dim == 0 else parts[0].blocks
    weights[name] = replace(parts[0], blocks=tuple(blocks))


def _weights(linear: Node) -> list[Node]:
    """The weight of a linear node and its bias, if it has one."""
    return linear.all_input_nodes[1:]


def _path(weight: Node) -> str:
    """Path of a weight in the model, which the captured module holds as `model`."""
    return str(weight.target).removeprefix("model.")


def _by_input(graph: Graph) -> dict[Node, list[Node]]:
    """Linear nodes on weights of the graph, by their input, where there are at least two."""
    groups: dict[Node, list[Node]] = defaultdict(list)
    for linear in find_calls(graph, aten.linear.default):
        if all(isinstance(argument, Node) and argument.op == "get_attr" for argument in linear.args[1:]):
            groups[input_node(linear, 0)].append(linear)
    return {source: linears for source, linears in groups.items() if len(linears) > 1}


def _writes_between(linears: list[Node]) -> bool:
    """Whether a value is changed in place between the first and the last: the input might be, and so must wait."""
    nodes = list(linears[0].graph.nodes)
    between = nodes[nodes.index(linears[0]) : nodes.index(linears[-1])]
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in between)


def _rewrite_group(graph: Graph, source: Node, linears: list[Node], names: list[str]) -> None:
    last = input_node(linears[0], 0).meta["val"].dim() - 1
    with graph.inserting_before(linears[0]):
        joined = [graph.get_attr(name) for name in names]
        whole = graph.call_function(aten.linear.default, (source, *joined))
        start = 0
        for linear in linears:
            end = start + input_node(linear, 1).meta["val"].shape[0]
            part = graph.call_function(aten.slice.Tensor, (whole, last, start, end))
            for node in (whole, part):
                node.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
            linear.replace_all_uses_with(part)
            _reshape_views(part)
            start = end
    for linear in linears:
        graph.erase_node(linear)


def _reshape_views(part: Node) -> None:
    """A part of the joined output is strided, and where rows are merged a view of it may need a copy."""
    for user in part.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default


class ParameterTable:
    """What the graph's weights are in the model, and whether their storage may be changed."""

    def __init__(self, model: nn.Module, graph_module: GraphModule) -> None:
        self.root = graph_module
        self.adapted = adapter_layers(model)
        self.names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.uses = Counter(
            id(self.tensor(node)) for node in graph_module.graph.find_nodes(op="get_attr") for _ in node.users
        )

    def tensor(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads."""
        return attribute(self.root, str(node.target))

    def parameter(self, node: Node) -> nn.Parameter:
        """The model's parameter that a node reads; `why_fixed` must have said None."""
        value = self.tensor(node)
        if not isinstance(value, nn.Parameter):
            raise GraphInvariantError(f"{node.target} is not a parameter, so its storage cannot move.")
        return value

    def why_fixed(self, node: Node) -> str | None:
        """Why the storage of this weight must stay as it is; None when it may move."""
        value = self.tensor(node)
        if type(value) is not nn.Parameter or type(value.data) is not Tensor or id(value) not in self.names:
            return f"it is not a plain parameter of the model but a {type(value).__name__}"
        if in_adapter(_path(node), self.adapted):
            return "it is an adapter's, which comes and goes, and the graphs without it are to stay as they are"
        if self.names[id(value)] > 1:
            return "it is tied: the model has it under more than one name"
        if self.uses[id(value)] > 1:
            return "it is used more than once"
        if not value.is_contiguous():
            return "it is not contiguous"
        return None


_fused: WeakValueDictionary[tuple[torch.device, int], Tensor] = WeakValueDictionary()
"""The fused tensors of all compiled models, by device and address."""


def fuse_storage(parameters: Sequence[nn.Parameter], moved: list[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parameters. The parameters move into its memory; their old storages are released.

    Each parameter keeps a storage object that spans its own rows and nothing else, so that libraries which look at
    storages, as safetensors' `save_model` does, find no sharing. It keeps the memory of the whole tensor alive.

    Parameters that an earlier compilation has fused are taken as they are. The others are added to `moved`.
    """
    existing = _fused_before(parameters)
    if existing is not None:
        return existing
    with torch.no_grad():
        fused = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, fused.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = torch.from_dlpack(rows)
    moved.extend(parameters)
    _fused[fused.device, fused.data_ptr()] = fused
    return fused


def give_back_storage(parameters: Sequence[nn.Parameter]) -> None:
    """Undoes `fuse_storage`: gives each parameter a storage of its own again."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def _fused_before(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The fused tensor that consists of just these parameters, in this order; None when there is none."""
    fused = _fused.get((parameters[0].device, parameters[0].data_ptr()))
    if fused is None or fused.dtype != parameters[0].dtype or len(fused) != sum(map(len, parameters)):
        return None
    parts = fused.split([len(parameter) for parameter in parameters])
    pairs = zip(parameters, parts, strict=True)
    return fused if all(own.data_ptr() == part.data_ptr() and own.shape == part.shape for own, part in pairs) else None
