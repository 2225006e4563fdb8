"""Inserts the all-reduce where each rank of a tensor-parallel model has computed one summand.

Before, on one rank (heads and columns of the weights are that rank's):
    y: [1, T, H] = aten.linear(x [1, T, a], w [H, a])        a summand: a is a rank's piece of what is summed over
    z: [1, T, H] = aten.add(residual, y)
After:
    y: [1, T, H] = aten.linear(x, w)
    s: [1, T, H] = sparsespec.all_reduce(y, group)
    z: [1, T, H] = aten.add(residual, s)

Which values are summands follows from how the weights are divided (`proofs/placing.py`). A summand is summed up as
late as may be: behind everything that works on summands as on the sum, such as the weighting of experts, and the
addition of shared experts. So one all-reduce serves all of it.

Requires: `meta["val"]` on all nodes, with a rank's own sizes.
Ensures: every value is whole, a piece or a summand; what is not linear, and the output, reads no summand.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from sparsespec_compile.kernels.ops import all_reduce

from ..base import GraphPass, fill, input_node
from ..errors import ParallelPlanError
from ..parallel.division import SUMMAND, WHOLE
from ..proofs.placing import Misplaced, Placed, place


class ReduceSums(GraphPass):
    """See the module's docstring."""

    name = "reduce sums"

    def rewrite(self, graph_module: GraphModule) -> None:
        parallel = self.context.parallel
        if parallel is None:
            return
        known: dict[Node, Placed] = {}
        self._sums: set[Node] = set()
        node = next(iter(graph_module.graph.nodes))
        while node.op != "root":
            try:
                known[node] = place(node, known, parallel.weights)
            except Misplaced as error:
                if node in self._sums and known[input_node(node, 0)] == WHOLE:
                    node = self._take_back(node)
                    continue
                summands = [source for source in node.all_input_nodes if known[source] == SUMMAND]
                if not summands or node.target is all_reduce:
                    raise ParallelPlanError(
                        f"The model's plan for tensor parallelism does not fit what it computes: {error} Allowed: "
                        "plans whose pieces meet in products, attention and what is done to each element. Change "
                        "model.tp_plan, or run the model on one GPU."
                    ) from error
                sums = {source: self._reduce(source, parallel.part.ranks.group) for source in summands}
                node = next(sums[source] for source in known if source in sums)
                continue
            node = node.next
        parallel.reduced = True
        self.notes += parallel.part.notes()
        fill(graph_module)

    def _reduce(self, summand: Node, group: str) -> Node:
        """Makes every reader of a summand read the sum; returns the node at which to continue."""
        with summand.graph.inserting_after(summand):
            total = summand.graph.call_function(all_reduce, (summand, group))
        summand.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        total.meta["val"] = summand.meta["val"]
        total.meta["nn_module_stack"] = summand.meta.get("nn_module_stack", {})
        self._sums.add(total)
        self.matches += 1
        return total

    def _take_back(self, total: Node) -> Node:
        """What it sums up has become whole, as its own sources are summed up now; returns what follows."""
        following = total.next
        total.replace_all_uses_with(input_node(total, 0))
        total.graph.erase_node(total)
        self._sums.remove(total)
        self.matches -= 1
        return following
