"""In which iterations a request verifies.

A cycle has an iteration for each pass that drafts, and one more; a request verifies in those of its phase. The paper
spreads requests over all phases, so that iterations cost alike. What an iteration costs, though, is not proportional to
the requests that verify in it: its matrix products read all weights for one row as for hundreds, and attention to a few
whole caches at once does not keep a GPU busy. So requests are spread over no more phases than the rows of an iteration
call for.
"""

import math
from collections.abc import Sequence
from random import Random

from sparsespec_compile.config import Schedule
from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.host.request import Request

GROUPED_ROWS = 320
"""Rows of an iteration that "grouped" fills before it takes one more phase. By the data sheets of data-center GPUs from
Ampere on, a 16-bit product of 150 to 300 rows computes for as long as it reads its weights. On an H200 the products of
a layer take 1.4 times as long for 256 rows as for 64, and iterations in which nobody verifies make up for that. Within
320 rows 64 requests with 15 drafts verify in four groups, in iterations of 304 rows; within 256 they took six groups,
and did not pay. With 4 query heads to a KV head, the 16 rows of each are one tile of attention, which reads a cache
once (benchmarks/LOG.md)."""


def phases_in_use(schedule: Schedule, cycle: Cycle, requests: int) -> int:
    """Over how many of the passes + 1 phases requests are spread, at least 1.

    Args:
        schedule: "grouped" takes as few as keep an iteration's rows within `GROUPED_ROWS`. With a row for each request,
            and k more for each that verifies, these are requests + k * group.
        cycle: of all requests.
        requests: that decode.
    """
    if schedule == "in_phase" or cycle.passes == 0:
        return 1
    group = _group(cycle.drafts, requests)
    if schedule != "grouped" or group < 1:
        return cycle.passes + 1
    return min(cycle.passes + 1, max(1, -(-requests // group)))


def _group(drafts: int, requests: int) -> int:
    """Requests that may verify together within `GROUPED_ROWS`, 0 or less when there is no room for any."""
    return (GROUPED_ROWS - requests) // drafts


def expected_drafts(cycle: Cycle, right: Sequence[float], schedule: Schedule, requests: int) -> float:
    """Mean drafts of a cycle: as many as it has, or with proposals what its draft iterations make.

    Each of these makes a draft. Those in which nobody verifies also keep the first proposals that are right, until
    there are as many drafts as a cycle may have; their sum is taken to be normally distributed.

    Args:
        cycle: of all requests.
        right: for as many proposals at least, probability that the first 1, 2, ... proposals are all right.
        schedule: as in `phases_in_use`.
        requests: that decode.
    """
    if not cycle.proposals:
        return float(cycle.drafts)
    all_right = right[: cycle.proposals]
    kept = sum(all_right)
    variance = sum((2 * nth + 1) * one for nth, one in enumerate(all_right)) - kept**2
    judging = cycle.passes + 1 - phases_in_use(schedule, cycle, requests)
    room, deviation = cycle.drafts - cycle.passes - judging * kept, math.sqrt(max(judging * variance, 1e-9))
    # What a normal variable falls short of the room by, where it does: E[max(room - x, 0)].
    short = room / deviation
    density = math.exp(-0.5 * short * short) / math.sqrt(2 * math.pi)
    return cycle.drafts - deviation * density - room * 0.5 * (1 + math.erf(short / math.sqrt(2)))


def most_together(schedule: Schedule, cycle: Cycle, slots: int) -> int:
    """Requests that may verify in one iteration, while some move from phase to phase, of up to `slots` requests."""
    if schedule == "in_phase":
        return slots
    spread = 2 * -(-slots // (cycle.passes + 1))
    if schedule == "grouped":
        spread = max(spread, GROUPED_ROWS // (cycle.drafts + 1))
    return min(slots, spread)


class Phases:
    """Chooses phases and keeps them balanced.

    Args:
        cycle: of all requests; there are passes + 1 phases.
        schedule: "grouped" and "balanced" join the phase with the fewest bytes to read, of the first few or of all, and
            move requests when others come or leave; "random" draws a phase, "in_phase" lets all verify together.
        most: requests that can be scored in one iteration, all of a phase among them.
    """

    def __init__(self, cycle: Cycle, schedule: Schedule, most: int) -> None:
        self._cycle = cycle
        self.schedule = schedule
        self.most = most
        self._origin = 0
        self._random = Random(0)

    @property
    def count(self) -> int:
        """Number of phases."""
        return self._cycle.passes + 1

    def at(self, iteration: int) -> int:
        """The phase whose requests verify in an iteration."""
        return (iteration - self._origin) % self.count

    def spread(self, cycle: Cycle, requests: Sequence[Request], now: int) -> None:
        """Cycles are of this kind from iteration `now` on: give every request a phase among the new ones.

        A request finishes the cycle it is in, as it was meant to if that is soon enough, else with the new number of
        passes, as long as that phase is in use and gets no more than its share. Verified early, every request at once
        would read its whole cache for few tokens. The phases in use are those in which most is due; after plain
        decoding, when all verify once for their first pillars, those that end a whole cycle later.
        """
        former, passes, self._cycle = self._cycle.passes, cycle.passes, cycle
        left, due = {}, [0] * self.count
        for request in requests:
            request.phase = None
            meant = former - request.passes
            left[request] = meant if 0 <= meant <= passes else max(passes - request.passes, 0)
            due[left[request]] += request.reach
        used = self._used(len(requests))
        first = max(
            range(self.count),
            key=lambda at: (sum(due[(at + nth) % self.count] for nth in range(used)), due[at] > 0, -at),
        )
        if former == 0:
            first = (passes + 2 - used) % self.count
        self._origin = now + first
        share, most = sum(due) / used, self._most(len(requests))
        loads, counts = [0] * self.count, [0] * self.count
        longest_first = sorted(requests, key=lambda request: -request.reach)
        for request in longest_first if self.schedule in ("grouped", "balanced") else ():
            phase = (left[request] - first) % self.count
            fits = phase < used and (loads[phase] == 0 or loads[phase] + request.reach / 2 <= share)
            if fits and counts[phase] < most:
                request.phase = phase
                loads[phase] += request.reach
                counts[phase] += 1
        for request in longest_first:
            if request.phase is None:
                request.phase = self._lightest(loads, counts, len(requests), now - 1)
                loads[request.phase] += request.reach
                counts[request.phase] += 1

    def choose(self, requests: Sequence[Request], now: int) -> int:
        """A phase for a request that starts after iteration `now`, by those that `requests` have."""
        loads, counts = self._loads(requests)
        return self._lightest(loads, counts, sum(counts) + 1, now)

    def rebalance(self, requests: Sequence[Request]) -> bool:
        """Move one request from the heaviest phase to the lightest, if that lowers the heaviest load by enough.

        A request that moves has one shorter cycle. So only a gain of a thirtieth of the heaviest load is worth it, or
        one phase less: as requests leave, fewer are in use, and the others empty one request after the other; as they
        come, phases may hold fewer. Call it when a request has joined or left, and in each iteration from then on until
        nothing moves.

        Returns:
            Whether a request has moved.
        """
        if self.schedule not in ("grouped", "balanced") or self.count == 1:
            return False
        loads, counts = self._loads(requests)
        used, most = range(self._used(sum(counts))), self._most(sum(counts))
        light = min((phase for phase in used if counts[phase] < most), key=loads.__getitem__, default=None)
        if light is None:
            return False
        left_over = [request for request in requests if request.phase is not None and request.phase not in used]
        if left_over:
            max(left_over, key=lambda request: request.phase or 0).phase = light
            return True
        crowded = max(used, key=counts.__getitem__)
        if counts[crowded] > most:
            min((request for request in requests if request.phase == crowded), key=lambda r: r.reach).phase = light
            return True
        heavy = max(used, key=loads.__getitem__)
        gap = loads[heavy] - loads[light]
        movable = [request for request in requests if request.phase == heavy]
        if not movable:
            return False
        best = min(movable, key=lambda request: abs(gap - 2 * request.reach))
        lowered = gap - max(best.reach, gap - best.reach)
        if lowered * 30 < loads[heavy]:
            return False
        best.phase = light
        return True

    def _lightest(self, loads: list[int], counts: list[int], requests: int, now: int) -> int:
        if self.schedule == "in_phase":
            return 0
        used = range(self._used(requests))
        # With no room in the phases in use, any other is better than to wait.
        for phases, most in ((used, self._most(requests)), (used, self.most), (range(self.count), self.most)):
            open_phases = [phase for phase in phases if counts[phase] < most]
            if open_phases:
                break
        open_phases = open_phases or list(used)
        if self.schedule == "random":
            return self._random.choice(open_phases)
        # Break ties in favour of the longest first cycle.
        return min(open_phases, key=lambda phase: (loads[phase], -((phase - self.at(now) - 1) % self.count)))

    def _most(self, requests: int) -> int:
        """Most requests of a phase, of all of them: unequal lengths must not make a phase exceed the rows."""
        if self.schedule != "grouped" or self.count == 1:
            return self.most
        return min(self.most, max(_group(self._cycle.drafts, requests), -(-requests // self.count)))

    def _used(self, requests: int) -> int:
        return phases_in_use(self.schedule, self._cycle, requests)

    def _loads(self, requests: Sequence[Request]) -> tuple[list[int], list[int]]:
        """Cached tokens and requests of each phase."""
        loads, counts = [0] * self.count, [0] * self.count
        for request in requests:
            if request.phase is not None:
                loads[request.phase] += request.reach
                counts[request.phase] += 1
        return loads, counts
