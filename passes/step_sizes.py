"""Says whether the sizes of a call are ones that compiled code holds for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import sympy
from torch import SymInt, Tensor
from torch.fx import GraphModule

REMEMBERED = 1024
"""Combinations of sizes whose outcome is kept; a runtime uses few, and evaluating a condition takes 0.1 ms."""


class StepSizes:
    """What a compiler has taken for granted about the sizes of a graph's inputs.

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
