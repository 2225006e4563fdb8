"""How many drafts a cycle has, chosen while requests run.

Speculation pays where reading the cache is what takes long, and costs where many requests fill the arithmetic units
anyway. Both change as a batch grows, drains and lengthens. So the number of drafts follows from what is predicted for
an iteration, corrected by how long iterations have taken, and from how many drafts have been accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

IterationTime = Callable[[int, float, int], float]
"""(drafts of a cycle, mean cached tokens of a request, requests) -> predicted seconds of a mean iteration."""

_FIRST_GUESS = 0.95
"""Probability that a draft is right, before any was verified: high, so that speculation is tried where it may pay."""

_ACCEPTANCE_RATE = 0.005
_FORGETTING = 1e-4
"""Weight of a verified draft, and of the first guess in each choice: what was not tried for long is tried again."""

_TIME_RATE = 0.1
_OUTLIER = 3.0
"""Weight of an iteration's time in its correction; times beyond so many times the expected one are left out: they hold
a compilation, a capture or a pause of the caller's."""

_GAIN_TO_CHANGE = 1.015
"""A change costs some requests a short cycle, so it must promise this much."""

_SETTLING_CYCLES = 2
"""After a change, so many cycles' times are left out: phases and cycles under way still are of the former number."""

_WORTH_A_TRY = 1.5
"""A neighbour of the present choice that was never in use is tried once unless it looks slower by this factor: one
correction for all would miss that rows or reads alone cost more than predicted."""


@dataclass(frozen=True)
class _Load:
    length: float
    requests: int


class DraftLength:
    """Chooses the number of drafts of a cycle.

    Args:
        most: drafts at most.
        iteration_time: the prediction.

    Attributes:
        current: the present choice, 0 = plain decoding.
    """

    def __init__(self, most: int, iteration_time: IterationTime) -> None:
        self.current = most
        self._most = most
        self._predicted = iteration_time
        self._right = [_FIRST_GUESS] * most
        self._correction: dict[int, tuple[float, int]] = {}
        self._unsettled = 0

    def verified(self, drafts: int, accepted: int) -> None:
        """Take note of a verification: of `drafts` drafts the first `accepted` were right."""
        for nth in range(min(accepted + 1, drafts)):
            hit = float(nth < accepted)
            self._right[nth] += _ACCEPTANCE_RATE * (hit - self._right[nth])
        for nth in range(drafts, self._most):  # later drafts were not tried: the last tried one is the best guess
            if drafts:
                self._right[nth] = min(self._right[nth], self._right[drafts - 1])

    def took(self, seconds: float, lengths: list[int]) -> None:
        """Take note of the time of an iteration in which requests of these cached lengths decoded."""
        if not lengths:
            return
        if self._unsettled:
            self._unsettled -= 1
            return
        load = _load(lengths)
        ratio = seconds / self._predicted(self.current, load.length, load.requests)
        mean, count = self._correction.get(self.current, (ratio, 0))
        if ratio * _OUTLIER < mean:  # the first one was the outlier
            self._correction[self.current] = (ratio, 1)
        elif ratio < _OUTLIER * mean:
            rate = max(_TIME_RATE, 1 / (count + 1))
            self._correction[self.current] = (mean + rate * (ratio - mean), count + 1)

    def choose(self, lengths: list[int]) -> int:
        """The number of drafts for requests of these cached lengths; keeps the present one unless another is better."""
        if not lengths or self._unsettled:
            return self.current
        self._right = [right + _FORGETTING * (_FIRST_GUESS - right) for right in self._right]
        load = _load(lengths)
        speeds = [self._speed(drafts, load) for drafts in range(self._most + 1)]
        best = max(range(self._most + 1), key=speeds.__getitem__)
        if speeds[best] > _GAIN_TO_CHANGE * speeds[self.current]:
            self._change(best)
            return self.current
        for neighbour in (self.current - 1, self.current + 1):
            untried = 0 <= neighbour <= self._most and neighbour not in self._correction
            if untried and self._correction and speeds[neighbour] * _WORTH_A_TRY > speeds[self.current]:
                self._change(neighbour)
                break
        return self.current

    def _change(self, drafts: int) -> None:
        self.current = drafts
        self._unsettled = _SETTLING_CYCLES * (drafts + 1)

    def _speed(self, drafts: int, load: _Load) -> float:
        """Predicted tokens a second."""
        accepted, chain = 0.0, 1.0
        for right in self._right[:drafts]:
            chain *= right
            accepted += chain
        seconds = self._predicted(drafts, load.length, load.requests) * self._correct(drafts)
        return load.requests * (accepted + 1) / (drafts + 1) / seconds

    def _correct(self, drafts: int) -> float:
        """Measured over predicted, of the nearest number of drafts that was in use; 1 before any was."""
        if not self._correction:
            return 1.0
        return self._correction[min(self._correction, key=lambda known: abs(known - drafts))][0]


def _load(lengths: list[int]) -> _Load:
    return _Load(sum(lengths) / len(lengths), len(lengths))
