"""What one iteration reads and computes, as sympy expressions, and what a single layer adds to them.

Plain data and formulas, no FX: `graph.py` applies them to a graph, `advice/config_cost.py` to a configuration.

The terms count the bytes that have to cross the memory bus: weights once an iteration, keys and values once for each
request that reads them, scores and logits written and read once. Activations do not count, since at a few hundred rows
they stay in the L2 cache. Bytes of a term over the read ceiling are its speed of light. Bytes that kernels read more
than once are kept apart, for predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import sympy
from sympy import Expr, Integer, Min, Piecewise, Rational, ceiling

from sparsespec_compile.kernels.ops import scored_rows_at_most

Kind = Literal["gemm", "draft", "verify", "stream"]

SCORES = "scores"
"""Name of the term for scores that verifications give out."""

_SCORE_BYTES = 4
_INDEX_BYTES = 4


Number = Any
"""A float, or as many as there are iterations: np.ndarray [n]."""


@dataclass(frozen=True)
class Iteration:
    """The size of one iteration, or of several, with arrays [n]; also, as `SYMBOLS`, the variables of all expressions.

    Attributes:
        rows: packed tokens (T).
        kept: rows with logits (R).
        drafting: requests that draft, one row each (D).
        verifying: requests that verify, k + 1 rows each (V); all requests of plain decoding, where k = 0.
        length: mean cached length of the requests (L).
        draft_tokens: drafts of a cycle (k).
        budget: cached positions that a draft reads besides those since the last verification (b).
    """

    rows: Number
    kept: Number
    drafting: Number
    verifying: Number
    length: Number
    draft_tokens: Number
    budget: Number

    def values(self) -> tuple[Number, ...]:
        """The values, in the order of `SYMBOLS`."""
        return tuple(getattr(self, field.name) for field in fields(self))


SYMBOLS = sympy.symbols("T R D V L k b", nonnegative=True)
T, R, D, V, L, k, b = SYMBOLS


@dataclass(frozen=True)
class Term:
    """One part of an iteration's cost.

    Attributes:
        name: what it is; terms of one name are added up.
        kind: how it uses the device. "gemm": weights streamed against few rows; "draft": gathered positions;
            "verify": whole caches; "stream": anything else that is read or written in order.
        bytes, flops: in `SYMBOLS`.
        launches: kernels of their own.
        bytes_again: bytes that a kernel reads a second time or more, which are not in `bytes`; no part of the speed of
            light.
    """

    name: str
    kind: Kind
    bytes: Expr
    flops: Expr
    launches: int = 0
    bytes_again: Expr = sympy.S.Zero


@dataclass(frozen=True)
class IterationCost:
    """The cost of one iteration of one model.

    Attributes:
        terms: with different names, in the order of the forward pass.
    """

    terms: tuple[Term, ...]

    @property
    def bytes(self) -> Expr:
        """Bytes of all terms."""
        return sympy.Add(*(term.bytes for term in self.terms))

    @property
    def flops(self) -> Expr:
        """Floating-point operations of all terms."""
        return sympy.Add(*(term.flops for term in self.terms))

    @cached_property
    def unscored(self) -> IterationCost:
        """The same where verifications give out no scores."""
        return IterationCost(tuple(term for term in self.terms if term.name != SCORES))

    def term(self, name: str) -> Term:
        """The term called `name`; raises KeyError when there is none."""
        return {term.name: term for term in self.terms}[name]

    def evaluate(self, iteration: Iteration) -> list[tuple[float, float, float]]:
        """Bytes, FLOPs and bytes read again of each term, in their order."""
        return [(float(size), float(flops), float(again)) for size, flops, again in self.evaluate_many(iteration)]

    def evaluate_many(self, iterations: Iteration) -> list[tuple[Number, Number, Number]]:
        """As `evaluate`, of iterations whose attributes are arrays [n]: arrays [n], or what all have in common."""
        return self._function(*map(np.asarray, iterations.values()))

    @cached_property
    def _function(self) -> Callable[..., list[tuple[Number, Number, Number]]]:
        counts = [(term.bytes, term.flops, term.bytes_again) for term in self.terms]
        return sympy.lambdify(SYMBOLS, counts, modules="numpy")


def collect(terms: Iterable[Term]) -> IterationCost:
    """Adds up the terms of each name."""
    total: dict[str, Term] = {}
    for term in terms:
        old = total.get(term.name, Term(term.name, term.kind, Integer(0), Integer(0)))
        total[term.name] = Term(
            term.name,
            term.kind,
            old.bytes + term.bytes,
            old.flops + term.flops,
            old.launches + term.launches,
            old.bytes_again + term.bytes_again,
        )
    return IterationCost(tuple(total.values()))


def projection(rows: Expr, inputs: int, outputs: int, itemsize: int | Rational) -> Term:
    """A linear layer: its weight is read once, whatever the rows; "projections" or, on kept rows, "output"."""
    name = "output projection" if rows == R else "projections"
    return Term(name, "gemm", Integer(inputs * outputs * itemsize), 2 * rows * inputs * outputs, launches=1)


def distinct_experts(rows: Expr | float, count: int, chosen: int) -> Expr | float:
    """How many of `count` experts so many rows choose on average, each `chosen` different ones, all equally likely.

    An expert is left out by a row with probability 1 - chosen / count. Trained routers prefer some experts, and rows of
    one text choose alike, so that fewer are read: this is the most that should be expected.
    """
    return count * (1 - (1 - Rational(chosen, count)) ** rows)


def experts(rows: Expr, count: int, chosen: Expr | int, elements: int, itemsize: int, launches: int) -> Term:
    """A layer of experts of which each row chooses some: those that any row has chosen are read once.

    Args:
        rows: that choose.
        count: experts.
        chosen: by each row.
        elements: weights of an expert.
        itemsize: bytes of a weight.
        launches: kernels of its own.
    """
    read = distinct_experts(rows, count, int(chosen)) * elements * itemsize
    return Term("experts", "gemm", read, 2 * rows * chosen * elements, launches=launches)


def embedding(rows: Expr, width: int, itemsize: int) -> Term:
    """A table of which each row reads one entry."""
    return Term("embedding", "stream", rows * width * itemsize, Integer(0))


def logits(rows: Expr, vocabulary: int, itemsize: int) -> Term:
    """The graph's output, written by the graph and read by the sampler."""
    return Term("logits", "stream", 2 * rows * vocabulary * itemsize, Integer(0))


@lru_cache  # layers are mostly alike, and sympy takes milliseconds for each minimum
def attention(
    q_heads: int, kv_heads: int, key_dim: int, value_dim: int, window: int, itemsize: int, *, chunked: bool = False
) -> tuple[Term, ...]:
    """One dual-mode attention layer.

    Drafting requests read `min(L, b)` chosen positions and those since the last verification, k + 1 on average (half
    of the drafts before it accepted, half of those behind it written). Verifying ones read their whole cache, once for
    all their rows, and give out a score for each position and KV head, which the choice of the next positions reads.
    The kernel reads the cache again for rows beyond those that it takes at a time.

    Args:
        q_heads, kv_heads, key_dim, value_dim, window, chunked: as in `AttentionLayer`; window 0 = none.
        itemsize: bytes of an element of the cache.
    """
    token = kv_heads * (key_dim + value_dim) * itemsize
    row_flops = 2 * q_heads * (key_dim + value_dim)
    drafted = _visible(Min(L, b) + k + 1, window, chunked)
    verified = _visible(L, window, chunked)
    index = D * Min(L, b) * kv_heads * _INDEX_BYTES
    # Half a row less, so that rounding cannot add a tile; k is an integer.
    times = ceiling((k + Rational(1, 2)) / scored_rows_at_most(q_heads // kv_heads))
    verify = Term(
        "verify attention",
        "verify",
        V * verified * token,
        V * (k + 1) * verified * row_flops,
        launches=1,
        bytes_again=(times - 1) * V * verified * token,
    )
    scores = 2 * Min(k, 1) * V * L * kv_heads * _SCORE_BYTES  # plain decoding, k = 0, chooses nothing
    return (
        Term("KV written", "stream", T * token, Integer(0)),
        Term("draft attention", "draft", D * drafted * token + index, D * drafted * row_flops),
        verify,
        Term(SCORES, "stream", scores, Integer(0)),
    )


def _visible(positions: Expr, window: int, chunked: bool) -> Expr:
    """As many of the positions as rows at L see. Rows may stand anywhere in a later chunk: half of it on average."""
    if not window:
        return positions
    return Min(positions, Piecewise((Rational(window + 1, 2), window <= L), (window, True)) if chunked else window)
