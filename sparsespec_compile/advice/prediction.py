"""What a workload is, and how long its iterations take: the speed of light, and the time that is predicted.

**A workload**: cached lengths, the number of requests, and how many drafts are accepted.

**Speed of light**: all bytes at the read ceiling or all FLOPs at theirs, whichever takes longer.

**Prediction**: term by term, what a kernel reads again included. Reading and computing overlap, but not fully where
both matter; with x and y the time that each would take alone, (x^n + y^n)^(1/n) follows measured steps from 2 to 256
rows, with n = 3 for products and 2 for others. Each launch adds its overhead, each request its own to attention, and
giving out scores one more, for however few requests.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np

from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.config import MOST_REQUESTS, Schedule, SpecConfig
from sparsespec_compile.errors import AdviceError
from sparsespec_compile.passes.cost.terms import Iteration, IterationCost, Number, Term
from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.device.weights import MOST_ROWS
from sparsespec_compile.runtime.host.iteration_times import IterationTime
from sparsespec_compile.runtime.host.phases import phases_in_use

Curve = float | Callable[[int], float]
"""The probability p that a draft is right when all before it were, or a function from k to the mean accepted of k."""

Acceptance = Curve | Mapping[float, Curve]
"""A curve for the default budget, or curves by `budget_ratio`, from which the best budget can be found."""


@dataclass(frozen=True)
class Workload:
    """Requests in their steady state.

    Attributes:
        length: mean cached length; bytes are proportional to it, so that the mean stands for all lengths.
        batch: requests decoded together.
    """

    length: float
    batch: int


def workload(lengths: int | Sequence[int], batch: int) -> Workload:
    """Checks a workload.

    Args:
        lengths: cached length of all requests, or a sample of their lengths.
        batch: requests decoded together.

    Raises:
        AdviceError: a length is not a positive integer, there is none, or the batch is no number of requests that can
            be decoded together.
    """
    sample = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    if not sample or not all(_positive(length) for length in sample):
        raise AdviceError(f"lengths must be a positive integer or a sequence of such, got {lengths!r}.")
    if not _positive(batch) or batch > MOST_REQUESTS:
        raise AdviceError(f"batch must be an integer from 1 to {MOST_REQUESTS:,}, got {batch!r}.")
    return Workload(sum(sample) / len(sample), batch)


def _positive(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def accepted(curve: Curve, draft_tokens: int, name: str = "acceptance") -> float:
    """Mean accepted drafts of a cycle of k, 0 to k.

    A draft counts when all before it in its cycle were right. With a probability p that is the sum of p^i for i from
    1 to k, p (1 - p^k) / (1 - p).

    Args:
        curve: the probability, or a function, which is not asked for k = 0.
        draft_tokens: k.
        name: of the argument that the curve is, for errors.

    Raises:
        AdviceError: p is not in [0, 1], or the function gives less than 0 or more than k.
    """
    if not callable(curve):
        probability = _probability(curve, name)
        return float(sum(probability**i for i in range(1, draft_tokens + 1)))
    mean = curve(draft_tokens) if draft_tokens else 0.0
    if not isinstance(mean, int | float) or not 0 <= mean <= draft_tokens:
        raise AdviceError(f"{name}({draft_tokens}) must be from 0 to {draft_tokens}, got {mean!r}.")
    return float(mean)


def curves(acceptance: Acceptance) -> dict[float, Curve]:
    """Curves by budget ratio; a single one is that of the default ratio of `SpecConfig`.

    Raises:
        AdviceError: there is none.
        ConfigError: a ratio is not allowed.
    """
    if not isinstance(acceptance, Mapping):
        return {SpecConfig().budget_ratio: acceptance}
    if not acceptance:
        raise AdviceError("acceptance is an empty mapping. Give a probability or a curve for a budget ratio at least.")
    return {SpecConfig(budget_ratio=ratio).budget_ratio: curve for ratio, curve in acceptance.items()}


def _probability(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        allowed = "a function of k" if name != "acceptance" else "a function of k or a mapping"
        raise AdviceError(f"{name} must be a probability in [0, 1], {allowed}, got {value!r}.")
    return float(value)


_REMEMBERED = 64
"""Numbers of requests whose iterations are kept."""

_OVERLAP = 3.0
"""The exponent n of products."""

OVERHEAD = "launches"
"""Name under which the overhead of all launches is given."""


@dataclass(frozen=True)
class TermTime:
    """One term's part in a prediction.

    Attributes:
        name: the term's, or "launches".
        bytes, flops: of the term, without what is read again.
        seconds: predicted.
    """

    name: str
    bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The time of one iteration, or the mean over several.

    Attributes:
        terms: in the order of the forward pass, launches last.
        seconds: predicted.
        light_seconds: the speed of light.
    """

    terms: tuple[TermTime, ...]
    seconds: float
    light_seconds: float

    @property
    def dominating(self) -> TermTime:
        """The term that takes longest."""
        return max(self.terms, key=lambda term: term.seconds)

    @property
    def roofline_share(self) -> float:
        """Speed of light over predicted time, 0 to 1."""
        return self.light_seconds / self.seconds


@dataclass(frozen=True)
class DraftCost:
    """The cost of iterations of nothing but drafts, where it is another one.

    Attributes:
        cost: of the same terms as that of the others.
        most_rows: rows of the largest iteration that has it; larger ones cost what the others do.
        flops_rate: FLOPs a second of its products, over those of others.
        overhead_s: of each of its products, beside that of others.
    """

    cost: IterationCost
    most_rows: int
    flops_rate: float = 1.0
    overhead_s: float = 0.0

    def ceilings(self, ceilings: Ceilings) -> Ceilings:
        """What the device can do in these iterations."""
        rate, overhead = ceilings.flops_per_s * self.flops_rate, ceilings.gemm_overhead_s + self.overhead_s
        return replace(ceilings, flops_per_s=rate, gemm_overhead_s=overhead)


_FLOPS_RATE, _OVERHEAD_S = {"int8": 1.0, "fp8": 2.0}, {"int8": 0.0, "fp8": 3.4e-6}
"""Of products with copies of a kind, see `DraftCost`. Tensor cores compute twice as fast in fp8, for which rows become
8-bit numbers too: what that takes is fitted to 11 kinds of cycles on an H200 (benchmarks/LOG.md, 2026-12-01)."""


def draft_cost(cost: IterationCost, kind: str) -> DraftCost:
    """What iterations of nothing but drafts cost with copies of weights; `kind` as in `SpecConfig.draft_weights`."""
    return DraftCost(cost, MOST_ROWS[kind], _FLOPS_RATE[kind], _OVERHEAD_S[kind])


def predict(cost: IterationCost, iteration: Iteration, ceilings: Ceilings) -> Prediction:
    """The time of one iteration."""
    sizes = cost.evaluate(iteration)
    times = [
        TermTime(term.name, size, flops, _term_seconds(term, size, flops, again, ceilings))
        for term, (size, flops, again) in zip(cost.terms, sizes, strict=True)
    ]
    times.append(TermTime(OVERHEAD, 0.0, 0.0, sum(_overhead(term, iteration, ceilings) for term in cost.terms)))
    total_bytes, total_flops, _ = (sum(column) for column in zip(*sizes, strict=True))
    light = max(total_bytes / ceilings.read_bytes_per_s, total_flops / ceilings.flops_per_s)
    return Prediction(tuple(times), sum(time.seconds for time in times), light)


def predict_mean(
    cost: IterationCost,
    mix: Sequence[tuple[float, Iteration]],
    ceilings: Ceilings,
    drafts: DraftCost | None = None,
) -> Prediction:
    """The mean time of an iteration, of kinds with given weights that add up to 1."""

    def predicted(iteration: Iteration) -> Prediction:
        if drafts is None or not _cheap(iteration, drafts):
            return predict(cost, iteration, ceilings)
        return predict(drafts.cost, iteration, drafts.ceilings(ceilings))

    parts = [(weight, predicted(iteration)) for weight, iteration in mix]
    terms = [
        TermTime(
            times[0].name,
            *(
                sum(weight * getattr(time, value) for (weight, _), time in zip(parts, times, strict=True))
                for value in ("bytes", "flops", "seconds")
            ),
        )
        for times in zip(*(part.terms for _, part in parts), strict=True)
    ]
    seconds, light = (sum(w * getattr(part, name) for w, part in parts) for name in ("seconds", "light_seconds"))
    return Prediction(tuple(terms), seconds, light)


def iterations_of(
    kind: Cycle, batch: int, length: float, schedule: Schedule = "grouped"
) -> list[tuple[float, Iteration]]:
    """The iterations of a cycle in the steady state: `batch` requests, as evenly over the phases in use as can be.

    Of those, `batch % phases` have one verifying request more than the others; in the other phases none verifies, and
    proposals are judged.

    Args:
        kind: of cycle.
        batch: requests that decode.
        length: mean cached length.
        schedule: as in `SpecConfig`.

    Returns:
        kinds of iterations and their share, which add up to 1.
    """
    iterations, budget = kind.passes + 1, kind.drafter.positions(length)
    phases = phases_in_use(schedule, kind, batch)
    few, larger = divmod(batch, phases)
    kinds = [
        ((iterations - phases) / iterations, 0),
        ((phases - larger) / iterations, few),
        (larger / iterations, few + 1),
    ]

    def iteration(verifying: int) -> Iteration:
        pass_rows = 1 if verifying else kind.pass_rows
        rows = (batch - verifying) * pass_rows + verifying * (kind.drafts + 1)
        return Iteration(rows, rows, batch - verifying, verifying, length, kind.drafts, budget)

    return [(share, iteration(verifying)) for share, verifying in kinds if share]


def predict_cycle(
    cost: IterationCost,
    kind: Cycle,
    schedule: Schedule,
    length: float,
    batch: int,
    ceilings: Ceilings,
    drafts: DraftCost | None = None,
    padded: Callable[[float], float] | None = None,
) -> Prediction:
    """The mean time of an iteration in cycles of this kind; `padded` gives the rows that are computed for some rows."""
    mix = _mix(kind, batch, length, schedule, padded)
    if not kind.drafter.reads_scores:
        cost, ceilings, drafts = _unscored(cost, ceilings, drafts)
    return predict_mean(cost, mix, ceilings, drafts)


def iteration_time(
    cost: IterationCost,
    schedule: Schedule,
    ceilings: Ceilings,
    drafts: DraftCost | None = None,
    padded: Callable[[float], float] | None = None,
) -> IterationTime:
    """Predicted seconds of mean iterations, as `predict_cycle` gives them, but of many kinds of cycles at once.

    The host predicts while a GPU runs an iteration of some milliseconds: so all iterations of all cycles are one array.
    """
    unscored = _unscored(cost, ceilings, drafts)

    @lru_cache(_REMEMBERED)
    def mixes(kinds: tuple[Cycle, ...], requests: int) -> tuple[np.ndarray, np.ndarray, Iteration]:
        """Which kind an iteration belongs to, its share there, and all iterations, but for lengths and budgets."""
        found = [
            (nth, share, one)
            for nth, kind in enumerate(kinds)
            for share, one in _mix(kind, requests, 0.0, schedule, padded)
        ]
        kind, share, iterations = zip(*found, strict=True)
        columns = np.array([one.values() for one in iterations], float).T
        return np.array(kind), np.array(share), Iteration(*columns)

    def seconds(kinds: Sequence[Cycle], length: float, requests: int) -> np.ndarray:
        kind, share, sizes = mixes(tuple(kinds), requests)
        positions = {drafter: drafter.positions(length) for drafter in {one.drafter for one in kinds}}
        budget = np.array([positions[one.drafter] for one in kinds])[kind]
        reads_scores = np.array([one.drafter.reads_scores for one in kinds])[kind]
        sizes = replace(sizes, length=np.full(len(kind), length), budget=budget)
        took = np.empty(len(kind))
        for scored, (exact, limits, alone) in ((True, (cost, ceilings, drafts)), (False, unscored)):
            asked = reads_scores == scored
            cheap = np.zeros_like(asked) if alone is None else asked & _cheap(sizes, alone)
            took[asked & ~cheap] = _seconds(exact, _some(sizes, asked & ~cheap), limits)
            if alone is not None and cheap.any():
                took[cheap] = _seconds(alone.cost, _some(sizes, cheap), alone.ceilings(limits))
        return np.bincount(kind, share * took, len(kinds))

    return seconds


def _some(iterations: Iteration, chosen: np.ndarray) -> Iteration:
    return Iteration(*(column[chosen] for column in iterations.values()))


def _cheap(iterations: Iteration, drafts: DraftCost) -> Any:
    """Whether iterations have the cost of those of nothing but drafts."""
    return (iterations.verifying == 0) & (iterations.rows <= drafts.most_rows)


def _seconds(cost: IterationCost, iterations: Iteration, ceilings: Ceilings) -> Number:
    """Of each of n iterations, [n]."""
    sizes = cost.evaluate_many(iterations)
    terms = (_term_seconds(term, *size, ceilings) for term, size in zip(cost.terms, sizes, strict=True))
    return sum(terms) + sum(_overhead(term, iterations, ceilings) for term in cost.terms)


def _mix(
    kind: Cycle, batch: int, length: float, schedule: Schedule, padded: Callable[[float], float] | None
) -> list[tuple[float, Iteration]]:
    mix = iterations_of(kind, batch, length, schedule)
    if padded is None:
        return mix
    return [(share, replace(one, rows=padded(one.rows), kept=padded(one.kept))) for share, one in mix]


def _unscored(
    cost: IterationCost, ceilings: Ceilings, drafts: DraftCost | None
) -> tuple[IterationCost, Ceilings, DraftCost | None]:
    """What iterations cost whose verifications give out no scores."""
    alone = None if drafts is None else replace(drafts, cost=drafts.cost.unscored)
    return cost.unscored, replace(ceilings, scoring_overhead_s=0.0), alone


def _term_seconds(term: Term, size: Number, flops: Number, again: Number, ceilings: Ceilings) -> Number:
    gathered, attention = term.kind == "draft", term.kind in ("draft", "verify")
    reading = (size + again) / (ceilings.gather_bytes_per_s if gathered else ceilings.read_bytes_per_s)
    computing = flops / (ceilings.attention_flops_per_s if attention else ceilings.flops_per_s)
    overlap = _OVERLAP if term.kind == "gemm" else 2.0
    return (reading**overlap + computing**overlap) ** (1 / overlap)


def _overhead(term: Term, iteration: Iteration, ceilings: Ceilings) -> Number:
    if term.kind == "gemm":
        return term.launches * ceilings.gemm_overhead_s
    scored = (iteration.verifying > 0) & (iteration.draft_tokens > 0)
    requests = (iteration.drafting + iteration.verifying) * ceilings.request_overhead_s
    return term.launches * (ceilings.attention_overhead_s + requests + scored * ceilings.scoring_overhead_s)
