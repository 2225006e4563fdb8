"""How long an iteration takes, from predictions corrected by measurements, or from measurements alone.

Both ways are Gaussian processes (Rasmussen and Williams 2006, chapter 2): what was measured counts in full where it was
measured, and fades with the distance from there, in kinds of cycles, lengths and numbers of requests.
"""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, NamedTuple

import numpy as np

from sparsespec_compile.runtime.device.drafters import Cycle, NoDrafter

IterationTime = Callable[[Sequence[Cycle], float, int], np.ndarray]
"""(n cycles, mean cached tokens of a request, requests) -> predicted seconds of a mean iteration of each, [n]."""

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
    """Estimates mean times of iterations.

    An estimate is made while a GPU runs an iteration of some milliseconds, so all cycles are one array.

    Args:
        cycles: n of them, those that can be chosen.
    """

    WRONG: ClassVar[float] = 1.0
    """Factor by which the standard deviations of estimates are raised now and then. A prediction may be wrong by more
    than usual, for instance for a drafter as a whole, and only a trial would tell."""

    def __init__(self, cycles: Sequence[Cycle]) -> None:
        self._grid = _Grid(cycles)

    @abstractmethod
    def measured(self, cycle: Cycle, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""

    @abstractmethod
    def expected(self, cycle: Cycle, load: Load) -> float | None:
        """The expected seconds, to tell outliers by; None where nothing is known."""

    @abstractmethod
    def estimate(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
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
        cycles: n of them, those that can be chosen.
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

    WRONG = 4.0

    NOISE = 0.01
    """That of one measurement."""

    AVERAGED = 4
    """Measurements of one cycle at much the same load that are averaged, in effect."""

    KEPT = 64
    """Cycles and loads whose measurements are kept. What was tried before them is tried again if it may pay."""

    REMEMBERED = 64
    """Loads whose predictions are kept."""

    def __init__(self, predicted: IterationTime, cycles: Sequence[Cycle]) -> None:
        super().__init__(cycles)
        self._predicted = lru_cache(self.REMEMBERED)(partial(predicted, self._grid.cycles))
        self._known: dict[tuple[int, int, int], _Known] = {}

    def measured(self, cycle: Cycle, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""
        nth, error = self._grid.index[cycle], math.log(seconds / self.expected(cycle, load))
        key = _key(nth, load)
        _, mean, count = self._known.pop(key, (None, error, 0))
        count = min(count + 1, self.AVERAGED)
        self._known[key] = _Known(self._grid.place(nth, load), mean + (error - mean) / count, count)
        if len(self._known) > self.KEPT:
            del self._known[next(iter(self._known))]

    def expected(self, cycle: Cycle, load: Load) -> float:
        """The prediction."""
        return float(self._predicted(load.length, load.requests)[self._grid.index[cycle]])

    def estimate(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a mean iteration of each cycle [n], and the standard deviation of their logarithm [n]."""
        predicted = self._predicted(load.length, load.requests)
        if not self._known:
            return predicted, np.full(len(predicted), self.ERROR)
        places, errors, counts = zip(*self._known.values(), strict=True)
        factor = (statistics.fmean(errors) ** 2 / self.FACTOR) ** 2

        def likeness(one: _Places, other: _Places) -> np.ndarray:
            shared = factor * np.where(one.same_drafter(other), 1.0, self.SHARED)
            return shared + self.ERROR**2 * np.exp(-one.distance(other) / _OCTAVES)

        noise = self.NOISE**2 / np.array(counts)
        asked, known = self._grid.at(load), self._grid.known(places)
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

    def __init__(self, cycles: Sequence[Cycle]) -> None:
        super().__init__(cycles)
        self._known: dict[tuple[int, int, int], _Known] = {}
        self._now = 0
        self._estimates: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # an estimate takes a millisecond

    def measured(self, cycle: Cycle, load: Load, seconds: float) -> None:
        """Take note of the mean time of an iteration."""
        nth = self._grid.index[cycle]
        key = _key(nth, load)
        self._now += 1
        _, mean, count = self._known.pop(key, (None, math.log(seconds), 0))
        count = min(count + 1, self.AVERAGED)
        change = (math.log(seconds) - mean) / count
        self._known[key] = _Known(self._grid.place(nth, load, self._now), mean + change, count)
        if len(self._known) > self.PLACES:
            del self._known[next(iter(self._known))]
        if count < self.AVERAGED or abs(change) > self.NOTICED:
            self._estimates.clear()

    def expected(self, cycle: Cycle, load: Load) -> float | None:
        """What was measured of this cycle at much the same load; None where nothing was."""
        known = self._known.get(_key(self._grid.index[cycle], load))
        return None if known is None else math.exp(known.mean)

    def estimate(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a mean iteration of each cycle [n], up to a common factor, and the standard deviation of their
        logarithm [n].

        The deviation is 0 where nothing shall be tried to find out: before anything was measured, and for more than
        `STRIDE` times as many drafts as were, whose trial would take long.
        """
        _, length, requests = _key(0, load)
        if (length, requests) not in self._estimates:
            self._estimates[length, requests] = self._new_estimate(load)
        return self._estimates[length, requests]

    def _new_estimate(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = self._posterior(load)
        cycles = self._grid.cycles
        tried = {cycle.drafter: 1 for cycle in cycles}
        for cycle in (cycles[nth] for nth, *_ in self._known):
            tried[cycle.drafter] = max(cycle.drafts, tried.get(cycle.drafter, 1))
        within = [bool(self._known) and cycle.drafts <= self.STRIDE * tried[cycle.drafter] for cycle in cycles]
        return np.exp(mean), deviation * within

    def _posterior(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
        asked = self._grid.at(load, self._now)
        prior = self._variance(asked)
        if not self._known:
            return self._expected_above(asked), np.sqrt(prior)
        places, seconds, counts = zip(*self._known.values(), strict=True)
        known, level = self._grid.known(places), statistics.fmean(seconds)
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


def _key(nth: int, load: Load) -> tuple[int, int, int]:
    """What measurements that are averaged have in common: the cycle, the length to an eighth of an octave, requests."""
    return nth, round(8 * math.log2(load.length + _SHORT)), load.requests


class _Place(NamedTuple):
    """Where something was measured.

    Attributes:
        nth: number of the cycle.
        length, requests: as factors of two.
        saving: share of the positions that the cycle leaves out.
        time: number of the measurement.
    """

    nth: int
    length: float
    requests: float
    saving: float
    time: float


class _Known(NamedTuple):
    """What was measured at a place: a mean, and of how many measurements, in effect."""

    place: _Place
    mean: float
    measured: int


@dataclass(frozen=True)
class _Places:
    """Coordinates, as columns [n].

    Attributes:
        drafter: its number.
        drafting: 1.0 where there are drafts, else 0.0.
        drafts: factors of two in draft iterations + 1, or where there are none in drafts + 1.
        judged: factors of two in the rows of a request in an iteration of nothing but drafts.
        rows: factors of two in the rows of an iteration, where cycles have no draft iterations.
        length, requests, saving, time: as in `_Place`.
    """

    drafter: np.ndarray
    drafting: np.ndarray
    drafts: np.ndarray
    judged: np.ndarray
    rows: np.ndarray
    length: np.ndarray
    requests: np.ndarray
    saving: np.ndarray
    time: np.ndarray

    def same_drafter(self, other: "_Places") -> np.ndarray:
        """[n, m]."""
        return self.drafter[:, None] == other.drafter[None, :]

    def load_distance(self, other: "_Places") -> np.ndarray:
        """Octaves of length and requests, [n, m]."""
        return _apart(self.length, other.length) + _apart(self.requests, other.requests)

    def distance(self, other: "_Places") -> np.ndarray:
        """Octaves of length, requests, drafts + 1 and judged rows, [n, m]."""
        drafts = _apart(self.drafts, other.drafts) + _apart(self.judged, other.judged)
        return self.load_distance(other) + drafts + np.where(self.same_drafter(other), 0.0, _APART)


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one[:, None] - other[None, :])


class _Grid:
    """The places of n cycles.

    Attributes:
        cycles: in their order.
        index: the number of a cycle.
    """

    def __init__(self, cycles: Sequence[Cycle]) -> None:
        self.cycles = tuple(cycles)
        self.index = {cycle: nth for nth, cycle in enumerate(cycles)}
        self._drafters = list(dict.fromkeys(cycle.drafter for cycle in cycles))
        passes = np.array([cycle.passes for cycle in cycles])
        self._passing = passes / (passes + 1)
        self._columns = (
            np.array([self._drafters.index(cycle.drafter) for cycle in cycles]),
            np.array([float(cycle.drafter.name != NoDrafter.name) for cycle in cycles]),
            np.log2([(cycle.passes or cycle.drafts) + 1 for cycle in cycles]),
            np.log2([cycle.pass_rows for cycle in cycles]),
            np.log2([cycle.proposed + 1 for cycle in cycles]),
        )

    def at(self, load: Load, time: float = 0.0) -> _Places:
        """All cycles at a load."""
        length, requests = _coordinates(load)
        alike = partial(np.full, len(self.cycles))
        return _Places(*self._columns, alike(length), alike(requests), self._saving(load), alike(time))

    def place(self, nth: int, load: Load, time: float = 0.0) -> _Place:
        """A cycle at a load."""
        return _Place(nth, *_coordinates(load), float(self._saving(load)[nth]), time)

    def known(self, places: Iterable[_Place]) -> _Places:
        """Places of several loads and times."""
        nth, length, requests, saving, time = map(np.array, zip(*places, strict=True))
        drafter, drafting, drafts, judged, rows = (column[nth] for column in self._columns)
        return _Places(drafter, drafting, drafts, judged, rows, length, requests, saving, time)

    def _saving(self, load: Load) -> np.ndarray:
        left_out = [1.0 - one.positions(load.length) / load.length if load.length else 0.0 for one in self._drafters]
        return np.array(left_out)[self._columns[0]] * self._passing


def _coordinates(load: Load) -> tuple[float, float]:
    return math.log2(load.length + _SHORT), math.log2(load.requests)


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
