"""Checks a graph between passes.

`verify` is a walk over the nodes and always runs. `verify_shapes` computes every shape anew, seconds on a large model:
it runs on each distinct region of the final graph, and on the whole graph after each pass when the environment variable
SPARSESPEC_VERIFY is set, as in tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparsespec_compile.kernels.ops import (
    STEP_TENSORS,
    AttentionCall,
    AttentionSettings,
    SiteCall,
    attention_site,
    dual_mode_attention,
)

from ..base import INPUTS, STATE_INPUTS, call_of, describe, find_calls, input_node, propagate
from ..errors import GraphInvariantError
from ..layout import KVLayout

VERIFY_VARIABLE = "SPARSESPEC_VERIFY"

SITE_STAGE = INPUTS
DUAL_STAGE = (*INPUTS, *STATE_INPUTS, *STEP_TENSORS)


def verify(graph_module: GraphModule, layout: KVLayout) -> None:
    """Checks what must hold of a graph after any pass.

    - the placeholders are those of a captured or of a rewritten graph, in order;
    - one attention node for each layer, in order, with that layer's settings: sites before the rewrite, dual-mode
      nodes after it, never both;
    - each dual-mode node works on its own layer's part of pool, scores and pillars, and on its group's page table;
    - nothing else writes into an input or a parameter.

    Raises:
        GraphInvariantError: naming the first node that breaks a rule.
    """
    graph_module.graph.lint()
    names = tuple(node.target for node in graph_module.graph.find_nodes(op="placeholder"))
    if names == SITE_STAGE:
        _check_sites(graph_module, layout)
    elif names == DUAL_STAGE:
        _check_dual_nodes(graph_module, layout)
    else:
        raise GraphInvariantError(f"inputs are {names}; allowed are {SITE_STAGE} and {DUAL_STAGE}.")
    _check_writes(graph_module)


def _check_sites(graph_module: GraphModule, layout: KVLayout) -> None:
    _refuse_any(graph_module, dual_mode_attention, "before the attention rewrite")
    sites = find_calls(graph_module.graph, attention_site)
    _check_settings(
        sites, layout, [(*call.settings, call.layer) for call in (call_of(SiteCall, node) for node in sites)]
    )


def _check_dual_nodes(graph_module: GraphModule, layout: KVLayout) -> None:
    _refuse_any(graph_module, attention_site, "after the attention rewrite")
    nodes = find_calls(graph_module.graph, dual_mode_attention)
    calls = [call_of(AttentionCall, node) for node in nodes]
    _check_settings(nodes, layout, [(*call.settings, number) for number, call in enumerate(calls)])
    for number, (node, call) in enumerate(zip(nodes, calls, strict=True)):
        start, head = layout.page_offset(number), layout.head_offset(number)
        heads = (head, head + layout.layers[number].kv_heads)
        _check_view(node, input_node(call.kv, 0), "kv_pool", (start, start + layout.page_elements(number)))
        _check_view(node, call.scores, "scores", heads)
        _check_view(node, call.pillar_index, "pillar_index", heads)
        _check_step(node, call.step, layout.group_of(number))


def _check_step(node: Node, step: Any, group: int) -> None:
    """Each step tensor is the input of its name, the page table that of the layer's group."""
    for name, tensor in step._asdict().items():
        given, expected = tensor, name
        if name == "page_table":
            expected = f"{name}[{group}]"
            if given.target is torch.ops.aten.select.int and given.args[1:] == (0, group):
                given, expected = input_node(given, 0), name
        if given.op != "placeholder" or given.target != expected:
            raise GraphInvariantError(f"{describe(node)} must take {expected}, not {given.format_node()}.")


def _refuse_any(graph_module: GraphModule, target: object, when: str) -> None:
    for node in find_calls(graph_module.graph, target):
        raise GraphInvariantError(f"{describe(node)} must not be in a graph {when}.")


def _check_settings(nodes: list[Node], layout: KVLayout, found: list[tuple]) -> None:
    expected = [(*AttentionSettings.of(layer), layer.layer) for layer in layout.layers]
    if len(found) != len(expected):
        raise GraphInvariantError(f"the graph has {len(found)} attention nodes, the layout {len(expected)} layers.")
    for node, got, wanted in zip(nodes, found, expected, strict=True):
        if got != wanted:
            names = ", ".join((*AttentionSettings._fields, "layer"))
            raise GraphInvariantError(f"{describe(node)} has ({names}) {got}, not {wanted}.")


def _check_view(node: Node, view: Node, source: str, bounds: tuple[int, int]) -> None:
    expected = f"{source}[:, {bounds[0]}:{bounds[1]}]"
    if view.target is not torch.ops.aten.slice.Tensor or view.args[1:] != (1, *bounds):
        raise GraphInvariantError(f"{describe(node)} must work on {expected}, not on {view.format_node()}.")
    if input_node(view, 0).target != source:
        raise GraphInvariantError(f"{describe(node)} must work on {expected}, not on {view.format_node()}.")


def _check_writes(graph_module: GraphModule) -> None:
    node = lasting_write(graph_module)
    if node is not None:
        raise GraphInvariantError(f"{describe(node)} writes into an input, a parameter or a buffer of the graph.")


def lasting_write(graph_module: GraphModule) -> Node | None:
    """The first node, dual-mode nodes apart, that writes into what outlives a call: an input, parameter or buffer."""
    lasting = {node for node in graph_module.graph.nodes if node.op in ("placeholder", "get_attr")}
    for node in graph_module.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        schema = node.target._schema
        aliased = [
            declared.alias_info
            for declared, value in zip(schema.arguments, node.args, strict=False)
            if declared.alias_info is not None and isinstance(value, Node) and value in lasting
        ]
        if any(alias.is_write for alias in aliased) and node.target is not dual_mode_attention:
            return node
        if aliased and not schema.is_mutable:
            lasting.add(node)
    return None


def verify_shapes(graph_module: GraphModule) -> None:
    """Checks that the shapes and dtypes recorded on the nodes are those that the graph computes, and renews them.

    Raises:
        GraphInvariantError: naming the first node whose record differs, or that does not run.
    """
    recorded = {node: node.meta.get("val") for node in graph_module.graph.nodes}
    propagate(graph_module)
    for node, before in recorded.items():
        after = node.meta.get("val")
        if isinstance(before, Tensor) and not _same_shape(before, after):
            raise GraphInvariantError(f"{describe(node)} was recorded as {tuple(before.shape)} {before.dtype}.")


def _same_shape(before: Tensor, after: object) -> bool:
    return (
        isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.dim() == after.dim()
        and all(statically_known_true(a == b) for a, b in zip(before.shape, after.shape, strict=True))
    )
