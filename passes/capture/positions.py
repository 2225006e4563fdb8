"""Tells models whose positions end, in a table, from those whose positions go on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_LOOKUPS = {
    torch.ops.aten.embedding.default: (0, 1),
    torch.ops.aten.index.Tensor: (0, 1),
    torch.ops.aten.index_select.default: (0, 2),
    torch.ops.aten.gather.default: (0, 2),
}
"""Ops that look positions up: the arguments that are the table and the positions."""


def has_position_table(graph_module: GraphModule) -> bool:
    """Whether the captured graph looks positions up in a table, which cannot be read beyond its end.

    True for learned positions (GPT-2, OPT) and for sines that were computed beforehand (GPT-J). Rotary embeddings are
    computed from the position itself and go on for ever.

    Args:
        graph_module: takes `position_ids`; its nodes carry example values in `meta["val"]`.
    """
    positions: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.target == "position_ids":
            positions.add(node)
        elif node.target in _LOOKUPS:
            table, index = (node.args[place] for place in _LOOKUPS[node.target])
            found = index if isinstance(index, list | tuple) else [index]
            if table not in positions and positions.intersection(found):
                return True
        elif positions.intersection(node.all_input_nodes) and _holds_integers(node):
            positions.add(node)  # positions in another shape, or with an offset
    return False


def _holds_integers(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
