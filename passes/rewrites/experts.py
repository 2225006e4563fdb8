"""Every site of experts becomes our op.

Before, for matrices that lie as [E, inputs, outputs] (transposed) or [E, outputs, inputs]:
    y: [T, H] = sparsespec.experts_site(x [T, H], choice [T, K], weight [T, K], up, down, up_bias, down_bias,
                                        activation, alpha, limit, shift, interleaved, transposed)
After:
    up': [E, U, H], down': [E, H, I] = aten.transpose(_, 1, 2) where they are transposed, which moves nothing
    y: [T, H] = sparsespec.experts(x, choice, weight, up', down', up_bias, down_bias, activation, ..., interleaved)

Shared experts beside it are linears as before. The node stays within a region: Inductor calls it between its own
kernels.

Requires: `meta["val"]` on all nodes; the sites' matrices are parameters.
Ensures: no site is left; values are the same.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Graph, GraphModule, Node

from sparsespec_compile.kernels.ops import ExpertsCall, experts, experts_site

from ..base import GraphPass, describe, fill, find_calls
from ..errors import GraphInvariantError

aten = torch.ops.aten


class ExpertsToKernel(GraphPass):
    """See the module's docstring."""

    name = "experts to kernel"

    def requires(self, graph_module: GraphModule) -> None:
        for site in find_calls(graph_module.graph, experts_site):
            call = ExpertsCall.of(site.args[:-1])
            for matrix in (call.up, call.down):
                if not isinstance(matrix, Node) or matrix.op != "get_attr":
                    raise GraphInvariantError(f"{describe(site)} reads {matrix} as a matrix; it must be a parameter.")

    def rewrite(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        sites = find_calls(graph, experts_site)
        self.notes += [f"{number} layers of {kind}" for kind, number in Counter(map(_kind, sites)).items()]
        for site in sites:
            with graph.inserting_before(site):
                site.replace_all_uses_with(_experts(graph, site))
            graph.erase_node(site)
            self.matches += 1
        if self.matches:
            fill(graph_module)


def _kind(site: Node) -> str:
    """What a report says of a layer."""
    call = ExpertsCall.of(site.args[:-1])
    choice, up, down = (one.meta["val"].shape for one in (call.choice, call.up, call.down))  # type: ignore[attr-defined]
    inner = down[1 if site.args[-1] else 2]
    return f"{up[0]} experts of {inner} hidden values, {choice[1]} of a row, {call.settings.activation}"


def _experts(graph: Graph, site: Node) -> Node:
    *arguments, transposed = site.args
    call = ExpertsCall.of(arguments)
    if transposed:
        up, down = (graph.call_function(aten.transpose.int, (one, 1, 2)) for one in (call.up, call.down))
        call = call._replace(up=up, down=down)  # type: ignore[arg-type]  # nodes stand for tensors
    node = graph.call_function(experts, call.arguments())
    for made in (node, *(one for one in (call.up, call.down) if transposed)):
        made.meta["nn_module_stack"] = site.meta.get("nn_module_stack", {})  # type: ignore[attr-defined]
    return node
