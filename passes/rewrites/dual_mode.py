"""Every attention site becomes a dual-mode node on its layer's view of the KV pool.

Before, for layer i:
    out: [1, T, Hq, Dv] = sparsespec.attention_site(q [1, Hq, T, Dk], k [1, Hkv, T, Dk], v [1, Hkv, T, Dv],
                                                    scale, window, softcap, chunked, i, sinks [Hq] or None)
After, with o = layout.page_offset(i), n = layout.page_elements(i), h = layout.head_offset(i), g = layout.group_of(i):
    q', k', v': [T, H, D] = aten.transpose(aten.select(_, 0, 0), 0, 1)
    kv: [pages, Hkv, page_size, Dk + Dv] = aten.view(aten.slice(kv_pool, 1, o, o + n), ...)
    s: f32[C, Hkv, S] = aten.slice(scores, 1, h, h + Hkv)
    p: i32[B, Hkv, M] = aten.slice(pillar_index, 1, h, h + Hkv)
    t: i32[B, P] = aten.select(page_table, 0, g), the step tensor page_table of this node; one for each group
    rows: [T, Hq, Dv] = sparsespec.dual_mode_attention(q', k', v', kv, s, *step tensors, p, scale, window, softcap,
                                                       chunked, sinks)
    out: [1, T, Hq, Dv] = aten.unsqueeze(rows, 0)

Requires: placeholders input_ids, position_ids, logits_to_keep; one site for each layer of the layout, in its order.
Ensures: no site is left; after those three, the inputs are kv_pool [pages, elements_per_page], scores [C, H, S] f32,
pillar_index [B, H, M] i32 and the step tensors (i32, `[B]`, and page_table `[groups, B, P]`, one for each group of
layers); B, C, pages, S, M, P symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from sparsespec_compile.kernels.ops import (
    STEP_TENSORS,
    AttentionCall,
    AttentionSettings,
    SiteCall,
    StepTensors,
    attention_site,
    dual_mode_attention,
)

from ..base import STATE_INPUTS, GraphPass, call_of, fake_mode, fill, find_calls, require_count
from ..compat import symbolic_input
from ..errors import GraphInvariantError, UnsupportedAttentionError
from ..layout import AttentionLayer

aten = torch.ops.aten

HINTS = {"pages": 11, "requests": 13, "scored": 17, "pillars": 19, "request_pages": 23, "slots": 29}
"""Example sizes of the new symbols, all different so that no two are taken for one."""


@dataclass(frozen=True)
class _Inputs:
    """The new placeholders."""

    kv_pool: Node
    scores: Node
    pillar_index: Node
    step: dict[str, Node]
    page_tables: tuple[Node, ...]


class AttentionToDualMode(GraphPass):
    """See the module's docstring."""

    name = "attention to dual mode"

    def requires(self, graph_module: GraphModule) -> None:
        sites = find_calls(graph_module.graph, attention_site)
        layers = self.context.layout.layers
        require_count(graph_module.graph, self.name, attention_site, sites, len(layers))
        numbers = [call_of(SiteCall, site).layer for site in sites]
        if numbers != [layer.layer for layer in layers]:
            raise GraphInvariantError(f"the graph's attention sites are numbered {numbers}, not in the layout's order.")

    def rewrite(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        sites = find_calls(graph, attention_site)
        inputs = self._add_inputs(graph_module, sites[0])
        for site, layer in zip(sites, self.context.layout.layers, strict=True):
            self._check_dtype(site, layer)
            with graph.inserting_before(site):
                site.replace_all_uses_with(self._dual_mode_node(graph, site, layer, inputs))
            graph.erase_node(site)
            self.context.report.attention[layer.layer].outcome = "rewritten"
        self.matches = len(sites)
        fill(graph_module)

    def _add_inputs(self, graph_module: GraphModule, first_site: Node) -> _Inputs:
        mode = fake_mode(graph_module)
        first = call_of(SiteCall, first_site)
        key = first.k.meta["val"]
        device = str(key.device)
        layout = self.context.layout
        b, heads = HINTS["requests"], layout.total_kv_heads
        shapes: dict[str, tuple[tuple[int, ...], tuple[bool, ...], torch.dtype]] = {
            "kv_pool": ((HINTS["pages"], layout.elements_per_page), (True, False), key.dtype),
            "scores": ((HINTS["slots"], heads, HINTS["scored"]), (True, False, True), torch.float32),
            "pillar_index": ((b, heads, HINTS["pillars"]), (True, False, True), torch.int32),
        }
        for name in STEP_TENSORS:
            shapes[name] = ((b,), (True,), torch.int32)
        size = (len(layout.groups), b, HINTS["request_pages"])
        shapes["page_table"] = (size, (False, True, True), torch.int32)
        added = {}
        graph = graph_module.graph
        *_, last = graph.find_nodes(op="placeholder")
        for name, (sizes, symbolic, dtype) in shapes.items():
            with graph.inserting_after(last):
                last = added[name] = graph.placeholder(name)
            last.meta["val"] = symbolic_input(mode, name, sizes, symbolic, dtype, device)
        with graph.inserting_after(last):
            tables = [
                graph.call_function(aten.select.int, (added["page_table"], 0, group))
                for group in range(len(layout.groups))
            ]
        kv_pool, scores, pillar_index = (added[name] for name in STATE_INPUTS)
        return _Inputs(kv_pool, scores, pillar_index, {name: added[name] for name in STEP_TENSORS}, tuple(tables))

    def _check_dtype(self, site: Node, layer: AttentionLayer) -> None:
        asked = call_of(SiteCall, site)
        dtypes = {tensor.meta["val"].dtype for tensor in (asked.q, asked.k, asked.v)}
        if dtypes != {self.context.model.dtype}:
            module = self.context.report.attention[layer.layer].module
            raise UnsupportedAttentionError(
                f"{module} attends in {sorted(map(str, dtypes))}, the model is in {self.context.model.dtype}. Allowed: "
                "queries, keys and values in the model's dtype. Load the model in one dtype, such as torch.float32."
            )

    def _dual_mode_node(self, graph: Graph, site: Node, layer: AttentionLayer, inputs: _Inputs) -> Node:
        layout = self.context.layout
        start = layout.page_offset(layer.layer)
        end = start + layout.page_elements(layer.layer)
        head = layout.head_offset(layer.layer)

        def call(target: Callable, *arguments: Any) -> Node:
            node = graph.call_function(target, arguments)
            node.meta["nn_module_stack"] = site.meta.get("nn_module_stack", {})
            return node

        def heads_of(tensor: Node) -> Node:
            return call(aten.slice.Tensor, tensor, 1, head, head + layer.kv_heads)

        asked = call_of(SiteCall, site)
        q, k, v = (call(aten.transpose.int, call(aten.select.int, x, 0, 0), 0, 1) for x in (asked.q, asked.k, asked.v))
        page = [-1, layer.kv_heads, layout.page_size, layer.key_dim + layer.value_dim]
        kv = call(aten.view.default, call(aten.slice.Tensor, inputs.kv_pool, 1, start, end), page)
        scores, pillars = heads_of(inputs.scores), heads_of(inputs.pillar_index)
        own: dict[str, Any] = {"page_table": inputs.page_tables[layout.group_of(layer.layer)]}
        step: Any = StepTensors(**inputs.step | own)
        nodes: list[Any] = [q, k, v, kv, scores, step, pillars, AttentionSettings.of(layer), asked.sinks]
        made = AttentionCall._make(nodes)
        rows = call(dual_mode_attention, *made.arguments())
        return call(aten.unsqueeze.default, rows, 0)
