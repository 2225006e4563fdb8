"""Looks tokens up in the part of the embedding that a rank holds.

Before, where w has the rows of a rank's own tokens alone:
    x: [1, T, H] = aten.embedding(w [V / ranks, H], ids [1, T])          wrong but for these tokens
After:
    x: [1, T, H] = sparsespec.embed_part(w, ids, first)                  a summand: zeros for other ranks' tokens

The output layer stays as it is, and gives the logits of the rank's own tokens. The runtime draws from those
(`runtime/device/sampling.py`).

Requires: `meta["val"]` on all nodes. Ensures: no embedding is looked up in a part of its rows.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from sparsespec_compile.kernels.ops import embed_part

from ..base import GraphPass, find_calls, input_node

aten = torch.ops.aten


class SplitVocabulary(GraphPass):
    """See the module's docstring."""

    name = "split the vocabulary"

    def rewrite(self, graph_module: GraphModule) -> None:
        parallel = self.context.parallel
        if parallel is None:
            return
        for node in find_calls(graph_module.graph, aten.embedding.default):
            weight, ids = input_node(node, 0), input_node(node, 1)
            part = parallel.vocabularies.get(str(weight.target))
            if part is None:
                continue
            with graph_module.graph.inserting_before(node):
                summand = graph_module.graph.call_function(embed_part, (weight, ids, part.first))
            summand.meta = dict(node.meta)
            node.replace_all_uses_with(summand)
            graph_module.graph.erase_node(node)
            self.matches += 1
