"""Proves that every rank of a tensor-parallel graph computes the whole model's result: each sum is reduced once.

Each value is whole on every rank, a piece of the whole, or one summand of it (`placing.py`). What follows from the
weights holds for the whole graph, or its first node that breaks it is named: a summand or a piece that is read as if it
were whole, pieces that do not belong together, a sum over the ranks of what is whole already.

A product with an 8-bit copy of a rank's weight counts as that with the weight: ranks round their own pieces, by scales
of their own, so that what is in 8 bits is nothing that ranks have parts of. `verify.py` keeps it within the product.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from ..parallel.division import Placement
from .placing import Placed, place, place_product
from .verify import copy_products


def verify_sums(graph_module: GraphModule, weights: Mapping[str, Placement]) -> None:
    """Checks the placement of every value.

    Args:
        graph_module: with `meta["val"]` on its nodes.
        weights: placements of its parameters by their target; others are whole.

    Raises:
        Misplaced: naming the first node that reads a part of a value in a way that it must not.
    """
    known: dict[Node, Placed] = {}
    products = {one.result: one for one in copy_products(graph_module.graph)}
    within = {node for one in products.values() for node in one.within}
    for node in graph_module.graph.nodes:
        if node in products:
            known[node] = place_product(node, products[node].x, products[node].copy, known)
        elif node not in within:
            known[node] = place(node, known, weights)
