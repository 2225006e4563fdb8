"""Times decoding by the tokens as they come, and leaves out prompts, warm-up and the end of the first text."""

from workloads import Load

import sparsespec_compile as ss


class TooShortError(ss.SparseSpecError, ValueError):
    """The texts are too short to be timed."""


_SETTLED = 16
"""Tokens of every request before the clock starts, and of the first to end after it stops."""


class Clock:
    """Times tokens as they come, while all requests decode, or, of a batch that drains, from then on to the end.

    Requests that verify together get their tokens together, and how many such bursts lie between two times depends on
    the times. So while all decode each request is timed from one piece of its text to another, and speeds are added up.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._counts = [0] * len(load.prompts)
        self._first: dict[int, tuple[float, int]] = {}
        self._last: dict[int, tuple[float, int]] = {}
        self._marks: list[tuple[float, int, int]] = []

    def came(self, index: int, tokens: int, iterations: int, now: float) -> None:
        """Take note of a piece of a text that came after so many iterations."""
        counts, load = self._counts, self._load
        counts[index] += tokens
        if min(counts) > _SETTLED and (load.drains or max(counts) < load.new_tokens - _SETTLED):
            self._require(bool(self._marks) or all(n < load.new_tokens_of(i) for i, n in enumerate(counts)))
            self._first.setdefault(index, (now, counts[index]))
            self._last[index] = (now, counts[index])
            self._marks.append((now, sum(counts), iterations))

    def tokens_per_second(self) -> float:
        """Of all requests together."""
        self._require(len(self._marks) > 1)
        if self._load.drains:
            (start, before, _), (end, after, _) = self._marks[0], self._marks[-1]
            return (after - before) / (end - start)
        self._require(all(self._last.get(i, (0.0,)) > self._first.get(i, (0.0,)) for i in range(len(self._counts))))
        spans = ((self._first[i], self._last[i]) for i in range(len(self._counts)))
        return sum((after - before) / (end - start) for (start, before), (end, after) in spans)

    def seconds_per_iteration(self) -> float:
        """Mean time of an iteration."""
        self._require(len(self._marks) > 1)
        (start, _, first), (end, _, last) = self._marks[0], self._marks[-1]
        return (end - start) / max(1, last - first)

    @property
    def iterations(self) -> tuple[int, int]:
        """Numbers of the iterations between which the clock ran."""
        self._require(len(self._marks) > 1)
        return self._marks[0][2], self._marks[-1][2]

    def _require(self, long_enough: bool) -> None:
        if not long_enough:
            raise TooShortError(
                f"No time at which all {len(self._counts)} requests decode: give more than {self._load.new_tokens} new "
                "tokens."
            )
