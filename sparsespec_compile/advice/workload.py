"""What a prediction is asked for: cached lengths, the number of requests, and how many drafts are accepted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import AdviceError

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
        AdviceError: a length or the batch is not a positive integer, or there is no length.
    """
    sample = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    if not sample or not all(_positive(length) for length in sample):
        raise AdviceError(f"lengths must be a positive integer or a sequence of such, got {lengths!r}.")
    if not _positive(batch):
        raise AdviceError(f"batch must be a positive integer, got {batch!r}.")
    return Workload(sum(sample) / len(sample), batch)


def _positive(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def accepted(curve: Curve, draft_tokens: int) -> float:
    """Mean accepted drafts of a cycle of k, 0 to k.

    A draft counts when all before it in its cycle were right. With a probability p that is the sum of p^i for i from
    1 to k, p (1 - p^k) / (1 - p).

    Raises:
        AdviceError: p is not in [0, 1], or the function gives less than 0 or more than k.
    """
    mean = curve(draft_tokens) if callable(curve) else sum(_probability(curve) ** i for i in range(1, draft_tokens + 1))
    if not isinstance(mean, int | float) or not 0 <= mean <= draft_tokens:
        raise AdviceError(f"acceptance({draft_tokens}) must be from 0 to {draft_tokens}, got {mean!r}.")
    return float(mean)


def curves(acceptance: Acceptance) -> dict[float, Curve]:
    """Curves by budget ratio; a single one stands for the default ratio of `SpecConfig`.

    Raises:
        AdviceError: there is none.
        ConfigError: a ratio is not allowed.
    """
    if not isinstance(acceptance, Mapping):
        return {SpecConfig().budget_ratio: acceptance}
    if not acceptance:
        raise AdviceError("acceptance is an empty mapping. Give a probability or a curve for a budget ratio at least.")
    return {SpecConfig(budget_ratio=ratio).budget_ratio: curve for ratio, curve in acceptance.items()}


def _probability(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise AdviceError(f"acceptance must be a probability in [0, 1], a function of k or a mapping, got {value!r}.")
    return float(value)
