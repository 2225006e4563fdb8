"""Checks a graph between passes.

`verify` is a walk over the nodes and always runs. `verify_shapes` computes anew whatever passes may have given another
shape. It runs on each distinct region of the final graph, and on the whole graph after each pass when the environment
variable SPARSESPEC_VERIFY is set, as in a test of each family.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparsespec_compile.kernels.ops import (
    STEP_TENSORS,
    AttentionCall,
    AttentionSettings,
    SiteCall,
    attention_site,
    dual_mode_attention,
    experts_site,
    fp8_product,
    quantised_product,
)

from ..base import (
    COPY,
    DERIVATION,
    INPUTS,
    SCALE,
    STATE_INPUTS,
    Derivation,
    attribute,
    call_of,
    compute,
    describe,
    fake_mode,
    find_calls,
    input_node,
)
from ..compat import FakeTensorMode
from ..errors import GraphInvariantError
from ..layout import KVLayout

VERIFY_VARIABLE = "SPARSESPEC_VERIFY"

SITE_STAGE = INPUTS
DUAL_STAGE = (*INPUTS, *STATE_INPUTS, *STEP_TENSORS)


def verify(graph_module: GraphModule, layout: KVLayout, *, drafts: bool = False) -> None:
    """Checks what must hold of a graph after any pass.

    - the placeholders are those of a captured or of a rewritten graph, in order;
    - one attention node for each layer, in order, with that layer's settings: sites before the rewrite, dual-mode
      nodes after it, never both;
    - each dual-mode node works on its own layer's part of pool, scores and pillars, and on its group's page table;
    - no site of experts is left beside dual-mode nodes;
    - nothing else writes into an input or a parameter;
    - only the form for drafts (`drafts`) reads 8-bit copies of weights, each with its own scales, and what is in 8 bits
      stays within its product.

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
    _check_copies(graph_module, drafts)


def _check_sites(graph_module: GraphModule, layout: KVLayout) -> None:
    _refuse_any(graph_module, dual_mode_attention, "before the attention rewrite")
    sites = find_calls(graph_module.graph, attention_site)
    _check_settings(
        sites, layout, [(*call.settings, call.layer) for call in (call_of(SiteCall, node) for node in sites)]
    )


def _check_dual_nodes(graph_module: GraphModule, layout: KVLayout) -> None:
    for site in (attention_site, experts_site):
        _refuse_any(graph_module, site, "after the attention rewrite")
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


def _check_copies(graph_module: GraphModule, drafts: bool) -> None:
    products = copy_products(graph_module.graph)
    if products and not drafts:
        raise GraphInvariantError(f"{describe(products[0].product)} must not be in a graph that verifies.")
    for one in products:
        weight, scale = str(one.copy.target), str(one.scale.target)
        if weight.removeprefix(COPY) != scale.removeprefix(SCALE) or not weight.startswith(COPY):
            raise GraphInvariantError(
                f"{describe(one.product)} reads {weight} and {scale}, which do not belong together."
            )
    for one in products:
        for node in one.within:
            for user in node.users:
                if user not in (*one.within, one.result):
                    raise GraphInvariantError(f"{describe(user)} reads {node.name}, a part of {describe(one.product)}.")


class CopyProduct(NamedTuple):
    """What stands for a product of x and a weight in the form for drafts (`rewrites/draft_weights.py`).

    Attributes:
        result: gives the product.
        product: the call of the op; with 8-bit weights alone the result itself.
        x, copy, scale: what is multiplied, the copy of the weight, and the scales of its rows.
        within: scales and what lies between, which nothing else may read.
    """

    result: Node
    product: Node
    x: Node
    copy: Node
    scale: Node
    within: tuple[Node, ...]


def copy_products(graph: Graph) -> list[CopyProduct]:
    """All of a graph.

    Raises:
        GraphInvariantError: one of 8-bit rows is not scaled by what its rows were rounded by.
    """
    narrow = [_of_8_bit_rows(node) for node in find_calls(graph, fp8_product)]
    for node in find_calls(graph, quantised_product):
        x, copy, scale = (input_node(node, place) for place in range(3))
        narrow.append(CopyProduct(node, node, x, copy, scale, (scale,)))
    return narrow


def _of_8_bit_rows(product: Node) -> CopyProduct:
    aten, rows = torch.ops.aten, input_node(product, 0)
    divided = _read(product, rows, aten.to.dtype, 0)
    wide, unit = (_read(product, divided, aten.div.Tensor, place) for place in range(2))
    x = _read(product, wide, aten.to.dtype, 0)
    bounded = _read(product, unit, aten.div.Tensor, 0)
    largest = _read(product, bounded, aten.clamp_min.default, 0)
    magnitudes = _read(product, largest, aten.amax.default, 0)
    scaled = _reader(product, product)
    scale = _read(product, scaled, aten.mul.Tensor, 1)
    whole = _reader(product, scaled)
    if _read(product, magnitudes, aten.abs.default, 0) is not wide:
        raise _unlike(product, magnitudes)
    if _read(product, whole, aten.mul.Tensor, 1) is not unit:
        raise _unlike(product, whole)
    result = _reader(product, whole)
    _read(product, result, aten.to.dtype, 0)
    within = (wide, magnitudes, largest, bounded, unit, divided, rows, product, scale, scaled, whole)
    return CopyProduct(result, product, x, input_node(product, 1), scale, within)


def _read(product: Node, node: Node, target: OpOverload, place: int) -> Node:
    """What a node of a product of 8-bit rows reads, which must be a call of `target`."""
    if node.target is not target:
        raise _unlike(product, node)
    return input_node(node, place)


def _reader(product: Node, node: Node) -> Node:
    if len(node.users) != 1:
        raise _unlike(product, node)
    return next(iter(node.users))


def _unlike(product: Node, node: Node) -> GraphInvariantError:
    return GraphInvariantError(
        f"{describe(node)} does not belong to {describe(product)}: rows are divided by their largest magnitude over "
        "that of 8 bits, and products multiplied by the weight's scales and by the same."
    )


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
    """Checks that the shapes and dtypes recorded on the nodes are those that the graph computes.

    A call is computed anew unless its record was derived from the very arguments that it has: so mostly what passes
    have changed. A value of other strides, or on another device, takes the record's place.

    Raises:
        GraphInvariantError: naming the first node whose record differs, or that does not run.
    """
    mode = fake_mode(graph_module)
    for node in graph_module.graph.nodes:
        before = node.meta.get("val")
        if node.op == "get_attr":
            value: Any = attribute(graph_module, str(node.target))
        elif node.op != "call_function" or (DERIVATION in node.meta and node.meta[DERIVATION].holds(node)):
            continue
        else:
            value = _computed(node, mode)
        if isinstance(before, Tensor) and not _same_shape(before, value):
            raise GraphInvariantError(f"{describe(node)} was recorded as {tuple(before.shape)} {before.dtype}.")
        if node.op == "get_attr":
            continue
        if not isinstance(before, Tensor) or not _same_place(before, value):
            node.meta["val"] = value
        node.meta[DERIVATION] = Derivation.of(node)


def _computed(node: Node, mode: FakeTensorMode) -> Any:
    try:
        return compute(node, mode)
    except Exception as error:  # from any op's shape function: they raise what they like
        raise GraphInvariantError(
            f"{node} does not run on the shapes that reach it: {error}. A pass has left the graph broken."
        ) from error


def _same_shape(before: Tensor, after: object) -> bool:
    return (
        isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.dim() == after.dim()
        and all(statically_known_true(a == b) for a, b in zip(before.shape, after.shape, strict=True))
    )


def _same_place(before: Tensor, after: Tensor) -> bool:
    strides = zip(before.stride(), after.stride(), strict=True)
    return before.device == after.device and all(statically_known_true(a == b) for a, b in strides)
