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

Requires: a normalised graph with its sites. Ensures: nothing is changed.

Tolerance. Where a dimension is the rows, both runs' common row is compared at every node, and when it agrees it is made
equal, so rounding does not add up over layers. Within one block it differs by a few units of rounding at most (experts
see their rows in other groups, so sums have another order), while mixing changes a row by a good part of its norm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparsespec_compile.kernels.ops import attention_site

from .base import GraphPass, describe, find_calls
from .errors import RowMixingError
from .lockstep import Lockstep, Runs
from .verify import lasting_write

ROW_COUNTS = (13, 17, 19, 23, 29, 31, 37)
"""Candidates for the number of rows: primes, so that few other sizes of a model can equal one."""


class ProveRowLocality(GraphPass):
    """See the module's docstring."""

    name = "prove row locality"

    def rewrite(self, graph_module: GraphModule) -> None:
        self._refuse_state(graph_module)
        rows = _row_count(graph_module)
        for here, there in ((0, rows - 1), (rows // 2, 0), (rows - 1, rows // 2)):
            runs = Runs(rows, here, there, self._inputs(rows, here, there))
            with torch.no_grad():
                Lockstep(graph_module, runs).run()
        self.matches = len(find_calls(graph_module.graph, attention_site))

    def _refuse_state(self, graph_module: GraphModule) -> None:
        node = lasting_write(graph_module)
        if node is not None:
            raise RowMixingError(
                f"{describe(node)} keeps a result between calls, so one token would change another. Allowed: forward "
                "passes that write into no parameter or buffer. Rotary embeddings of type 'dynamic' and 'longrope' do "
                "this: choose 'default', 'linear', 'yarn' or 'llama3' in config.rope_parameters."
            )

    def _inputs(self, rows: int, here: int, there: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Token ids, positions and rows to keep of both runs, alike in the common row and nowhere else.

        The first run has even tokens and positions, the second odd ones.
        """
        model = self.context.model
        generator = torch.Generator().manual_seed(0)
        vocabulary = len(next(model.get_input_embeddings().parameters()))
        longest = getattr(model.config, "max_position_embeddings", None)
        positions = min(2 * rows, int(longest)) if longest else 2 * rows
        drawn = []
        for limit in (vocabulary, positions):
            first, second = (2 * torch.randint(max(limit // 2, 1), (1, rows), generator=generator) for _ in range(2))
            second += 1
            second[0, there] = first[0, here]
            drawn.append((first.to(model.device), second.to(model.device)))
        kept = torch.arange(rows, device=model.device)
        (first_ids, second_ids), (first_positions, second_positions) = drawn
        return (first_ids, first_positions, kept), (second_ids, second_positions, kept)


def _row_count(graph_module: GraphModule) -> int:
    """A number of rows that is no other size in the graph, so that a dimension of this size is the rows."""
    sizes = {
        size
        for node in graph_module.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, int)
    }
    return next((rows for rows in ROW_COUNTS if rows not in sizes), ROW_COUNTS[-1])
