"""Shapes for nodes that passes add: fake inputs with symbolic sizes, and propagation through the graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from .errors import GraphInvariantError


def symbolic_input(
    mode: FakeTensorMode, name: str, sizes: tuple[int, ...], symbolic: tuple[bool, ...], dtype: torch.dtype, device: str
) -> FakeTensor:
    """A fake tensor for a new graph input: dimension i has the fixed size `sizes[i]`, or a symbol with that hint."""
    kinds = [DimDynamic.DYNAMIC if free else DimDynamic.STATIC for free in symbolic]
    example = torch.empty(sizes, dtype=dtype, device=device)
    return mode.from_tensor(
        example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds), source=ConstantSource(name)
    )


def fake_mode(graph_module: GraphModule) -> FakeTensorMode:
    """The mode whose symbols the shapes of this graph are written in."""
    return next(iter(graph_module.graph.find_nodes(op="placeholder"))).meta["val"].fake_mode


def shape_env(graph_module: GraphModule) -> ShapeEnv:
    """What is known of this graph's symbols."""
    environment = fake_mode(graph_module).shape_env
    if environment is None:
        raise GraphInvariantError("the graph's values have no symbolic shapes; it must come from `capture`.")
    return environment


def fill(graph_module: GraphModule) -> None:
    """Gives a value to each node that has none yet, from those of its inputs. What a pass has added is few nodes."""
    for node in graph_module.graph.nodes:
        if "val" in node.meta or node.op not in ("call_function", "get_attr"):
            continue
        if node.op == "get_attr":
            node.meta["val"] = fake_mode(graph_module).from_tensor(
                attribute(graph_module, str(node.target)), static_shapes=True
            )
            continue
        arguments, keywords = map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        with fake_mode(graph_module), enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*arguments, **keywords)


def attribute(graph_module: GraphModule, path: str) -> Tensor:
    """The parameter or buffer that a `get_attr` node of this target reads."""
    value: object = graph_module
    for name in path.split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise GraphInvariantError(f"{path} is a {type(value).__name__}; the graph may only read tensors.")
    return value


def propagate(graph_module: GraphModule) -> None:
    """Works out every node's value anew from those of the placeholders, into `meta["val"]`.

    Raises:
        GraphInvariantError: a node does not run on the shapes that reach it.
    """
    inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    tracker = _Propagation(graph_module, fake_mode(graph_module))
    try:
        with enable_python_dispatcher(), torch.no_grad():
            tracker.propagate_dont_convert_inputs(*inputs)
    except Exception as error:  # from any op's shape function: they raise what they like
        raise GraphInvariantError(
            f"{tracker.current} does not run on the shapes that reach it: {error}. A pass has left the graph broken."
        ) from error


class _Propagation(FakeTensorProp):
    """Remembers which node is running, so that an error can name it."""

    current: Node | None = None

    def run_node(self, n: Node) -> Tensor:
        self.current = n
        return super().run_node(n)
