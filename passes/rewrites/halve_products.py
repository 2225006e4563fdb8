"""Splits products that would leave a GPU half idle into two summands (split-K), which their readers add.

Before (such as o_proj or down_proj of a model that is 5,120 wide at most, in bfloat16 on a Hopper GPU):
    y: [1, T, N] = aten.linear(x, w [N, K])
After:
    p: [2, 1, T, N] = sparsespec.halved_product(x, w)
    y: [1, T, N] = aten.add(aten.select(p, 0, 0), aten.select(p, 0, 1))

Inductor fuses the addition with what reads the product: residual and norm. Why this is faster for few rows:
`kernels.products.library`. What cannot add for nothing, such as a slice that goes to attention, keeps its product, and
so does what has a bias.

Both summands are rounded to bfloat16 before they are added, as sums are that a library splits by its own choice
(`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`). In float16 a summand could overflow where the sum
does not, so that dtype keeps whole products; and in float32 computing, not memory, is waited for.

Requires: `meta["val"]` on all nodes.
Ensures: shapes and dtypes of all other nodes are unchanged, values up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from sparsespec_compile.kernels.ops import halved_product

from ..base import GraphPass, fill, find_calls, input_node

aten = torch.ops.aten

MOST_COLUMNS = 5120
"""Of a weight. Measured on an H200: halves take 0 to 25% less up to 160 rows; at 256 rows and 5,120 columns 5% less or
10% more. With more columns they gain little, or lose (benchmarks/LOG.md)."""

LEAST_ELEMENTS = 2**20
"""Of a weight; a smaller product waits for its launch alone."""

_READ_IN_PLACE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.pow.Tensor_Scalar,
    aten.type_as.default,
    aten.to.dtype,
}
"""What readers do that can add first: residuals, scalings and norms."""


class HalveProducts(GraphPass):
    """See the module's docstring."""

    name = "halve products"

    def rewrite(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        for linear in find_calls(graph, aten.linear.default):
            if _gains(linear):
                _halve(graph, linear)
                self.matches += 1
        if self.matches:
            fill(graph_module)


def _gains(linear: Node) -> bool:
    has_bias = len(linear.all_input_nodes) > 2
    weight = input_node(linear, 1)
    if has_bias or weight.op != "get_attr" or not suits(weight.meta["val"]):
        return False
    return all(user.target in _READ_IN_PLACE for user in linear.users)


def suits(weight: Tensor) -> bool:
    """Whether a product with this weight is faster in halves."""
    columns, inner = weight.shape
    return (
        measured_on(weight.device)
        and weight.dtype == torch.bfloat16
        and columns <= MOST_COLUMNS
        and weight.numel() >= LEAST_ELEMENTS
        and weight.is_contiguous()
        and inner % 16 == 0  # halves begin at addresses that copies of 16 bytes can read
    )


def measured_on(device: torch.device) -> bool:
    """Whether halves were measured on such a device: Hopper GPUs."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _halve(graph: Graph, linear: Node) -> None:
    with graph.inserting_before(linear):
        summands = graph.call_function(halved_product, tuple(linear.all_input_nodes))
        first, second = (graph.call_function(aten.select.int, (summands, 0, half)) for half in (0, 1))
        whole = graph.call_function(aten.add.Tensor, (first, second))
    for node in (summands, first, second, whole):
        node.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
    linear.replace_all_uses_with(whole)
    graph.erase_node(linear)
