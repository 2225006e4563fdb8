"""How many drafts a cycle has, chosen while requests run.

Speculation pays where reading the cache is what takes long, and costs where many requests fill the arithmetic units
anyway. Both change as a batch grows, drains and lengthens. So the number of drafts follows from what is predicted for
an iteration, corrected by how long iterations have taken, and from how many drafts have been accepted.
"""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

IterationTime = Callable[[int, float, int], float]
"""(drafts of a cycle, mean cached tokens of a request, requests) -> predicted seconds of a mean iteration."""

_FIRST_GUESS = 0.95
"""Probability that a draft is right, before any was verified: high, so that speculation is tried where it may pay."""

_GUESS_VERIFIED = 4.0
"""Weight of a guess, in verified drafts. What is known of a draft of a cycle is the guess for the one behind it."""

_KEPT_VERIFIED, _KEPT_UNUSED = 0.995, 0.9998
"""What a verified draft, and each choice, leaves of the weight of earlier ones: 200 of them count, and what was not
tried for long is tried again."""

_KEPT = 0.995
"""What each iteration leaves of the weight of earlier ones in the correction: some 200 iterations count."""

_PRIOR_ITERATIONS = 1.0
"""Weight of the prediction as it is, in iterations."""

_OUTLIER = 2.0
_RECENT = 127
_FEWEST = 3
"""Times of a cycle beyond so many times the usual are left out: they hold a compilation, a capture or a pause of the
caller's. Usual is the median of the recent ones, relative to what was predicted, of plain decoding or of speculation;
until there are a few, what was predicted."""

_PARTS = 4
"""Of an iteration's time that are corrected, see `_parts`."""

_MOST_CORRECTED = 5.0
"""An iteration is never taken to be faster than predicted by more than this."""

_WORTH_A_TRIAL = 0.95
_TRIAL = 8
"""Predictions of plain decoding and of speculation err differently, and what was measured of one says little of the
other. One that has not run so many iterations, and promises at least this share of the present speed, is tried."""

_REMEMBERED = 256
"""Predictions that are kept; one takes some 0.1 ms."""

_GAIN_TO_CHANGE = 1.005
"""A change costs some requests a short cycle, so it must promise this much."""

_UNDER_WAY = 2
"""After a change, times are left out for a cycle and for the iterations that were under way: phases and cycles are
still of the former number."""


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
        # What is asked for most often, iterations that read no cache, depends on few numbers.
        self._predicted = lru_cache(_REMEMBERED)(iteration_time)
        self._hits = np.zeros(most)
        self._tries = np.zeros(most)
        self._products = np.zeros((_PARTS, _PARTS))
        self._errors = np.zeros(_PARTS)
        self._recent: dict[bool, deque[float]] = {kind: deque(maxlen=_RECENT) for kind in (False, True)}
        self._cycle: list[float] = []
        self._unsettled = 0
        self._measured = {False: 0, True: 0}

    def verified(self, drafts: int, accepted: int) -> None:
        """Take note of a verification: of `drafts` drafts the first `accepted` were right."""
        tried = min(accepted + 1, drafts)
        self._hits[:tried] *= _KEPT_VERIFIED
        self._tries[:tried] *= _KEPT_VERIFIED
        self._hits[:accepted] += 1.0
        self._tries[:tried] += 1.0

    def began(self) -> None:
        """Other requests: what was measured of a cycle under way is of no use."""
        self._cycle.clear()

    def took(self, seconds: float, lengths: list[int]) -> None:
        """Take note of the time of an iteration in which requests of these cached lengths decoded.

        Iterations of a cycle differ by how many requests verify; their mean is what was predicted.
        """
        if not lengths:
            return
        if self._unsettled:
            self._unsettled -= 1
            return
        self._cycle.append(seconds)
        iterations = len(self._cycle)
        if iterations <= self.current:
            return
        self._measured[self.current > 0] += iterations
        load = _load(lengths)
        predicted = self._predicted(self.current, load.length, load.requests)
        ratio = statistics.mean(self._cycle) / predicted
        self._cycle.clear()
        recent = self._recent[self.current > 0]
        recent.append(ratio)
        if ratio > _OUTLIER * (statistics.median(recent) if len(recent) >= _FEWEST else 1.0):
            return
        parts = self._parts(self.current, load) / predicted
        kept = _KEPT**iterations
        self._products = kept * self._products + iterations * np.outer(parts, parts)
        self._errors = kept * self._errors + iterations * parts * (ratio - 1.0)

    def choose(self, lengths: list[int]) -> int:
        """The number of drafts for requests of these cached lengths; keeps the present one unless another is better."""
        if not lengths:
            return self.current
        self._hits *= _KEPT_UNUSED
        self._tries *= _KEPT_UNUSED
        load = _load(lengths)
        correction = np.linalg.solve(self._products + _PRIOR_ITERATIONS * np.eye(_PARTS), self._errors)
        speeds = [self._speed(drafts, load, correction) for drafts in range(self._most + 1)]
        best = max(range(self._most + 1), key=speeds.__getitem__)
        speculates = self.current > 0
        measured, of_the_other = self._measured[speculates], self._measured[not speculates]
        other = max(range(1) if speculates else range(1, self._most + 1), key=speeds.__getitem__)
        if measured < _TRIAL <= of_the_other:
            return self.current
        if of_the_other < _TRIAL <= measured and speeds[other] > _WORTH_A_TRIAL * speeds[self.current]:
            self._change(other)
        elif speeds[best] > _GAIN_TO_CHANGE * speeds[self.current]:
            self._change(best)
        return self.current

    def _change(self, drafts: int) -> None:
        self.current = drafts
        self._cycle.clear()
        self._unsettled = drafts + 1 + _UNDER_WAY

    def _speed(self, drafts: int, load: _Load, correction: np.ndarray) -> float:
        """Predicted tokens a second."""
        accepted, chain, right = 0.0, 1.0, _FIRST_GUESS
        for hits, tries in zip(self._hits[:drafts], self._tries[:drafts], strict=True):
            right = (hits + _GUESS_VERIFIED * right) / (tries + _GUESS_VERIFIED)
            chain *= right
            accepted += chain
        predicted = self._predicted(drafts, load.length, load.requests)
        corrected = predicted + float(self._parts(drafts, load) @ correction)
        seconds = max(corrected, predicted / _MOST_CORRECTED)
        return load.requests * (accepted + 1) / (drafts + 1) / seconds

    def _parts(self, drafts: int, load: _Load) -> np.ndarray:
        """What may take more or less than predicted [4], in seconds, so that an error seen with one number of drafts
        and at one length tells about others: an iteration that reads no cache, the rows that drafts add to it in
        verifications, and reading the cache, in plain decoding or not, which other tiles of a kernel do.
        """
        plain = self._predicted(0, 0.0, load.requests)
        without_cache = self._predicted(drafts, 0.0, load.requests)
        reading = self._predicted(drafts, load.length, load.requests) - without_cache
        speculates = float(drafts > 0)
        return np.array([plain, plain * drafts / (drafts + 1), reading * (1 - speculates), reading * speculates])


def _load(lengths: list[int]) -> _Load:
    return _Load(sum(lengths) / len(lengths), len(lengths))
