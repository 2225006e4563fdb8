"""The form of the final graph that drafts run: its products read 8-bit copies of their weights.

Before (a linear, or what `halve_products` made of one):
    y: [1, T, N] = aten.linear(x, w [N, K], bias [N])
    y: [1, T, N] = aten.add(aten.select(p, 0, 0), aten.select(p, 0, 1)), p = sparsespec.halved_product(x, w [N, K])
After:
    y: [1, T, N] = sparsespec.quantised_product(x, c: int8[N, K], s: f32[N])    (c and s: `draft_weight_3`, ...)
    y: [1, T, N] = aten.add(.., bias [N]), where there is one
After, with fp8 copies whose sizes are multiples of 16:
    r: f32[1, T, 1] = largest magnitude of each row of x, over that of fp8
    p: [1, T, N] = sparsespec.fp8_product((x / r) as fp8, c: fp8[N, K])
    y: [1, T, N] = p * s * r in x's dtype

With fp8 the rows are rounded to 8 bits as well: matrix instructions for 8 bits need nothing widened, which products
of more than a few rows are bound by (benchmarks/LOG.md). Inductor fuses the rounding with what computes x, such as a
norm, and the scales with what reads y.

The copies are buffers of this graph alone, one for each weight, whoever reads it. They are made without memory: whoever
runs the graph gives them some, and fills them from the weights. Embeddings go on reading the weight itself, also where
an output layer shares it. Experts read their own weights, too, and of these those alone that their rows choose. A
weight that is too small to gain or in another dtype than 16 or 32 bits of floating point stays as it is; the notes say
which.

Where ranks share the model, each copies its own part, by scales of its own, and rounds its own part of x. What it gives
is a piece or a summand as before, and sums over ranks stay where they are.

Requires: the final graph, in a module of its own, with `meta["val"]` on all nodes.
Ensures: shapes and dtypes of all other nodes are unchanged; every quantised product reads a copy and its own scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from sparsespec_compile.kernels.ops import LARGEST, experts, fp8_product, halved_product, quantised_product

from ..base import COPY, SCALE, GraphPass, PassContext, attribute, fill, find_calls, input_node

aten = torch.ops.aten

LEAST_ELEMENTS = 2**20
"""Of a weight on a GPU; a smaller product waits for its launch alone. On a CPU nothing is faster in 8 bits: there it is
for tests, and takes every weight."""

_SMALLEST_ROW = 1e-30
"""Magnitude that a row is taken to have at least: rows of zeros stay zeros."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class WeightCopy(NamedTuple):
    """An 8-bit copy.

    Attributes:
        source: [N, K] float, the weight.
        weight: [N, K] int8 or float8_e4m3fn, contiguous; its storage has no memory when the pass is through.
        scale: float32 [N], of each row; likewise.
        paired: whether the copy lies in pairs, as `quantised_product` takes it, or as the weight does.
    """

    source: Tensor
    weight: Tensor
    scale: Tensor
    paired: bool


class DraftWeights(GraphPass):
    """See the module's docstring.

    Args:
        context: as for every pass.
        dtype: of the copies.

    Attributes:
        copies: those that were made.
    """

    name = "8-bit draft weights"

    def __init__(self, context: PassContext, dtype: torch.dtype) -> None:
        super().__init__(context)
        self.dtype = dtype
        self.copies: list[WeightCopy] = []
        self._numbers: dict[int, int] = {}  # of the copy, by the identity of its weight

    def rewrite(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        for product in (*find_calls(graph, aten.linear.default), *find_calls(graph, halved_product)):
            weight = input_node(product, 1)
            reason = why_exact(weight)
            if reason is None:
                whole = product if product.target is aten.linear.default else _sum_of(product)
                _replace(graph, product, whole, self._buffers(graph_module, weight), self.dtype)
                self.matches += 1
            else:
                self.notes.append(f"left {str(weight.target).removeprefix('model.')}: {reason}")
        mixtures = len(find_calls(graph, experts))
        if mixtures:
            self.notes.append(f"left the experts of {mixtures} layers: a step reads those alone that its rows choose")
        graph.eliminate_dead_code()
        fill(graph_module)

    def _buffers(self, graph_module: GraphModule, weight: Node) -> tuple[str, str]:
        """Names of the copy of a weight and of its scales, which are made when they are first asked for."""
        source = attribute(graph_module, str(weight.target))
        number = self._numbers.setdefault(id(source), len(self.copies))
        names = f"{COPY}{number}", f"{SCALE}{number}"
        if number == len(self.copies):
            values = _without_memory(source, self.dtype), _without_memory(source[:, 0], torch.float32)
            for name, value in zip(names, values, strict=True):
                graph_module.register_buffer(name, value)
            parallel = self.context.parallel
            if parallel is not None and str(weight.target) in parallel.weights:
                parallel.weights[names[0]] = parallel.weights[str(weight.target)]
            self.copies.append(WeightCopy(source.detach(), *values, paired=not in_fp8(weight, self.dtype)))
        return names


def why_exact(weight: Node) -> str | None:
    """Why a product reads this weight itself; None where it reads a copy."""
    value = weight.meta["val"]
    if weight.op != "get_attr":
        return "it is computed"
    if value.dtype not in _FLOATS:
        return f"it is in {value.dtype}"
    if not value.is_contiguous():
        return "it is not contiguous"
    if value.shape[1] % 2:
        return "it has an odd number of inputs, and 8-bit weights lie in pairs"
    if value.device.type != "cpu" and value.numel() < LEAST_ELEMENTS:
        return f"it has fewer than {LEAST_ELEMENTS:,} elements"
    return None


def _without_memory(like: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(like.shape, dtype=dtype, device=like.device)
    tensor.untyped_storage().resize_(0)
    return tensor


def _sum_of(halves: Node) -> Node:
    """The sum of the two summands of a halved product."""
    (whole,) = {user for half in halves.users for user in half.users}
    return whole


def _replace(graph: Graph, product: Node, whole: Node, names: tuple[str, str], dtype: torch.dtype) -> None:
    source, weight, *bias = product.all_input_nodes
    made: list[Node] = []

    def call(target: OpOverload, *arguments: Any) -> Node:
        made.append(graph.call_function(target, arguments))
        return made[-1]

    with graph.inserting_before(whole):
        copy, scale = map(graph.get_attr, names)
        narrow = in_fp8(weight, dtype)
        y = _in_fp8(call, source, copy, scale) if narrow else call(quantised_product, source, copy, scale)
        for value in bias:
            y = call(aten.add.Tensor, y, value)
    for node in made:
        node.meta["nn_module_stack"] = product.meta.get("nn_module_stack", {})
    whole.replace_all_uses_with(y)
    graph.erase_node(whole)


def in_fp8(weight: Node, dtype: torch.dtype) -> bool:
    """Whether rows are rounded to 8 bits as well, for a product with a copy of this dtype."""
    return dtype == torch.float8_e4m3fn and all(size % 16 == 0 for size in weight.meta["val"].shape)


def _in_fp8(call: Callable[..., Node], x: Node, copy: Node, scale: Node) -> Node:
    """The nodes of a product of 8-bit rows; see the module's docstring."""
    largest = LARGEST[torch.float8_e4m3fn]
    wide = call(aten.to.dtype, x, torch.float32)
    magnitude = call(aten.amax.default, call(aten.abs.default, wide), [-1], True)
    unit = call(aten.div.Tensor, call(aten.clamp_min.default, magnitude, _SMALLEST_ROW), largest)
    narrow = call(aten.to.dtype, call(aten.div.Tensor, wide, unit), torch.float8_e4m3fn)
    product = call(fp8_product, narrow, copy)
    scaled = call(aten.mul.Tensor, call(aten.mul.Tensor, product, scale), unit)
    return call(aten.to.dtype, scaled, x.meta["val"].dtype)
