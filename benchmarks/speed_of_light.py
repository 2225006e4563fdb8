"""The speed of light of the iterations that were run: their bytes at the read ceiling, or their FLOPs at theirs.

An iteration reads every weight once, and the keys and values that the engine counted for its drafts and verifications
(`Stats.kv_read_by_iteration`). Unlike a prediction this holds for whatever was run, while the batch grew or drained and
"auto" chose other drafts. Iterations that read 8-bit copies of the weights are counted with those.
"""

import statistics
from collections.abc import Sequence
from functools import lru_cache

from sparsespec_compile import Ceilings
from sparsespec_compile.passes.cost.terms import Iteration, IterationCost


class SpeedOfLight:
    """Least seconds of iterations.

    Args:
        cost: of the graph.
        itemsize: bytes of an element of keys and values.
        ceilings: of the device.
        drafts: cost of the graph that reads 8-bit weights; None = there is none.
    """

    def __init__(
        self, cost: IterationCost, itemsize: int, ceilings: Ceilings, drafts: IterationCost | None = None
    ) -> None:
        self._costs = (cost, drafts)
        self._itemsize = itemsize
        self._ceilings = ceilings
        self._without_cache = lru_cache(maxsize=None)(self._evaluate)

    def seconds(self, rows: Sequence[int], kv_read: Sequence[int], draft_weights: int = 0) -> float:
        """Mean of iterations of so many rows that read so many elements of the cache.

        `draft_weights`: how many of them had 8-bit weights: those of the fewest rows, since others verify, too.
        """
        iterations = sorted(zip(rows, kv_read, strict=True))
        return statistics.fmean(self._iteration(*both, nth < draft_weights) for nth, both in enumerate(iterations))

    def _iteration(self, rows: int, kv_read: int, draft_weights: bool) -> float:
        size, flops = self._without_cache(rows, draft_weights)
        size += kv_read * self._itemsize
        return max(size / self._ceilings.read_bytes_per_s, flops / self._ceilings.flops_per_s)

    def _evaluate(self, rows: int, draft_weights: bool) -> tuple[float, float]:
        cost, drafts = self._costs
        nobody_attends = Iteration(rows, rows, drafting=0, verifying=0, length=0, draft_tokens=0, budget=0)
        sizes = (drafts if draft_weights and drafts is not None else cost).evaluate(nobody_attends)
        return sum(size for size, _, _ in sizes), sum(flops for _, flops, _ in sizes)
