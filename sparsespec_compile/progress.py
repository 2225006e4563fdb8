"""What `progress=True` shows while texts are written: three lines in a terminal, a box in a notebook, a line in a log.

Everything shown is read from counts that the engine keeps anyway, a few times a second, by the thread that iterates.
"""

import html
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable
from typing import Protocol

import numpy as np
import rich
from tqdm import tqdm

from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.stats import Occupancy, Stats

_EVERY = 0.2
_EVERY_IN_LOGS = 30.0
"""Seconds between two pictures at least."""

_SHARE = 0.02
"""Of the iterating thread's time, at most, for pictures: a stream of very many texts is counted less often."""

_RECENT = 10.0
"""Seconds of which the speed shown is the mean."""


class _Outlet(Protocol):
    """Where pictures go."""

    def show(self, done: int, total: int, lines: list[str]) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Shows how far a stream is. Used by the thread that iterates over it; `close` may be called by any.

    Attributes:
        enabled: whether anything is shown. If not, every call returns at once.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._outlet, self._every = _outlet()
        self._began = self._shown = time.monotonic()
        self._next = self._began
        self._tokens = self._texts = 0
        self._lengths: list[int] = []
        self._recent: deque[tuple[float, int]] = deque([(self._began, 0)])

    def took(self, tokens: int, ended: Request | None) -> None:
        """Count tokens that were given out, and the text that ended with them, if one did."""
        if self.enabled:
            self._tokens += tokens
            if ended is not None:
                self._texts += 1
                self._lengths.append(len(ended.output))

    def due(self) -> bool:
        """Whether it is time for another picture."""
        return self.enabled and time.monotonic() >= self._next

    def show(self, unfinished: Collection[Request], stats: Stats, occupancy: Occupancy) -> None:
        """Show how things are."""
        now = time.monotonic()
        self._recent.append((now, self._tokens))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RECENT:
            self._recent.popleft()
        then, tokens = self._recent[0]
        speed = (self._tokens - tokens) / max(now - then, 1e-9)
        lines = [
            f"{tqdm.format_interval(now - self._began)}{self._left(unfinished, speed)}",
            in_words(speed, stats, occupancy.cycle),
            holds(occupancy),
        ]
        self._outlet.show(self._texts, self._texts + len(unfinished), lines)
        self._next = time.monotonic() + max(self._every, (time.monotonic() - now) / _SHARE)

    def close(self, unfinished: int, stats: Stats) -> None:
        """Show how it ended, once: the mean speed in place of the present one."""
        if not self.enabled:
            return
        self.enabled = False
        seconds = max(time.monotonic() - self._began, 1e-9)
        lines = [tqdm.format_interval(seconds), in_words(self._tokens / seconds, stats, None)]
        self._outlet.show(self._texts, self._texts + unfinished, lines)
        self._outlet.close()

    def _left(self, unfinished: Collection[Request], speed: float) -> str:
        """Time left, in words; empty where nothing can be said."""
        if speed <= 0 or not unfinished:
            return ""
        tokens, certain = remaining(unfinished, self._lengths)
        return f", {'' if certain else 'at most '}{tqdm.format_interval(tokens / speed)} left"


def remaining(unfinished: Iterable[Request], lengths: Collection[int]) -> tuple[float, bool]:
    """Expected tokens that unfinished texts still need, and whether the estimate uses texts that have ended.

    A text of n tokens is expected to become as long as the mean of those that ended beyond n. Where none did, it may
    become as long as it is allowed to.

    Args:
        unfinished: texts under way or waiting.
        lengths: tokens of the texts that have ended.
    """
    sizes = [(len(request.output), request.max_length - len(request.prompt)) for request in unfinished]
    written, allowed = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    ended = np.sort(np.array(list(lengths), dtype=np.float64))
    longer = np.searchsorted(ended, written, side="right")
    means = np.cumsum(ended[::-1])[::-1] / np.arange(len(ended), 0, -1)  # of the i-th shortest and all longer ones
    known = longer < len(ended)
    expected = np.where(known, np.append(means, 0.0)[longer], allowed)
    return float(np.maximum(np.minimum(expected, allowed) - written, 0.0).sum()), bool(known.any())


def in_words(speed: float, stats: Stats, cycle: tuple[str, int] | None) -> str:
    """Speed, acceptance and the present choice, in less than 80 columns."""
    parts = [f"{speed:,.0f} tokens/s"]
    if stats.cycles:
        parts.append(f"{stats.accepted_per_cycle:.2f} of {stats.drafts_per_cycle:.2f} drafts accepted")
    if cycle is not None:
        drafter, drafts = cycle
        parts.append(f"now {drafts} by {drafter}" if drafts else "now no drafts")
    return ", ".join(parts)


def holds(occupancy: Occupancy) -> str:
    """Requests and memory, in less than 80 columns."""
    host = f", {occupancy.host_bytes / 2**30:.1f} GiB of host memory" if occupancy.host_bytes else ""
    return (
        f"{occupancy.running:,} running, {occupancy.waiting:,} waiting, {occupancy.pool_share:.0%} of the KV pool{host}"
    )


class _Terminal:
    """A bar, and a line of text for each further line; other bars, such as that of captures, go below."""

    def __init__(self) -> None:
        self._bar = tqdm(total=0, bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} texts [{desc}]")
        self._lines = [tqdm(total=0, bar_format="{desc}", leave=False) for _ in range(2)]

    def show(self, done: int, total: int, lines: list[str]) -> None:
        self._bar.total, self._bar.n = total, done
        for bar, text in zip((self._bar, *self._lines), lines, strict=False):
            bar.set_description_str(text, refresh=True)

    def close(self) -> None:
        summary = self._lines[0].desc
        for bar in reversed(self._lines):
            bar.close()
        self._bar.close()
        tqdm.write(summary, file=sys.stderr)


class _Notebook:
    """One output of the cell, which is replaced."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(""), display_id=True)

    def show(self, done: int, total: int, lines: list[str]) -> None:
        first, *others = (html.escape(line) for line in lines)
        below = "".join(f"<br>{line}" for line in others)
        bar = f'<progress value="{done}" max="{max(total, 1)}"></progress>'
        self._handle.update(self._html(f"<div>{bar} {done:,}/{total:,} texts [{first}]{below}</div>"))

    def close(self) -> None:
        """The last picture stays."""


class _Log:
    """A line now and then, where nothing can be drawn over."""

    def show(self, done: int, total: int, lines: list[str]) -> None:
        print(f"{done:,}/{total:,} texts, {', '.join(lines)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


def _outlet() -> tuple[_Outlet, float]:
    """Where pictures go, and the seconds between two of them."""
    if rich.get_console().is_jupyter:
        return _Notebook(), _EVERY
    if sys.stderr.isatty():
        return _Terminal(), _EVERY
    return _Log(), _EVERY_IN_LOGS
