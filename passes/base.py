"""What a pass is, and what passes share: context, the graph's inputs, the search for nodes, and nodes' values."""

from __future__ import annotations

import difflib
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from transformers import PreTrainedModel

from sparsespec_compile.kernels.ops import AttentionCall, SiteCall

from .compat import FakeTensorMode, ShapeEnv, python_dispatch
from .errors import GraphInvariantError, PassMatchError
from .layout import KVLayout
from .parallel.division import Part, Placement
from .ranks import VocabularyPart
from .report import CompileReport

COMPILING = threading.RLock()
"""Held while a model is compiled. `torch.export`, Inductor and settings of the process that they read, such as
TRITON_CACHE_DIR, serve one compilation at a time."""

INPUTS = ("input_ids", "position_ids", "logits_to_keep")
"""Inputs of the captured graph, in order."""

STATE_INPUTS = ("kv_pool", "scores", "pillar_index")
"""Inputs that the attention rewrite adds; the step tensors (`kernels.ops.STEP_TENSORS`) follow them."""

COPY, SCALE = "draft_weight_", "draft_scale_"
"""Buffers of the form for drafts, with a number behind: an 8-bit copy of a weight, and the scales of its rows."""

LAYERED_INPUTS = frozenset({*STATE_INPUTS, "page_table"})
"""Inputs of which each layer takes a view of its own."""


@dataclass
class Parallel:
    """What passes know about the ranks that share a model.

    Attributes:
        part: which part of the model this rank holds.
        weights: which part of the graph's parameters a rank has, by the target of the nodes that read them; others are
            whole. A pass that makes parameters adds them.
        vocabularies: the tokens of which a rank has rows, for parameters that have a row for each token.
        reduced: whether the graph sums up what the ranks have summands of.
    """

    part: Part
    weights: dict[str, Placement]
    vocabularies: dict[str, VocabularyPart]
    reduced: bool = False


@dataclass(frozen=True)
class PassContext:
    """What passes may read besides the graph.

    Attributes:
        model: the model that was captured; only the fusing pass touches it, and only the storage of parameters.
        layout: its attention layers and the pool that the runtime will allocate.
        report: passes write the outcome of each attention node here.
        moved: parameters whose storage a pass has moved; they get one of their own back when a later step fails.
        parallel: the ranks that share the model; None when it is whole.
    """

    model: PreTrainedModel
    layout: KVLayout
    report: CompileReport
    parallel: Parallel | None = None
    moved: list[nn.Parameter] = field(default_factory=list)


class GraphPass(PassBase, ABC):
    """A pass over an FX graph.

    `requires` and `ensures` (of `torch.fx.passes.infra`) state what holds before and after; `rewrite` does the work
    in place, sets `matches`, and may add `notes` for the report. The module's code is left as it was: of a deep model
    it takes a third of a second to write, and only that of the last graph is run.
    """

    name: str

    def __init__(self, context: PassContext) -> None:
        super().__init__()
        self.context = context
        self.matches = 0
        self.notes: list[str] = []

    @abstractmethod
    def rewrite(self, graph_module: GraphModule) -> None:
        """Changes `graph_module` in place."""

    def call(self, graph_module: GraphModule) -> PassResult:
        self.rewrite(graph_module)
        graph_module.graph.lint()
        return PassResult(graph_module, self.matches > 0)


def input_node(node: Node, index: int) -> Node:
    """Argument `index` of a call, which must be a node."""
    argument = node.args[index]
    if not isinstance(argument, Node):
        raise GraphInvariantError(f"argument {index} of {describe(node)} is {argument!r}; it must be a node.")
    return argument


def argument(node: Node, name: str) -> Any:
    """The value that a call of an op has for the argument called `name`, the default when it gives none."""
    if not isinstance(node.target, OpOverload):
        raise GraphInvariantError(f"{describe(node)} is not a call of an op.")
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            given = node.args[position : position + 1] or (node.kwargs.get(name, declared.default_value),)
            return given[0]
    raise GraphInvariantError(f"{describe(node)} has no argument {name!r}.")


def call_of(kind: type[SiteCall] | type[AttentionCall], node: Node) -> Any:
    """The arguments of an attention node by name, as a `kind` that has nodes in place of tensors.

    Raises:
        GraphInvariantError: an argument is missing, or is no node where the op takes a tensor.
    """
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    if len(node.args) != len(declared):
        raise GraphInvariantError(f"{describe(node)} has {len(node.args)} arguments; it must have {len(declared)}.")
    for argument, given in zip(declared, node.args, strict=True):
        takes = argument.type.kind()
        missing = takes == "TensorType" or (takes == "OptionalType" and given is not None)
        if missing and not isinstance(given, Node):
            raise GraphInvariantError(f"{argument.name} of {describe(node)} is {given!r}; it must be a node.")
    return kind.of(node.args)


def find_calls(graph: Graph, target: object) -> list[Node]:
    """The `call_function` nodes of `target`, in topological order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def require_count(graph: Graph, pass_name: str, target: object, found: Sequence[Node], expected: int) -> None:
    """Raises PassMatchError, with the nodes nearest to `target`, unless `expected` nodes were found."""
    if len(found) == expected:
        return
    raise PassMatchError(
        f"pass {pass_name!r} found {len(found)} nodes of {target}, and must find {expected}. Nearest nodes:\n"
        + "\n".join(f"  {describe(node)}" for node in nearest_nodes(graph, str(target)))
        + "\nA pass before it removed or changed them; set SPARSESPEC_DUMP to a folder and compare the graphs."
    )


def nearest_nodes(graph: Graph, wanted: str, count: int = 5) -> list[Node]:
    """The calls whose targets are most similar in name to `wanted`, the most similar first, one for each target."""
    first_call = {str(node.target): node for node in reversed(graph.nodes) if node.op == "call_function"}
    return [first_call[name] for name in difflib.get_close_matches(wanted, first_call, n=count, cutoff=0.0)]


def describe(node: Node) -> str:
    """One line on a node: name, target, shape, and the module of the model that it came from."""
    value = node.meta.get("val")
    shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = f", in {stack[-1][0]}" if stack else ""
    return f"{node.name} = {node.target}{shape}{module}"


def fake_mode(graph_module: GraphModule) -> FakeTensorMode:
    """The mode that owns the symbols in this graph's shapes."""
    return next(iter(graph_module.graph.find_nodes(op="placeholder"))).meta["val"].fake_mode


def shape_env(graph_module: GraphModule) -> ShapeEnv:
    """The environment of this graph's symbols."""
    environment = fake_mode(graph_module).shape_env
    if environment is None:
        raise GraphInvariantError("the graph's values have no symbolic shapes; it must come from `capture`.")
    return environment


@dataclass(frozen=True, eq=False)
class Derivation:
    """What a call's recorded value was computed from. It holds until the value, the call or an argument is another.

    Attributes:
        target: what was called.
        arguments: with the identity of its value for each node.
        values: the call's own, and those of the nodes, which are held so that no other takes their identity.
    """

    target: object
    arguments: str
    values: tuple[object, ...]

    @classmethod
    def of(cls, node: Node) -> Derivation:
        values = (node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes))
        return cls(node.target, cls._arguments_of(node), values)

    @staticmethod
    def _arguments_of(node: Node) -> str:
        return repr(map_arg((node.args, node.kwargs), lambda source: f"%{id(source.meta.get('val'))}"))

    def holds(self, node: Node) -> bool:
        return (
            node.target is self.target
            and node.meta.get("val") is self.values[0]
            and self._arguments_of(node) == self.arguments
        )


DERIVATION = "derivation"
"""In the `meta` of a call: the `Derivation` of its value. Copies of a node take it with them."""


def note_derivations(graph_module: GraphModule) -> None:
    """Notes that the value of each call is the one that follows from its arguments, as in a graph just traced."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.meta[DERIVATION] = Derivation.of(node)


def compute(node: Node, mode: FakeTensorMode) -> Any:
    """The value of a call, from those of its inputs."""
    target: Any = node.target
    arguments, keywords = map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with mode, python_dispatch(), torch.no_grad():
        return target(*arguments, **keywords)


def fill(graph_module: GraphModule) -> None:
    """Gives a value to each node that has none yet, from those of its inputs: to the nodes that a pass has added."""
    for node in graph_module.graph.nodes:
        if "val" in node.meta or node.op not in ("call_function", "get_attr"):
            continue
        if node.op == "get_attr":
            node.meta["val"] = fake_mode(graph_module).from_tensor(
                attribute(graph_module, str(node.target)), static_shapes=True
            )
            continue
        node.meta["val"] = compute(node, fake_mode(graph_module))
        node.meta[DERIVATION] = Derivation.of(node)


def attribute(graph_module: GraphModule, path: str) -> Tensor:
    """The parameter or buffer that a `get_attr` node of this target reads."""
    value: object = graph_module
    for name in path.split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise GraphInvariantError(f"{path} is a {type(value).__name__}; the graph may only read tensors.")
    return value
