"""How long an iteration takes, by what was predicted and what was measured.

A prediction from bytes and FLOPs is off by a factor, where something else bounds a device, and by some percent besides:
by much the same for numbers of drafts, lengths and batches that are much the same, and by who knows what for others. So
the logarithm of measured over predicted time is taken for a Gaussian process over the three, on top of an unknown
constant (Rasmussen and Williams 2006, chapter 2): what was measured counts in full where it was measured, and fades
with the distance from there, to the prediction times what all measurements have in common.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

IterationTime = Callable[[int, float, int], float]
"""(drafts of a cycle, mean cached tokens of a request, requests) -> predicted seconds of a mean iteration."""

_FACTOR = 0.5
"""The mean error at which the device as a whole is as likely to be off by so much. Smaller ones are more likely to
belong to what was measured, larger ones to everything: the standard deviation of the common factor's logarithm is
taken to be the square of the mean logarithm measured over this."""

_SHARED = 0.9
"""Correlation of that factor in plain decoding and in speculation: what is far off may be only one of them."""

_ERROR = 0.08
"""Standard deviation of the logarithm of actual over predicted time, but for the factor: on an H200, iterations of 0 to
12 drafts, 1 to 128 requests and 64 to 8,192 tokens took 0.92 to 1.18 times what was predicted
(benchmarks/results/h200-iteration-times.json)."""

_NOISE = 0.01
"""That of one measurement."""

_OCTAVES = 2.0
"""Factors of two in drafts + 1, in length or in requests, over which what is known of an error falls to 1 / e."""

_PLAIN = -4.0
"""Where plain decoding stands among logarithms of drafts + 1: apart, as no scores are given out and none are drafts."""

_SHORT = 512.0
"""Added to lengths: below, the cache hardly counts."""

_KEPT = 64
"""Measurements that are kept. What was tried before them is tried again if it may pay."""

_REMEMBERED = 256
"""Predictions that are kept; one takes some 0.1 ms."""


@dataclass(frozen=True)
class Load:
    """Requests that decode.

    Attributes:
        length: mean cached tokens of a request.
        requests: how many they are.
    """

    length: float
    requests: int


class IterationTimes:
    """Estimates times of iterations.

    Args:
        predicted: the prediction.
    """

    def __init__(self, predicted: IterationTime) -> None:
        self.predicted = lru_cache(_REMEMBERED)(predicted)
        self._places: deque[np.ndarray] = deque(maxlen=_KEPT)
        self._errors: deque[float] = deque(maxlen=_KEPT)

    def measured(self, drafts: int, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""
        self._places.append(_place(drafts, load))
        self._errors.append(math.log(seconds / self.predicted(drafts, load.length, load.requests)))

    def estimate(self, most: int, load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a mean iteration of 0 to `most` drafts [most + 1], and the standard deviation of their logarithm
        [most + 1]."""
        asked = np.array([_place(drafts, load) for drafts in range(most + 1)])
        predicted = np.array([self.predicted(drafts, load.length, load.requests) for drafts in range(most + 1)])
        if not self._places:
            return predicted, np.full(most + 1, _ERROR)
        places = np.array(self._places)
        factor = (statistics.fmean(self._errors) ** 2 / _FACTOR) ** 2
        among = _likeness(places, places, factor) + np.eye(len(places)) * _NOISE**2
        between = _likeness(asked, places, factor)
        solved = np.linalg.solve(among, between.T)
        error = np.array(self._errors) @ solved
        variance = factor + _ERROR**2 - np.einsum("ij,ji->i", between, solved)
        return predicted * np.exp(error), np.sqrt(np.maximum(variance, 0.0))


def _place(drafts: int, load: Load) -> np.ndarray:
    cycle = math.log2(drafts + 1) if drafts else _PLAIN
    return np.array([cycle, math.log2(load.length + _SHORT), math.log2(load.requests)])


def _likeness(one: np.ndarray, other: np.ndarray, factor: float) -> np.ndarray:
    """Covariance of errors at places [n, 3] and [m, 3], with the variance of the device's factor: [n, m]."""
    distance = np.abs(one[:, None, :] - other[None, :, :]).sum(-1)
    alike = (one[:, None, 0] == _PLAIN) == (other[None, :, 0] == _PLAIN)
    return factor * np.where(alike, 1.0, _SHARED) + _ERROR**2 * np.exp(-distance / _OCTAVES)
