"""Proves that nothing but the attention sites mixes rows. Changes nothing.

Requests can only be packed side by side, and drafts thrown away, if a token's row depends on other rows through
attention alone. Short convolutions, state-space layers, token shift and attention written out in a model's own code
break this, and every test with a single sequence passes them.

The proof is an experiment on the captured graph, with each site replaced by a function of one row's q, k and v. Two
runs in lockstep have one row in common, the same token at the same position, but in another place: row i of the first
run is row j of the second. All other tokens and positions differ. So whatever belongs to the common row must agree:
q, k and v at every site, and the logits. This also catches positions counted from the row number.

Before = after:
    q, k, v of each site and logits [1, R, V], each with one dimension of size T (or R)

Requires: a normalised graph with its sites. Ensures: nothing is changed; the report says whether the graph also takes a
row alone.

Tolerance. Where a dimension is the rows, both runs' common row is compared at every node, and when it agrees it is made
equal, so rounding does not add up over layers. Within one block it differs by a few units of rounding at most (experts
see their rows in other groups, so sums have another order), while mixing changes a row by a good part of its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparsespec_compile.kernels.ops import SiteCall, attention_site

from ..base import GraphPass, attribute, call_of, describe, find_calls, input_node
from ..capture.rotary import positions_of
from ..errors import NotANumberError, RowMixingError
from .verify import lasting_write

ROW_COUNTS = (13, 17, 19, 23, 29, 31, 37)
"""Candidates for the number of rows: primes, so that few other sizes of a model can equal one."""

DRAWS = 100
"""Attempts to draw tokens whose embeddings are all finite."""


class ProveRowLocality(GraphPass):
    """See the module's docstring."""

    name = "prove row locality"

    def rewrite(self, graph_module: GraphModule) -> None:
        self._refuse_state(graph_module)
        rows = _row_count(graph_module)
        undefined: list[Node] = []
        experiments = ((0, rows - 1), (rows // 2, 0), (rows - 1, rows // 2))
        for here, there in experiments:
            runs = Runs(rows, here, there, self._inputs(rows, here, there))
            with torch.no_grad():
                node = Lockstep(graph_module, runs).run()
            undefined += [] if node is None else [node]
        if len(undefined) == len(experiments):
            raise NotANumberError(_explain_nan(graph_module, undefined[0]))
        with torch.no_grad():
            self.context.report.takes_single_rows = takes_single_rows(graph_module, self._inputs(rows, 1, 0)[0])
        self.matches = len(find_calls(graph_module.graph, attention_site))

    def _refuse_state(self, graph_module: GraphModule) -> None:
        node = lasting_write(graph_module)
        if node is not None:
            raise RowMixingError(
                f"{describe(node)} keeps a result between calls, so one token would change another. Allowed: forward "
                "passes that write into no parameter or buffer. Use a model whose forward pass is one."
            )

    def _inputs(self, rows: int, here: int, there: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Token ids, positions and rows to keep of both runs, alike in the common row and nowhere else.

        The first run has even tokens and positions, the second odd ones. Tokens whose embedding is not finite are left
        out, as models may hold anything for tokens that they never read.
        """
        model = self.context.model
        generator = torch.Generator("cpu").manual_seed(0)
        embeddings = next(model.get_input_embeddings().parameters())
        longest = positions_of(model)
        positions = min(2 * rows, longest) if longest else 2 * rows

        def draw(limit: int, parity: int) -> Tensor:
            return 2 * torch.randint(max(limit // 2, 1), (1, rows), generator=generator, device="cpu") + parity

        ids = [_finite(embeddings, partial(draw, len(embeddings), parity)) for parity in (0, 1)]
        places = [draw(positions, parity) for parity in (0, 1)]
        for first, second in (ids, places):
            second[0, there] = first[0, here]
        kept = torch.arange(rows, device=model.device)
        first_run, second_run = (
            (tokens.to(model.device), at.to(model.device), kept) for tokens, at in zip(ids, places, strict=True)
        )
        return first_run, second_run


def _finite(embeddings: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """Tokens from `draw`. Tokens whose row of `embeddings` is not finite are redrawn, a limited number of times."""
    tokens = draw()
    for _ in range(DRAWS):
        usable = embeddings[tokens.to(embeddings.device)].isfinite().all(-1).cpu()
        if usable.all():
            break
        tokens = torch.where(usable, tokens, draw())
    return tokens


def _row_count(graph_module: GraphModule) -> int:
    """A number of rows that differs from every other size in the graph, so that it identifies the dimension of rows."""
    sizes = {
        size
        for node in graph_module.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, int)
    }
    return next((rows for rows in ROW_COUNTS if rows not in sizes), ROW_COUNTS[-1])


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Norm of the difference of two rows over the norm of one, above which they count as different. A single block's
rounding is a few units (1e-7, 1e-3, 8e-3 for the last three types); mixing moves a row by a good part of its norm."""


@dataclass(frozen=True)
class Runs:
    """Two runs of `rows` rows: row `here` of the first and row `there` of the second are the same token.

    `inputs` holds the placeholders' values of both, in order.
    """

    rows: int
    here: int
    there: int
    inputs: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Common(Enum):
    """Result of comparing a node's values of both runs."""

    SAME = "the whole values are equal"
    AGREES = "one dimension is the rows, and the common row is equal"
    DIFFERS = "one dimension is the rows, and the common row is not equal"
    HIDDEN = "which dimension is the rows is not certain"


class _Run(Interpreter):
    """Runs one node at a time; each site returns a function of a single row's q, k and v."""

    def start(self, inputs: Iterable[Tensor]) -> None:
        """Sets the values that the placeholders take, in order."""
        self.args_iter = iter(inputs)

    def step(self, node: Node) -> Any:
        self.env[node] = self.run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]
        return self.env.get(node)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return row_wise(*args[:3]) if target is attention_site else super().call_function(target, args, kwargs)


def row_wise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands in for attention: `[1, T, Hq, Dv]`, whose row r depends on row r of q, k and v, and on all of each."""
    group = q.shape[1] // k.shape[1]
    keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    mixed = values + q.mean(-1, keepdim=True) + keys.mean(-1, keepdim=True)
    return mixed.transpose(1, 2).contiguous()


class Lockstep:
    """The two runs of one experiment."""

    def __init__(self, graph_module: GraphModule, runs: Runs) -> None:
        self.graph = graph_module.graph
        self.runs = runs
        self.pair = (_Run(graph_module), _Run(graph_module))
        self.common: dict[Node, Common] = {}
        self.undefined: Node | None = None

    def run(self) -> Node | None:
        """Runs all nodes.

        Returns:
            If logits of the common row are NaN, the first node that gave NaN for it.

        Raises:
            RowMixingError: q, k, v of a site or the logits depend on another row; names the node that mixes.
        """
        for run, inputs in zip(self.pair, self.runs.inputs, strict=True):
            run.start(inputs)
        for node in self.graph.nodes:
            if node.target is attention_site:
                for tensor in _rows_of(node):
                    self._require_agreement(tensor, axis=2)
            if node.op == "output":
                self._require_agreement(input_node(node, 0), axis=1)
                break
            first, second = (run.step(node) for run in self.pair)
            self.common[node] = Common.AGREES if node.op == "placeholder" else self._compare(first, second)
            if self.undefined is None and self.common[node] is Common.AGREES and self._has_nan(node, first):
                self.undefined = node
        logits = self.pair[0].env[input_node(self.graph.output_node(), 0)].select(1, self.runs.here)
        return self.undefined if logits.isnan().any() else None

    def _has_nan(self, node: Node, value: object) -> bool:
        """Whether the common row of a value with a dimension of rows holds NaN."""
        if node.op == "placeholder" or not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        return bool(value.select(value.shape.index(self.runs.rows), self.runs.here).isnan().any())

    def _require_agreement(self, node: Node, axis: int) -> None:
        first, second = (run.env[node] for run in self.pair)
        if not _agree(first.select(axis, self.runs.here), second.select(axis, self.runs.there)):
            raise RowMixingError(_explain(self._first_mixing(node), node))

    def _compare(self, first: object, second: object) -> Common:
        if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape != second.shape:
            return Common.HIDDEN if isinstance(first, (Tensor, tuple, list)) else Common.SAME
        axes = [axis for axis, size in enumerate(first.shape) if size == self.runs.rows]
        if len(axes) != 1:
            return Common.SAME if _equal(first, second) else Common.HIDDEN
        ours, theirs = first.select(axes[0], self.runs.here), second.select(axes[0], self.runs.there)
        if not _agree(ours, theirs):
            return Common.DIFFERS
        _make_equal(ours, theirs)
        return Common.AGREES

    def _first_mixing(self, sink: Node) -> Node:
        """The first node, of those between `sink` and the last nodes known to agree, that the difference comes from."""
        suspects, pending = {sink}, [sink]
        while pending:
            for source in pending.pop().all_input_nodes:
                if self.common[source] in (Common.DIFFERS, Common.HIDDEN) and source not in suspects:
                    suspects.add(source)
                    pending.append(source)
        return next(node for node in self.graph.nodes if node in suspects)


def takes_single_rows(graph_module: GraphModule, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a single row gives the same alone as among others, though the graph was captured for two rows at least.

    A model's code may have had another branch for one row, and a squeeze may drop a dimension of one row.

    Args:
        graph_module: a graph with its sites, which mixes no rows.
        inputs: token ids [1, T], positions [1, T] and rows to keep [T], T above 1.
    """
    ids, positions, kept = inputs
    many, one = _Run(graph_module), _Run(graph_module)
    many.start(inputs)
    one.start((ids[:, :1], positions[:, :1], kept[:1]))
    for node in graph_module.graph.nodes:
        sources = _rows_of(node) if node.target is attention_site else node.all_input_nodes
        axis = {attention_site: 2, "output": 1}.get(node.target)
        for source in sources if axis is not None else ():
            ours, theirs = many.env[source].narrow(axis, 0, 1), one.env[source]
            if ours.shape != theirs.shape or not _agree(ours, theirs):
                return False
            _make_equal(ours, theirs)
        if node.op == "output":
            return True
        many.step(node)
        try:
            one.step(node)
        except (RuntimeError, IndexError, ValueError):  # the exceptions that ops raise for invalid sizes
            return False
    return False


def _rows_of(site: Node) -> tuple[Node, Node, Node]:
    """What of a site's arguments has rows. Sinks are read as they are; attention alone is stubbed."""
    call = call_of(SiteCall, site)
    return call.q, call.k, call.v


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two rows are equal but for rounding; infinities and NaN must be at the same places."""
    if _equal(ours, theirs):
        return True
    if not ours.is_floating_point() or ours.dtype not in TOLERANCE:
        return False
    equal = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = (ours.double() - theirs.double()).masked_fill(equal, 0.0).norm()
    size = ours.double().masked_fill(~ours.isfinite(), 0.0).norm()
    return bool(difference <= TOLERANCE[ours.dtype] * size)


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """`torch.equal`, which does not know numbers of 8 bits: of those the bits are compared."""
    if ours.is_floating_point() and ours.itemsize == 1 and ours.dtype == theirs.dtype:
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    return torch.equal(ours, theirs)


def _make_equal(ours: Tensor, theirs: Tensor) -> None:
    """Writes our row over theirs, unless several elements share their memory."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(theirs.stride(), theirs.shape, strict=True))
    if not overlapping and not _equal(ours, theirs):
        theirs.copy_(ours)


def _explain_nan(graph_module: GraphModule, node: Node) -> str:
    weights = [source for source in node.all_input_nodes if source.op == "get_attr"]
    broken = [str(source.target) for source in weights if attribute(graph_module, str(source.target)).isnan().any()]
    where = f", which reads {broken[0].removeprefix('model.')}, a weight that holds NaN" if broken else ""
    return (
        f"logits are NaN for every token that was tried, first in {describe(node)}{where}. Allowed: models that "
        "compute numbers. Load the weights again, or choose a dtype in which nothing overflows, such as torch.bfloat16."
    )


def _explain(culprit: Node, sink: Node) -> str:
    code = (culprit.meta.get("stack_trace") or "").strip().splitlines()
    where = f" ({code[-1].strip()})" if code else ""
    counts_rows = not any(isinstance(source.meta.get("val"), Tensor) for source in culprit.all_input_nodes)
    how = "depends on the number of a row" if counts_rows else "mixes rows"
    return (
        f"{describe(culprit)}{where} {how}, and reaches {describe(sink)}. Allowed: tokens that meet in attention only, "
        "with positions taken from position_ids. Convolutions over tokens, state-space layers, token shift and "
        "attention outside transformers' interface cannot be packed; use a model without them."
    )
