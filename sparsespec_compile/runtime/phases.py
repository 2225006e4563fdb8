"""In which iterations a request verifies.

A cycle has k + 1 iterations, and a request verifies in those of its phase. A verification reads the whole cache, a
draft a twentieth of it: iterations cost alike when the lengths of each phase's requests add up alike (paper, unified
batch scheduling, which counts requests instead).
"""

from collections.abc import Sequence
from random import Random

from sparsespec_compile.config import Schedule
from sparsespec_compile.runtime.request import Request


class Phases:
    """Chooses phases and keeps them balanced.

    Args:
        draft_tokens: k; there are k + 1 phases.
        schedule: "balanced" joins the phase with the fewest bytes to read and moves requests when others leave;
            "random" draws a phase, "in_phase" lets all verify together: both for comparison.
        most: requests that can be scored in one iteration, all of a phase among them.
    """

    def __init__(self, draft_tokens: int, schedule: Schedule, most: int) -> None:
        self.count = draft_tokens + 1
        self.schedule = schedule
        self.most = most
        self._random = Random(0)

    def spread(self, draft_tokens: int, requests: Sequence[Request], now: int) -> None:
        """Cycles have `draft_tokens` drafts from iteration `now` on: give every request a phase among the new ones.

        A request finishes the cycle it is in, as it was meant to if that is soon enough, else with the new number of
        drafts, as long as that phase gets no more than its share. Verified early, every request at once would read its
        whole cache for few tokens.
        """
        former, self.count = self.count - 1, draft_tokens + 1
        for request in requests:
            request.phase = None
        share = sum(request.reach for request in requests) / self.count
        loads, counts = [0] * self.count, [0] * self.count
        longest_first = sorted(requests, key=lambda request: -request.reach)
        for request in longest_first if self.schedule == "balanced" else ():
            left = former - request.drafted
            due = (now + (left if 0 <= left <= draft_tokens else max(draft_tokens - request.drafted, 0))) % self.count
            fits = loads[due] == 0 or loads[due] + request.reach / 2 <= share
            if fits and counts[due] < self.most:
                request.phase = due
                loads[due] += request.reach
                counts[due] += 1
        for request in longest_first:
            if request.phase is None:
                request.phase = self.choose(requests, now - 1)

    def choose(self, requests: Sequence[Request], now: int) -> int:
        """A phase for a request that starts after iteration `now`, by those that `requests` have."""
        if self.schedule == "in_phase":
            return 0
        loads, counts = self._loads(requests)
        open_phases = [phase for phase in range(self.count) if counts[phase] < self.most] or list(range(self.count))
        if self.schedule == "random":
            return self._random.choice(open_phases)
        # Among equals the one that leaves the longest first cycle.
        return min(open_phases, key=lambda phase: (loads[phase], -((phase - now - 1) % self.count)))

    def rebalance(self, requests: Sequence[Request]) -> None:
        """Move one request from the heaviest phase to the lightest, if that lowers the heaviest load by enough.

        A request that moves has one shorter cycle. So only a gain of a tenth of the heaviest load is worth it.
        """
        if self.schedule != "balanced" or self.count == 1:
            return
        loads, counts = self._loads(requests)
        heavy = max(range(self.count), key=loads.__getitem__)
        light = min(range(self.count), key=loads.__getitem__)
        if counts[light] >= self.most:
            return
        gap = loads[heavy] - loads[light]
        movable = [request for request in requests if request.phase == heavy]
        if not movable:
            return
        best = min(movable, key=lambda request: abs(gap - 2 * request.reach))
        lowered = gap - max(best.reach, gap - best.reach)
        if lowered * 10 >= loads[heavy]:
            best.phase = light

    def _loads(self, requests: Sequence[Request]) -> tuple[list[int], list[int]]:
        """Cached tokens and requests of each phase."""
        loads, counts = [0] * self.count, [0] * self.count
        for request in requests:
            if request.phase is not None:
                loads[request.phase] += request.reach
                counts[request.phase] += 1
        return loads, counts
