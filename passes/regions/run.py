"""How the final graph runs: each distinct region of it compiled, or op by op.

**Compiled**: once, before the first call and for all sizes. Inductor is given the regions themselves, without Dynamo:
the symbolic sizes of their inputs are those of the graph, so no size is taken for another that happens to equal it, no
size of 1 becomes a constant, and nothing is recompiled. What Inductor assumed about sizes (that a buffer can be indexed
with 32 bits, that rows can be sorted with 16) is checked in each call. A step of other sizes runs uncompiled, with a
warning.

**Op by op**: with as little Python work for each op as possible. Parameters lie side by side, where they would be
looked up along their paths through the model's modules. An op for which torch has a function with the same arguments,
in the same order, is called by that, where `torch.ops` would parse arguments by the op's schema. The same kernels
run.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import sympy
import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional

from sparsespec_compile.kernels import ops

from ..base import attribute, shape_env
from ..compat import compile_graph, conditions
from ..errors import UncompiledStepWarning
from .split import SplitGraph

Region = Callable[..., Sequence[Tensor]]
"""Tensors in, tensors out, as the region's graph has them."""

RegionCompiler = Callable[[GraphModule, list[Tensor]], Region]
"""Takes a region's graph, which it may change, and fake tensors for its inputs."""

OnCompiled = Callable[[int, int], object]
"""Called with the number of regions that are compiled, and the number of all."""


def inductor(region: GraphModule, inputs: list[Tensor]) -> Region:
    """Compiles with TorchInductor, or takes from its cache on disk what another process has compiled."""
    # Inductor's cache does not look into the fake implementations of our ops, so they are made part of its key.
    return compile_graph(region, inputs, tag=hashlib.sha256(Path(ops.__file__).read_bytes()).hexdigest())


def compile_regions(
    splits: Sequence[SplitGraph], compiler: RegionCompiler = inductor, on_compiled: OnCompiled | None = None
) -> list[CompiledForward]:
    """Compiles each distinct region of graphs that share their symbols; the results compile nothing later."""
    environment = shape_env(splits[0].graph_module)
    known = len(conditions(environment))
    total = sum(len(split.distinct) for split in splits)
    compiled: list[dict[str, Region]] = [{} for _ in splits]
    seconds: list[dict[str, float]] = [{} for _ in splits]
    with torch.inference_mode(False), torch.no_grad():
        for split, regions, times in zip(splits, compiled, seconds, strict=True):
            for name in split.distinct:
                started = time.perf_counter()
                regions[name] = _compile(split.region(name), compiler)
                times[name] = time.perf_counter() - started
                if on_compiled is not None:
                    on_compiled(sum(map(len, compiled)), total)
    # A condition on a shared symbol is recorded with one graph only, so each graph needs the conditions of all.
    found = conditions(environment, known)
    return [
        CompiledForward(split.graph_module, regions, StepSizes(split.graph_module, found), times)
        for split, regions, times in zip(splits, compiled, seconds, strict=True)
    ]


class CompiledForward:
    """The forward pass on compiled regions: called as the flat graph is.

    Attributes:
        graph_module: calls the compiled regions, each with its layer's own parameters.
        uncompiled: the same computation node by node.
        sizes: the conditions on the sizes of a call under which the compiled regions are right.
        seconds: what each distinct region took to compile.
        drafts: the form that drafts run, compiled likewise; None where it is this one.
    """

    drafts: CompiledForward | None = None

    def __init__(
        self, outer: GraphModule, compiled: dict[str, Region], sizes: StepSizes, seconds: dict[str, float]
    ) -> None:
        self.graph_module = GraphModule(outer, outer.graph)
        self.uncompiled = outer
        self.sizes = sizes
        self.seconds = seconds
        for name, region in compiled.items():
            setattr(self.graph_module, name, _Call(region))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits `[1, R, V]`; `inputs` are those of the flat graph."""
        broken = self.sizes.broken(inputs)
        if broken is None:
            return self.graph_module(*inputs)
        warnings.warn(
            f"a step runs uncompiled: the compiled code is right only if {broken}. Choose another number of "
            "requests or of rows in a step to avoid that.",
            UncompiledStepWarning,
            stacklevel=2,
        )
        return self.uncompiled(*inputs)


class _Call(nn.Module):
    """A compiled region as a module that a graph can call."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.region(*inputs)


def _compile(region: GraphModule, compiler: RegionCompiler) -> Region:
    """Compiles a copy: compilers change the graph that they are given, and this one can also be run and dumped."""
    graph = Graph()
    graph.output(graph.graph_copy(region.graph, {}))
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    return compiler(GraphModule(nn.Module(), graph), inputs)


REMEMBERED = 1024
"""Combinations of sizes whose outcome is kept; a runtime uses few, and evaluating a condition takes 0.1 ms."""


class StepSizes:
    """Conditions on the sizes of a graph's inputs under which its compiled code is right.

    Args:
        graph_module: its placeholders carry the symbols, in `meta["val"]`.
        conditions: relations between those symbols, such as `24576 * s70 <= 2147483647`.
    """

    def __init__(self, graph_module: GraphModule, conditions: Iterable[sympy.Basic]) -> None:
        self.conditions = tuple(dict.fromkeys(conditions))
        self.places = _places(graph_module)
        self._broken = lru_cache(REMEMBERED)(self._first_broken)

    def broken(self, inputs: Sequence[Tensor]) -> str | None:
        """The first condition that does not hold for `inputs`, values for the placeholders; None when all do."""
        if not self.conditions:
            return None
        sizes = tuple(inputs[place].shape[dimension] for _, _, place, dimension in self.places)
        condition = self._broken(sizes)
        if condition is None:
            return None
        symbols = {
            str(symbol): f"{symbol} = {size} is dimension {dimension} of {name}"
            for (symbol, name, _, dimension), size in zip(self.places, sizes, strict=True)
            if symbol in condition.free_symbols
        }
        return f"{condition}, where {', '.join(symbols[name] for name in sorted(symbols))}"

    def _first_broken(self, sizes: tuple[int, ...]) -> sympy.Basic | None:
        values = {symbol: size for (symbol, *_), size in zip(self.places, sizes, strict=True)}
        return next((condition for condition in self.conditions if condition.xreplace(values) != sympy.true), None)


def _places(graph_module: GraphModule) -> list[tuple[sympy.Symbol, str, int, int]]:
    """Each symbol, with the name and number of the first placeholder that has it, and the dimension."""
    found: dict[sympy.Symbol, tuple[sympy.Symbol, str, int, int]] = {}
    for number, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        for dimension, size in enumerate(node.meta["val"].shape):
            if isinstance(size, SymInt) and isinstance(size.node.expr, sympy.Symbol):
                found.setdefault(size.node.expr, (size.node.expr, str(node.target), number, dimension))
    return list(found.values())


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
