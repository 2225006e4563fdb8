"""The workload that a cost is asked for: how long the requests' caches are, and how many requests there are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from sparsespec_compile.errors import AdviceError


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
