"""How long an iteration takes, from predictions corrected by measurements, or from measurements alone.

Both ways are Gaussian processes (Rasmussen and Williams 2006, chapter 2): what was measured counts in full where it was
measured, and fades with the distance from there, in kinds of cycles, lengths and numbers of requests.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sparsespec_compile.runtime.device.drafters import Cycle, NoDrafter

IterationTime = Callable[[Cycle, float, int], float]
"""(cycle, mean cached tokens of a request, requests) -> predicted seconds of a mean iteration."""

_OCTAVES = 2.0
"""Factors of two in drafts + 1, in judged rows, in length or in requests, over which what is known falls to 1 / e."""

_APART = 4.0
"""The same distance between drafters, plain decoding among them: other rows, other kernels, scores or none."""

_SHORT = 512.0
"""Added to lengths: below, the cache hardly counts."""


@dataclass(frozen=True)
class Load:
    """Requests that decode.

    Attributes:
        length: mean cached tokens of a request.
        requests: how many they are.
    """

    length: float
    requests: int


class IterationTimes(ABC):
    """Estimates mean times of iterations."""

    @abstractmethod
    def measured(self, cycle: Cycle, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""

    @abstractmethod
    def expected(self, cycle: Cycle, load: Load) -> float | None:
        """The expected seconds, to tell outliers by; None where nothing is known."""

    @abstractmethod
    def estimate(self, cycles: Sequence[Cycle], load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a mean iteration of each cycle [n], up to a common factor, and the standard deviation of their
        logarithm [n]."""


class PredictedTimes(IterationTimes):
    """Corrects a prediction by measurements.

    A prediction from bytes and FLOPs is off by a factor, where something else bounds a device, and by some percent
    besides: by similar factors for similar cycles, lengths and batches, and by unknown factors for others.
    So the logarithm of measured over predicted time is taken for a Gaussian process over them, on top of an unknown
    constant.

    Args:
        predicted: the prediction.
    """

    FACTOR = 0.5
    """The mean error at which the device as a whole is as likely to be off by so much. Smaller ones are more likely to
    belong to what was measured, larger ones to everything: the standard deviation of the common factor's logarithm is
    taken to be the square of the mean logarithm measured over this."""

    SHARED = 0.9
    """Correlation of that factor between drafters: what is far off may be only one of them."""

    ERROR = 0.08
    """Standard deviation of the logarithm of actual over predicted time, but for the factor. For the fixed settings of
    benchmarks/results/h200-throughput.json it is 0.04; other devices and models are known less well."""

    NOISE = 0.01
    """That of one measurement."""

    AVERAGED = 4
    """Measurements of one cycle at much the same load that are averaged, in effect."""

    KEPT = 64
    """Cycles and loads whose measurements are kept. What was tried before them is tried again if it may pay."""

    REMEMBERED = 256
    """Predictions that are kept; one takes some 0.1 ms."""

    def __init__(self, predicted: IterationTime) -> None:
        self._predicted = lru_cache(self.REMEMBERED)(predicted)
        self._known: dict[tuple[Cycle, int, int], tuple[_Place, float, int]] = {}  # with error and count

    def measured(self, cycle: Cycle, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""
        key, error = _key(cycle, load), math.log(seconds / self.expected(cycle, load))
        _, mean, count = self._known.pop(key, (None, error, 0))
        count = min(count + 1, self.AVERAGED)
        self._known[key] = _place(cycle, load), mean + (error - mean) / count, count
        if len(self._known) > self.KEPT:
            del self._known[next(iter(self._known))]

    def expected(self, cycle: Cycle, load: Load) -> float:
        """The prediction."""
        return self._predicted(cycle, load.length, load.requests)

    def estimate(self, cycles: Sequence[Cycle], load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a mean iteration of each cycle [n], and the standard deviation of their logarithm [n]."""
        predicted = np.array([self.expected(cycle, load) for cycle in cycles])
        if not self._known:
            return predicted, np.full(len(cycles), self.ERROR)
        places, errors, counts = zip(*self._known.values(), strict=True)
        factor = (statistics.fmean(errors) ** 2 / self.FACTOR) ** 2

        def likeness(one: _Places, other: _Places) -> np.ndarray:
            shared = factor * np.where(one.same_drafter(other), 1.0, self.SHARED)
            return shared + self.ERROR**2 * np.exp(-one.distance(other) / _OCTAVES)

        asked, known = _Places([_place(cycle, load) for cycle in cycles]), _Places(places)
        noise = self.NOISE**2 / np.array(counts)
        error, deviation = _regress(likeness, known, np.array(errors), noise, asked, factor + self.ERROR**2)
        return predicted * np.exp(error), deviation


class MeasuredTimes(IterationTimes):
    """Estimates from measurements alone, with a prior that drafts may save the reads that they leave out.

    The logarithm of seconds is what all cycles have in common at a load, of which nothing is known beforehand, plus,
    for cycles with drafts, what verifying adds, what draft iterations save and what rows cost where all verify. What is
    saved is in proportion to the share of a cycle that drafts, so that one number of drafts tells of all others, and at
    most in proportion to the positions that are left out, so that nothing is tried where the cache is short. How much
    it is, must be measured: nothing where a pass takes as long whatever it reads, as that of a small model on a CPU.
    The device's own speed drifts, as others use it too: cycles are compared by what was measured at much the same time.
    """

    COMMON = 2.0
    """Standard deviation of the logarithm of a load's seconds around that of all, of which nothing is known."""

    VERIFYING = 0.05
    """Expected addition to the logarithm where requests verify drafts, and its standard deviation."""

    SAVING = 0.5
    """Standard deviation of what draft iterations that read nothing would take off the logarithm, or add to it."""

    ROWS = 0.2
    """Expected addition to the logarithm for each factor of two in the rows of an iteration without draft iterations,
    and its standard deviation: about 0 on a GPU, 0.5 on a CPU."""

    ERROR = 0.05
    """Standard deviation of everything else."""

    NOISE = 0.05
    """Standard deviation of one measurement."""

    DRIFT, DRIFTING = 0.25, 8.0
    """Standard deviation of the device's speed as others use it too, and measurements over which it changes."""

    LASTING = 2048.0
    """Measurements over which what drafts save is forgotten, for it to be tried again."""

    AVERAGED = 4
    """Measurements at one place that are averaged, in effect."""

    NOTICED = 0.02
    """Change of what is known, in the logarithm, that makes estimates anew."""

    STRIDE = 2
    """How many times as many drafts are tried as were before."""

    PLACES = 64
    """Places that are kept. What was tried before them is tried again if it may pay."""

    def __init__(self) -> None:
        self._known: dict[tuple[Cycle, int, int], tuple[_Place, float, int]] = {}
        self._now = 0
        self._estimates: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # an estimate takes a millisecond

    def measured(self, cycle: Cycle, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""
        key = _key(cycle, load)
        self._now += 1
        _, mean, count = self._known.pop(key, (None, math.log(seconds), 0))
        count = min(count + 1, self.AVERAGED)
        change = (math.log(seconds) - mean) / count
        self._known[key] = (_place(cycle, load)._replace(time=self._now), mean + change, count)
        if len(self._known) > self.PLACES:
            del self._known[next(iter(self._known))]
        if count < self.AVERAGED or abs(change) > self.NOTICED:
            self._estimates.clear()

    def expected(self, cycle: Cycle, load: Load) -> float | None:
        """What was measured of this cycle at much the same load; None where nothing was."""
        known = self._known.get(_key(cycle, load))
        return None if known is None else math.exp(known[1])

    def estimate(self, cycles: Sequence[Cycle], load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a mean iteration of each cycle [n], up to a common factor, and the standard deviation of their
        logarithm [n].

        The deviation is 0 where nothing shall be tried to find out: before anything was measured, and for more than
        `STRIDE` times as many drafts as were, whose trial would take long.
        """
        _, length, requests = _key(cycles[0], load)
        if (length, requests) not in self._estimates:
            self._estimates[length, requests] = self._new_estimate(cycles, load)
        return self._estimates[length, requests]

    def _new_estimate(self, cycles: Sequence[Cycle], load: Load) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = self._posterior(cycles, load)
        tried = {cycle.drafter: 1 for cycle in cycles}
        for cycle, *_ in self._known:
            tried[cycle.drafter] = max(cycle.drafts, tried.get(cycle.drafter, 1))
        within = [bool(self._known) and cycle.drafts <= self.STRIDE * tried[cycle.drafter] for cycle in cycles]
        return np.exp(mean), deviation * within

    def _posterior(self, cycles: Sequence[Cycle], load: Load) -> tuple[np.ndarray, np.ndarray]:
        asked = _Places([_place(cycle, load)._replace(time=self._now) for cycle in cycles])
        prior = self._variance(asked)
        if not self._known:
            return self._expected_above(asked), np.sqrt(prior)
        places, seconds, counts = zip(*self._known.values(), strict=True)
        known, level = _Places(places), statistics.fmean(seconds)
        noise = self.NOISE**2 / np.array(counts)
        above = np.array(seconds) - level - self._expected_above(known)
        mean, deviation = _regress(self._likeness, known, above, noise, asked, prior)
        return level + self._expected_above(asked) + mean, deviation

    def _expected_above(self, places: "_Places") -> np.ndarray:
        """Logarithm of seconds over plain decoding's, before anything is known."""
        return self.VERIFYING * places.drafting + self.ROWS * places.rows

    def _likeness(self, one: "_Places", other: "_Places") -> np.ndarray:
        near = np.exp(-0.5 * (one.load_distance(other) / _OCTAVES) ** 2)  # times change smoothly with the load
        alike = one.same_drafter(other) * np.outer(one.drafting, other.drafting)
        spent = self.VERIFYING**2 + self.SAVING**2 * np.outer(one.saving, other.saving)
        spent = spent + self.ROWS**2 * np.outer(one.rows, other.rows)
        apart = np.abs(one.time[:, None] - other.time[None])
        drift = self.DRIFT**2 * np.exp(-apart / self.DRIFTING)
        spent = spent * np.exp(-apart / self.LASTING)
        error = self.ERROR**2 * np.exp(-one.distance(other) / _OCTAVES)
        return (self.COMMON**2 + alike * spent) * near + drift + error

    def _variance(self, places: "_Places") -> np.ndarray:
        spent = self.VERIFYING**2 + self.SAVING**2 * places.saving**2 + self.ROWS**2 * places.rows**2
        spent = places.drafting * spent
        return self.COMMON**2 + spent + self.DRIFT**2 + self.ERROR**2


def _key(cycle: Cycle, load: Load) -> tuple[Cycle, int, int]:
    """What measurements that are averaged have in common: the cycle, the length to an eighth of an octave, requests."""
    return cycle, round(8 * math.log2(load.length + _SHORT)), load.requests


class _Place(NamedTuple):
    """The coordinates of a measurement.

    Attributes:
        drafter: its name.
        drafts, length, requests: as factors of two; of draft iterations + 1, or where there are none of drafts + 1.
        judged: factors of two in the rows of a request in an iteration of nothing but drafts.
        saving: share of the positions that a cycle leaves out.
        rows: factors of two in the rows of an iteration, where cycles have no draft iterations.
        time: number of the measurement.
    """

    drafter: str
    drafts: float
    judged: float
    length: float
    requests: float
    saving: float
    rows: float
    time: float = 0.0


@lru_cache(1024)
def _place(cycle: Cycle, load: Load) -> _Place:
    left_out = 1.0 - cycle.drafter.positions(load.length) / load.length if load.length else 0.0
    return _Place(
        cycle.drafter.name,
        math.log2((cycle.passes or cycle.drafts) + 1),
        math.log2(cycle.pass_rows),
        math.log2(load.length + _SHORT),
        math.log2(load.requests),
        left_out * cycle.passes / (cycle.passes + 1),
        math.log2(cycle.proposed + 1),
    )


class _Places:
    """Places as columns [n]."""

    def __init__(self, places: Iterable[_Place]) -> None:
        names, *columns = zip(*places, strict=True)
        self.drafter = np.array(names)
        self.drafting = (self.drafter != NoDrafter.name).astype(float)
        self._drafts, self._judged, length, requests, self.saving, self.rows, self.time = np.array(columns)
        self._load = np.stack([length, requests])

    def same_drafter(self, other: "_Places") -> np.ndarray:
        """[n, m]."""
        return self.drafter[:, None] == other.drafter[None, :]

    def load_distance(self, other: "_Places") -> np.ndarray:
        """Octaves of length and requests, [n, m]."""
        return np.abs(self._load[:, :, None] - other._load[:, None, :]).sum(0)

    def distance(self, other: "_Places") -> np.ndarray:
        """Octaves of length, requests, drafts + 1 and judged rows, [n, m]."""
        drafts = np.abs(self._drafts[:, None] - other._drafts[None])
        drafts = drafts + np.abs(self._judged[:, None] - other._judged[None])
        return self.load_distance(other) + drafts + np.where(self.same_drafter(other), 0.0, _APART)


def _regress(
    likeness: Callable[[_Places, _Places], np.ndarray],
    known: _Places,
    values: np.ndarray,
    noise: np.ndarray,
    asked: _Places,
    variance: float | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation at places of which `variance` is that before anything was known."""
    between = likeness(asked, known)
    solved = np.linalg.solve(likeness(known, known) + np.diag(noise), between.T)
    return values @ solved, np.sqrt(np.maximum(variance - np.einsum("ij,ji->i", between, solved), 0.0))
