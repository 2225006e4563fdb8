"""Which part of every value of a graph a rank has: all of it, a piece along one dimension, or one summand of it.

Known for the weights, it follows for the rest from what each op does. An op whose rule is not known here may only read
values that are whole on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparsespec_compile.kernels.ops import (
    AttentionCall,
    ExpertsCall,
    SiteCall,
    all_reduce,
    attention_site,
    dual_mode_attention,
    embed_part,
    experts,
    halved_product,
)

from ..base import argument, call_of, describe, input_node
from ..errors import GraphInvariantError
from ..parallel.division import SUMMAND, WHOLE, Placement, piece

aten = torch.ops.aten


Placed = Placement | tuple[Placement, ...]
"""The placement of a value, or of each value that an op gives."""

Placements = Mapping[Node, Placed]


class Misplaced(GraphInvariantError):
    """An op combines a rank's part of a value in a way whose result differs from the whole model's."""


def place(node: Node, known: Placements, weights: Mapping[str, Placement]) -> Placed:
    """The placement of what a node gives.

    Args:
        node: of a graph with `meta["val"]` on its nodes.
        known: placements of its inputs.
        weights: those of the graph's parameters by their target; others are whole.

    Raises:
        Misplaced: it reads something that it may not read in part.
    """
    if node.op == "get_attr":
        return weights.get(str(node.target), WHOLE)
    if node.target in _ATTENTION:
        return _attention(node, known)
    placed = [known[source] for source in node.all_input_nodes]
    if node.op == "output" and any(one != WHOLE and one != _logits(node) for one in placed):
        raise misplaced(node, known, "the graph gives it out")
    if node.op == "output":
        return WHOLE  # logits of a rank's own tokens are what the runtime takes
    if all(one == WHOLE for one in placed):
        if node.target is all_reduce:
            raise misplaced(node, known, "it is whole on every rank already, and would be counted more than once")
        return WHOLE
    rule = _RULES.get(node.target)
    if rule is None and isinstance(node.target, OpOverload) and not node.target._schema.is_mutable:
        if str(node.target._schema.name) in _GROUPED_PRODUCTS:
            rule = _grouped_product
        elif torch.Tag.pointwise in node.target.tags:
            rule = _elementwise
    if rule is None:
        raise misplaced(node, known, "what it does with parts of values is not known here")
    return rule(node, known)


def misplaced(node: Node, known: Placements, why: str, sources: Sequence[Node] | None = None) -> Misplaced:
    """The error that a node reads parts of values, of its inputs or of `sources`, in a way that it must not."""
    sources = node.all_input_nodes if sources is None else sources
    read = [f"{source.name} ({known[source]})" for source in sources if known[source] != WHOLE]
    read = read or [source.name for source in sources]
    return Misplaced(f"{describe(node)} reads {', '.join(read)}: {why}.")


def _logits(output: Node) -> Placement | None:
    """What logits of a rank's own tokens are; None where the graph gives out several values."""
    if len(output.all_input_nodes) != 1:
        return None
    shape = _shape(output.all_input_nodes[0])
    return piece(len(shape) - 1, shape[-1])


def _one(known: Placements, value: object) -> Placement:
    """The placement of an argument; numbers are whole."""
    placed = known[value] if isinstance(value, Node) else WHOLE
    if isinstance(placed, tuple):
        raise GraphInvariantError(f"{value} is a tuple where one value is needed.")
    return placed


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


# Attention, products.

_ATTENTION = frozenset({attention_site, dual_mode_attention})


def _attention(node: Node, known: Placements) -> Placed:
    """Whole, or pieces of the heads: a rank's query heads with the KV heads that they read, or with the only one.

    Sinks belong to query heads.
    """
    site = node.target is attention_site
    call = call_of(SiteCall if site else AttentionCall, node)
    heads = 1
    q, k, v = (_one(known, tensor) for tensor in (call.q, call.k, call.v))
    q_heads, kv_heads = _shape(call.q)[heads], _shape(call.k)[heads]
    sinks = None if call.sinks is None else _one(known, call.sinks)
    if (q, k, v) == (WHOLE, WHOLE, WHOLE) and sinks in (None, WHOLE):
        return WHOLE
    shared = (k, v) == (WHOLE, WHOLE) and kv_heads == 1
    if (
        q == piece(heads, q_heads)
        and sinks in (None, piece(0, q_heads))
        and (shared or k == v == piece(heads, kv_heads))
    ):
        return piece(2 if site else 1, q_heads)
    raise misplaced(node, known, "query heads and the KV heads that they read must be split alike")


def place_product(node: Node, x: Node, weight: Node, known: Placements) -> Placed:
    """The placement of what is to be taken for x @ weight.T, as `place` gives it."""
    return _product_of(node, [x, weight], known)


def _linear(node: Node, known: Placements) -> Placed:
    return _product_of(node, node.all_input_nodes, known)


def _product_of(node: Node, factors: Sequence[Node], known: Placements) -> Placed:
    """x @ w.T + b: a weight split by its rows splits the result; one split by its columns gives summands."""
    x, w, *bias = (_one(known, value) for value in factors)
    if all(one == WHOLE for one in (x, w, *bias)):
        return WHOLE
    last = len(_shape(factors[0])) - 1
    out = last + 1 if node.target is halved_product else last
    if x == WHOLE and w.kind == "piece" and w.dim == 0 and bias in ([], [w]):
        return piece(out, *w.blocks)
    if x == piece(last, *w.blocks) and w.kind == "piece" and w.dim == 1 and bias in ([], [SUMMAND]):
        return SUMMAND
    if x == SUMMAND and w == WHOLE and not bias:
        return SUMMAND
    if x.kind == "piece" and x.dim < last and w == WHOLE and bias in ([], [WHOLE]):
        return piece(x.dim + out - last, *x.blocks)
    raise misplaced(node, known, "that is no product of which a rank computes its part", factors)


_GROUPED_PRODUCTS = frozenset({"transformers::grouped_mm_fallback", "aten::_grouped_mm"})


def _grouped_product(node: Node, known: Placements) -> Placed:
    """x [T, K] @ w [experts, K, N], the rows of an expert by its own matrix."""
    x, w, *others = (_one(known, value) for value in node.all_input_nodes)
    if all(other == WHOLE for other in others) and len(_shape(input_node(node, 0))) == 2:
        if x == WHOLE and w.kind == "piece" and w.dim == 2:
            return piece(1, *w.blocks)
        if x == piece(1, *w.blocks) and w.kind == "piece" and w.dim == 1:
            return SUMMAND
    raise misplaced(node, known, "that is no product of which a rank computes its part")


def _experts(node: Node, known: Placements) -> Placed:
    """Every expert by its hidden values: a rank's columns of gate and of up, with the rows of down that read them."""
    call = ExpertsCall.of(node.args)
    up, down, *rest = (_one(known, value) for value in (call.up, call.down, call.x, call.choice, call.weight))
    inner, columns = _shape(call.down)[2], _shape(call.up)[1]  # type: ignore[arg-type]  # nodes stand for tensors
    in_blocks = columns == 2 * inner and not call.settings.interleaved
    if down == piece(2, *down.blocks) and all(one == WHOLE for one in rest):
        split = piece(1, *(down.blocks * 2 if in_blocks else (columns,)))
        biases = [None if bias is None else _one(known, bias) for bias in (call.up_bias, call.down_bias)]
        if len(down.blocks) == 1 and up == split and biases[0] in (None, split) and biases[1] in (None, SUMMAND):
            return SUMMAND
    raise misplaced(node, known, "that is no product of which a rank computes its part")


def _embedded(node: Node, known: Placements) -> Placed:
    """Rows of a rank's own tokens, zeros for those of others."""
    weight, ids = (_one(known, value) for value in node.all_input_nodes)
    if weight.kind == "piece" and weight.dim == 0 and len(weight.blocks) == 1 and ids == WHOLE:
        return SUMMAND
    raise misplaced(node, known, "it looks up whole tokens in rows of an embedding")


def _all_reduce(node: Node, known: Placements) -> Placed:
    if _one(known, node.args[0]) == SUMMAND:
        return WHOLE
    raise misplaced(node, known, "only summands may be summed up")


# Elementwise ops.

_ADDS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_SCALES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default})


def _elementwise(node: Node, known: Placements) -> Placed:
    """Pieces along one and the same dimension stay pieces; summands may be added up, and scaled."""
    placed = [_one(known, value) for value in node.all_input_nodes]
    if SUMMAND in placed:
        if node.target in _ADDS and all(_one(known, value) == SUMMAND for value in node.args):
            return SUMMAND
        if (
            node.target in _SCALES
            and placed.count(SUMMAND) == 1
            and placed[0] == SUMMAND
            and WHOLE
            in (
                *placed[1:],
                WHOLE,
            )
        ):
            return _scaled(node, known)
        raise misplaced(node, known, "a summand is not the sum")
    rank = len(_shape(node))
    found = {
        (one.dim + rank - len(_shape(source)), one.blocks)
        for source, one in zip(node.all_input_nodes, placed, strict=True)
        if one != WHOLE
    }
    if len(found) > 1:
        raise misplaced(node, known, "they are split in different ways")
    ((dim, blocks),) = found
    for source, one in zip(node.all_input_nodes, placed, strict=True):
        value = source.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        own = dim - rank + len(shape)
        if one == WHOLE and own >= 0 and shape[own] != 1:
            raise misplaced(node, known, f"they meet {source.name}, which is whole along dimension {own}")
    return piece(dim, *blocks)


def _scaled(node: Node, known: Placements) -> Placed:
    if isinstance(node.args[0], Node) and _one(known, node.args[0]) == SUMMAND:
        return SUMMAND
    if node.target is aten.mul.Tensor:
        return SUMMAND
    raise misplaced(node, known, "dividing by a summand is not dividing by the sum")


# Ops on shapes.


def _same(node: Node, known: Placements) -> Placed:
    return _one(known, node.args[0])


def _cast(node: Node, known: Placements) -> Placed:
    """A cast rounds, so the cast of a sum is not the sum of casts."""
    placed = _one(known, node.args[0])
    if placed == SUMMAND:
        raise misplaced(node, known, "a summand would be rounded before it is added")
    return placed


def _dims(node: Node, name: str, rank: int) -> list[int]:
    """An argument that is a dimension or several, each counted from the first."""
    value = argument(node, name)
    return [int(one) % rank for one in (value if isinstance(value, Iterable) else [value])]


def _moved(order: Callable[[Node, int], Sequence[int]]) -> Callable[[Node, Placements], Placed]:
    """The rule of an op that permutes dimensions: dimension i of the result is `order(...)[i]` of the input."""

    def rule(node: Node, known: Placements) -> Placed:
        placed = _one(known, node.args[0])
        if placed == SUMMAND:
            return placed
        return piece(list(order(node, len(_shape(input_node(node, 0))))).index(placed.dim), *placed.blocks)

    return rule


def _transposed(node: Node, rank: int) -> list[int]:
    order = list(range(rank))
    first, second = _dims(node, "dim0", rank)[0], _dims(node, "dim1", rank)[0]
    order[first], order[second] = order[second], order[first]
    return order


def _unsqueeze(node: Node, known: Placements) -> Placed:
    placed = _one(known, node.args[0])
    (new,) = _dims(node, "dim", len(_shape(node)))
    return placed if placed == SUMMAND else piece(placed.dim + (new <= placed.dim), *placed.blocks)


def _select(node: Node, known: Placements) -> Placed:
    placed = _one(known, node.args[0])
    (gone,) = _dims(node, "dim", len(_shape(input_node(node, 0))))
    if placed == SUMMAND:
        return placed
    if gone == placed.dim:
        raise misplaced(node, known, "it takes one of what is split")
    return piece(placed.dim - (gone < placed.dim), *placed.blocks)


def _slice(node: Node, known: Placements) -> Placed:
    source = input_node(node, 0)
    placed, shape = _one(known, source), _shape(source)
    (dim,) = _dims(node, "dim", len(shape))
    if placed == SUMMAND or dim != placed.dim:
        return placed
    start, end = (argument(node, name) for name in ("start", "end"))
    return _blocks_between(node, known, placed, start or 0, shape[dim] if end is None else min(end, shape[dim]))


def _blocks_between(node: Node, known: Placements, placed: Placement, start: int, end: int) -> Placement:
    """The blocks of a piece within a range, which must begin and end at block boundaries."""
    bounds = [sum(placed.blocks[:number]) for number in range(len(placed.blocks) + 1)]
    if start not in bounds or end not in bounds:
        raise misplaced(node, known, "it takes a range of what is split")
    return piece(placed.dim, *placed.blocks[bounds.index(start) : bounds.index(end)])


def _parts(node: Node, known: Placements) -> Placed:
    """Of split, chunk and unbind: as many placements as there are parts."""
    source, values = input_node(node, 0), node.meta["val"]
    placed = _one(known, source)
    (dim,) = _dims(node, "dim", len(_shape(source)))
    if placed == SUMMAND or dim != placed.dim:
        return (placed,) * len(values)
    found, start = [], 0
    for value in values:
        found.append(_blocks_between(node, known, placed, start, start + value.shape[dim]))
        start += value.shape[dim]
    return tuple(found)


def _part(node: Node, known: Placements) -> Placed:
    placed = known[input_node(node, 0)]
    number: Any = node.args[1]
    return placed[number] if isinstance(placed, tuple) else placed


def _cat(node: Node, known: Placements) -> Placed:
    placed = {_one(known, source) for source in node.all_input_nodes}
    (one, *others) = placed
    dim = _dims(node, "dim", len(_shape(node)))[0] if len(node.args) > 1 or node.kwargs else 0
    if others or (one.kind == "piece" and one.dim == dim):
        raise misplaced(node, known, "it joins what is split in different ways")
    return one


def _expand(node: Node, known: Placements) -> Placed:
    placed = _one(known, node.args[0])
    before, after = _shape(input_node(node, 0)), _shape(node)
    if placed == SUMMAND:
        return placed
    dim = placed.dim + len(after) - len(before)
    if not statically_known_true(after[dim] == before[placed.dim]):
        raise misplaced(node, known, "it repeats what is split")
    return piece(dim, *placed.blocks)


def _view(node: Node, known: Placements) -> Placed:
    """A split dimension may be cut into several, of which the outermost is split, or become the outermost of one."""
    source = input_node(node, 0)
    placed, before, after = _one(known, source), _shape(source), _shape(node)
    if placed == SUMMAND:
        return placed
    outer, inner, length = _product(before[: placed.dim]), _product(before[placed.dim + 1 :]), before[placed.dim]
    places = [dim for dim in range(len(after)) if statically_known_true(_product(after[:dim]) == outer)]
    if len(places) > 1:  # dimensions of one element: which of them is split shows only where the call says so
        sizes: Any = node.args[1]
        free = [dim for dim in places if sizes[dim] == -1]
        places = free or [dim for dim in places if statically_known_true(after[dim] == length)]
    if len(places) != 1:
        raise misplaced(node, known, "which of the new dimensions is split is not certain")
    new = _product(after[places[0] + 1 :])
    if statically_known_true(new == inner):
        return piece(places[0], *placed.blocks)
    if len(placed.blocks) == 1 and isinstance(inner, int) and isinstance(new, int):
        elements = placed.blocks[0] * inner
        if elements % new == 0:
            return piece(places[0], elements // new)
    raise misplaced(node, known, "the new dimensions do not begin where a piece does")


def _product(sizes: Iterable[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


# Ops along dimensions.


def _reduced(sums: bool) -> Callable[[Node, Placements], Placed]:
    """The rule of an op that reduces some dimensions, such as a mean; `sums` if the whole of summands is their sum."""

    def rule(node: Node, known: Placements) -> Placed:
        placed, rank = _one(known, node.args[0]), len(_shape(input_node(node, 0)))
        if placed == SUMMAND:
            if sums:
                return placed
            raise misplaced(node, known, "a summand is not the sum")
        gone = _dims(node, "dim", rank)
        if placed.dim in gone:
            raise misplaced(node, known, "it goes over all of what is split")
        kept = len(_shape(node)) == rank
        return piece(placed.dim - (0 if kept else sum(dim < placed.dim for dim in gone)), *placed.blocks)

    return rule


def _normalised(node: Node, known: Placements) -> Placed:
    """Norms over the last dimensions, with a weight of their size."""
    placed = _one(known, node.args[0])
    others = [_one(known, source) for source in node.all_input_nodes[1:]]
    last = len(_shape(input_node(node, 0))) - len(argument(node, "normalized_shape"))
    if placed.kind == "piece" and placed.dim < last and all(other == WHOLE for other in others):
        return placed
    raise misplaced(node, known, "it goes over all of what is split, or over a summand")


def _index(node: Node, known: Placements) -> Placed:
    """Rows taken by whole indices; of pieces, by one list of indices along another dimension."""
    source, indices = input_node(node, 0), list(argument(node, "indices"))
    placed = _one(known, source)
    if all(_one(known, index) == WHOLE for index in indices if isinstance(index, Node)):
        if placed == SUMMAND:
            return placed
        given = [dim for dim, index in enumerate(indices) if index is not None]
        if len(given) == 1 and given[0] != placed.dim and len(_shape(indices[given[0]])) == 1:
            return placed
    raise misplaced(node, known, "it looks up what is split, or by parts of indices")


_RULES: dict[object, Callable[[Node, Placements], Placed]] = {
    all_reduce: _all_reduce,
    embed_part: _embedded,
    operator.getitem: _part,
    experts: _experts,
    **dict.fromkeys((aten.linear.default, halved_product), _linear),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _view),
    **dict.fromkeys(
        (aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.dropout.default),
        _same,
    ),
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default, aten.type_as.default), _cast),
    aten.transpose.int: _moved(_transposed),
    aten.permute.default: _moved(lambda node, rank: _dims(node, "dims", rank)),
    aten.t.default: _moved(lambda node, rank: range(rank)[::-1]),
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
        _parts,
    ),
    aten.cat.default: _cat,
    aten.expand.default: _expand,
    aten.sum.dim_IntList: _reduced(sums=True),
    **dict.fromkeys((aten.mean.dim, aten.amax.default, aten.softmax.int, aten._softmax.default), _reduced(sums=False)),
    **dict.fromkeys((aten.rms_norm.default, aten.layer_norm.default), _normalised),
    aten.index.Tensor: _index,
}
