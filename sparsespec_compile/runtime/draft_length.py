"""How many drafts a cycle has, chosen while requests run.

Speculation pays where reading the cache is what takes long, and costs where many requests fill the arithmetic units
anyway. Both change as a batch grows, drains and lengthens. So the number of drafts follows from what is predicted for
an iteration, corrected by how long iterations have taken, and from how many drafts have been accepted.
"""

import statistics
from collections import deque

import numpy as np

from sparsespec_compile.runtime.iteration_times import IterationTime, IterationTimes, Load

_FIRST_GUESS = 0.95
"""Probability that a draft is right, before any was verified: high, so that speculation is tried where it may pay."""

_GUESS_VERIFIED = 4.0
"""Weight of a guess, in verified drafts. What is known of all drafts is the guess for the first one of a cycle, as with
few requests it is soon known well, and what is known of a draft is the guess for the one behind it."""

_KEPT_VERIFIED, _KEPT_UNUSED = 0.995, 0.9998
"""What a verified draft, and each choice, leaves of the weight of earlier ones: 200 of them count, and what was not
tried for long is tried again."""

_MEASURED = 8
"""Iterations that are measured at a time at least, in whole cycles."""

_OUTLIER = 2.0
_RECENT = 127
_FEWEST = 3
"""Times beyond so many times the usual are left out: they hold a compilation, a capture or a pause of the caller's.
Usual is the median of the recent ones, relative to what was predicted, of plain decoding or of speculation; until there
are a few, what was predicted."""

_CURIOSITY = 0.5
"""Standard deviations of its time by which a number of drafts may be faster than estimated, for it to be tried."""

_GAIN_TO_CHANGE = 1.005
"""A change costs some requests a short cycle, so it must promise this much."""

_SAME_LENGTH = 32.0
"""Tokens to which mean lengths are rounded."""

_PATIENCE = 4
"""Choices for which a new number of drafts is kept until it was measured; where prompts come all the time, it may never
be."""

_UNDER_WAY = 2
"""After a change, times are left out for a cycle and for the iterations that were under way: phases and cycles are
still of the former number."""


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
        self._times = IterationTimes(iteration_time)
        self._hits = np.zeros(most)
        self._tries = np.zeros(most)
        self._recent: dict[bool, deque[float]] = {kind: deque(maxlen=_RECENT) for kind in (False, True)}
        self._cycles: list[tuple[float, Load]] = []
        self._unsettled = 0
        self._unjudged = _PATIENCE  # choices that the present number is kept for until it was measured

    def verified(self, drafts: int, accepted: int) -> None:
        """Take note of a verification: of `drafts` drafts the first `accepted` were right."""
        tried = min(accepted + 1, drafts)
        self._hits[:tried] *= _KEPT_VERIFIED
        self._tries[:tried] *= _KEPT_VERIFIED
        self._hits[:accepted] += 1.0
        self._tries[:tried] += 1.0

    def began(self) -> None:
        """Other requests: what was measured of a cycle under way is of no use."""
        self._cycles.clear()

    def took(self, seconds: float, lengths: list[int]) -> None:
        """Take note of the time of an iteration in which requests of these cached lengths decoded.

        Iterations of a cycle differ by how many requests verify; their mean is what was predicted.
        """
        if not lengths:
            return
        if self._unsettled:
            self._unsettled -= 1
            return
        self._cycles.append((seconds, _load(lengths)))
        iterations = len(self._cycles)
        if iterations < _MEASURED or iterations % (self.current + 1):
            return
        mean = statistics.mean(seconds for seconds, _ in self._cycles)
        load = self._cycles[iterations // 2][1]
        self._cycles.clear()
        self._unjudged = 0
        ratio = mean / self._times.predicted(self.current, load.length, load.requests)
        recent = self._recent[self.current > 0]
        recent.append(ratio)
        if ratio <= _OUTLIER * (statistics.median(recent) if len(recent) >= _FEWEST else 1.0):
            self._times.measured(self.current, load, mean)

    def choose(self, lengths: list[int]) -> int:
        """The number of drafts for requests of these cached lengths; keeps the present one unless another is better.

        The one that may be the fastest is tried: an optimist finds out (upper confidence bounds, Auer 2002).
        """
        if not lengths:
            return self.current
        self._hits *= _KEPT_UNUSED
        self._tries *= _KEPT_UNUSED
        seconds, deviation = self._times.estimate(self._most, _load(lengths))
        may_be = self._tokens() / seconds * np.exp(_CURIOSITY * deviation)
        best = int(np.argmax(may_be))
        if self._unjudged:
            self._unjudged -= 1
        elif may_be[best] > _GAIN_TO_CHANGE * may_be[self.current]:
            self.current = best
            self._cycles.clear()
            self._unsettled = best + 1 + _UNDER_WAY
            self._unjudged = _PATIENCE
        return self.current

    def _tokens(self) -> np.ndarray:
        """Expected tokens of a request in an iteration of 0, 1, ... drafts [most + 1]."""
        tokens, chain = [1.0], 1.0
        right = (self._hits.sum() + _GUESS_VERIFIED * _FIRST_GUESS) / (self._tries.sum() + _GUESS_VERIFIED)
        for hits, tries in zip(self._hits, self._tries, strict=True):
            right = (hits + _GUESS_VERIFIED * right) / (tries + _GUESS_VERIFIED)
            chain *= right
            tokens.append(tokens[-1] + chain)
        return np.array(tokens) / np.arange(1, self._most + 2)


def _load(lengths: list[int]) -> Load:
    """Lengths that are much the same share a prediction, which takes some 0.1 ms."""
    return Load(round(statistics.fmean(lengths) / _SAME_LENGTH) * _SAME_LENGTH, len(lengths))
