"""From bytes and FLOPs to seconds: the speed of light of an iteration, and the time that is predicted for it.

**Speed of light**: all bytes at the read ceiling or all FLOPs at theirs, whichever takes longer.

**Prediction**: term by term, what a kernel reads again included. Reading and computing overlap, but not fully where
both matter; with x and y the time that each would take alone, sqrt(x^2 + y^2) follows measured steps from 2 to 256
rows. Each launch adds its overhead, each request its own to attention, and giving out scores one more, for however few
requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.config import Schedule
from sparsespec_compile.passes.cost.terms import Iteration, IterationCost, Term
from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.host.iteration_times import IterationTime
from sparsespec_compile.runtime.host.phases import phases_in_use

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


def predict(cost: IterationCost, iteration: Iteration, ceilings: Ceilings) -> Prediction:
    """The time of one iteration."""
    sizes = cost.evaluate(iteration)
    times = [
        _term_time(term, size, flops, again, ceilings)
        for term, (size, flops, again) in zip(cost.terms, sizes, strict=True)
    ]
    times.append(TermTime(OVERHEAD, 0.0, 0.0, sum(_overhead(term, iteration, ceilings) for term in cost.terms)))
    total_bytes, total_flops, _ = (sum(column) for column in zip(*sizes, strict=True))
    light = max(total_bytes / ceilings.read_bytes_per_s, total_flops / ceilings.flops_per_s)
    return Prediction(tuple(times), sum(time.seconds for time in times), light)


def predict_mean(cost: IterationCost, mix: Sequence[tuple[float, Iteration]], ceilings: Ceilings) -> Prediction:
    """The mean time of an iteration, of kinds with given weights that add up to 1."""
    parts = [(weight, predict(cost, iteration, ceilings)) for weight, iteration in mix]
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


def cycle(
    batch: int,
    draft_tokens: int,
    length: float,
    budget: float,
    schedule: Schedule = "grouped",
    passes: int | None = None,
) -> list[tuple[float, Iteration]]:
    """The iterations of a cycle in the steady state: `batch` requests, as evenly over the phases in use as can be.

    Of those, `batch % phases` have one verifying request more than the others; in the other phases none verifies.

    Args:
        batch: requests that decode.
        draft_tokens: drafts of a cycle.
        length: mean cached length.
        budget: cached positions that a draft iteration reads.
        schedule: as in `SpecConfig`.
        passes: draft iterations of a cycle; None = one for each draft.

    Returns:
        kinds of iterations and their share, which add up to 1.
    """
    passes = draft_tokens if passes is None else passes
    iterations = passes + 1
    phases = phases_in_use(schedule, passes, batch)
    few, larger = divmod(batch, phases)
    kinds = [
        ((iterations - phases) / iterations, 0),
        ((phases - larger) / iterations, few),
        (larger / iterations, few + 1),
    ]
    return [(share, _iteration(batch, verifying, draft_tokens, length, budget)) for share, verifying in kinds if share]


def predict_cycle(
    cost: IterationCost, kind: Cycle, schedule: Schedule, length: float, batch: int, ceilings: Ceilings
) -> Prediction:
    """The mean time of an iteration in cycles of this kind."""
    budget = kind.drafter.positions(length)
    mix = cycle(batch, kind.drafts, length, budget, schedule, kind.passes)
    device = ceilings if kind.drafter.reads_scores else replace(ceilings, scoring_overhead_s=0.0)
    return predict_mean(cost, mix, device)


def iteration_time(cost: IterationCost, schedule: Schedule, ceilings: Ceilings) -> IterationTime:
    """Predicted seconds of a mean iteration, by cycle, mean cached length and requests."""

    def seconds(kind: Cycle, length: float, requests: int) -> float:
        return predict_cycle(cost, kind, schedule, length, requests, ceilings).seconds

    return seconds


def _iteration(batch: int, verifying: int, draft_tokens: int, length: float, budget: float) -> Iteration:
    rows = batch + verifying * draft_tokens
    return Iteration(rows, rows, batch - verifying, verifying, length, draft_tokens, budget)


def _term_time(term: Term, size: float, flops: float, again: float, ceilings: Ceilings) -> TermTime:
    gathered, attention = term.kind == "draft", term.kind in ("draft", "verify")
    reading = (size + again) / (ceilings.gather_bytes_per_s if gathered else ceilings.read_bytes_per_s)
    computing = flops / (ceilings.attention_flops_per_s if attention else ceilings.flops_per_s)
    return TermTime(term.name, size, flops, math.hypot(reading, computing))


def _overhead(term: Term, iteration: Iteration, ceilings: Ceilings) -> float:
    if term.kind == "gemm":
        return term.launches * ceilings.gemm_overhead_s
    scores = iteration.verifying > 0 and iteration.draft_tokens > 0
    requests = (iteration.drafting + iteration.verifying) * ceilings.request_overhead_s
    return term.launches * (ceilings.attention_overhead_s + requests + (ceilings.scoring_overhead_s if scores else 0.0))
