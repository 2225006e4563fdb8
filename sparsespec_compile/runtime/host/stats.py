"""What speculation achieved: counted from each iteration's work and its result."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Group
from rich.jupyter import JupyterMixin
from rich.table import Table

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.ops import Mode, first_visible
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.device.inputs import Work
from sparsespec_compile.runtime.host.request import Request

_SHOWN = 5
"""Kinds of cycles that are shown by name."""

LATEST = 8192
"""Iterations of which single figures are kept."""


def _latest() -> deque:
    return deque(maxlen=LATEST)


class Occupancy(NamedTuple):
    """What an engine holds at a moment.

    Attributes:
        running: requests that decode or are prefilled, those that have moved to host memory included.
        waiting: requests that have not begun.
        pool_share: share of the KV pool's pages in use, 0.0 to 1.0.
        host_bytes: KV that has moved to host memory.
        cycle: (drafter, drafts of a cycle) at present; ("none", 0) is plain decoding. None = before the first request.
    """

    running: int = 0
    waiting: int = 0
    pool_share: float = 0.0
    host_bytes: int = 0
    cycle: tuple[str, int] | None = None


@dataclass
class CycleStats:
    """What became of the drafts of one kind of cycle: a drafter with a number of drafts, k.

    Attributes:
        cycles: verifications after as many draft iterations as such a cycle has.
        accepted_at: [k], cycles in which the draft at this place was accepted.
        drafted: drafts of all of them; None = k of each. With proposals a cycle may have fewer.
        judged: drafts whose predecessors were right; None = the first of each, and those behind accepted ones.
    """

    cycles: int
    accepted_at: list[int]
    drafted: int | None = None
    judged: int | None = None

    @property
    def drafts(self) -> int:
        """Drafts of all cycles."""
        return self.cycles * len(self.accepted_at) if self.drafted is None else self.drafted

    @property
    def tried(self) -> int:
        """Drafts whose predecessors were right."""
        return sum([self.cycles, *self.accepted_at][: len(self.accepted_at)]) if self.judged is None else self.judged


@dataclass
class Stats(JupyterMixin):
    """Counts of one generation: a call of `generate`, or a stream from beginning to end.

    Generations that run at the same time share their counts, from the first one's beginning. Counts go on changing
    while a generation runs, and may be read from any thread. The next generation begins new ones; these stay as they
    are for as long as you keep them. `plot` draws them, `print` gives a line, rich and notebooks a table.

    Attributes:
        draft_tokens: drafts of the longest cycle, k.
        tokens: tokens that became part of a text.
        iterations: passes of the graph, whatever they held.
        draft_weight_iterations: those of them that held drafts alone and ran with 8-bit weights.
        target_passes: verifications and prompts, one for each request they served: what plain decoding needs a token.
        by_cycle: what became of drafts, by (drafter, drafts of a cycle); more than one only with "auto". With
            proposals, the drafter is called as in "pillar+ngram", and a cycle may have fewer drafts. Shorter cycles (a
            request's first, and the one in which its text ends) are not counted here.
        cached_tokens: prompt tokens that were not computed, because the pool held their K/V already.
        kv_read: key and value elements that drafts and verifications read from the pool.
        kv_read_plain: elements that plain decoding would have read for the same tokens.
        pages_offloaded: pages that moved to host memory.
        pages_held: pages, of pool and host memory, in use when the call ended: 0 when every text came to its end.
        host_seconds: time the host took to plan iterations, enqueue them and read what they gave, waiting left out.
        waited_seconds: time the host waited for results.
        iterations_by_cycle: iterations that were planned in cycles of each (drafter, drafts); what "auto" chose.
        cycle_by_iteration: (drafter, drafts of a cycle) as of the planning of each of the latest 8,192 iterations;
            changes only with "auto". ("none", 0) is plain decoding.
        rows_by_iteration: packed rows of these iterations: what their GEMMs work on.
        kv_read_by_iteration: key and value elements that their drafts and verifications read.
        tokens_by_iteration: tokens that these iterations added to texts.
        seconds_by_iteration: when their results were read, in seconds since the counts began.
    """

    draft_tokens: int
    tokens: int = 0
    iterations: int = 0
    draft_weight_iterations: int = 0
    target_passes: int = 0
    by_cycle: dict[tuple[str, int], CycleStats] = field(default_factory=dict)
    cached_tokens: int = 0
    kv_read: int = 0
    kv_read_plain: int = 0
    pages_offloaded: int = 0
    pages_held: int = 0
    host_seconds: float = 0.0
    waited_seconds: float = 0.0
    iterations_by_cycle: Counter[tuple[str, int]] = field(default_factory=Counter)
    cycle_by_iteration: deque[tuple[str, int]] = field(default_factory=_latest, repr=False)
    rows_by_iteration: deque[int] = field(default_factory=_latest, repr=False)
    kv_read_by_iteration: deque[int] = field(default_factory=_latest, repr=False)
    tokens_by_iteration: deque[int] = field(default_factory=_latest, repr=False)
    seconds_by_iteration: deque[float] = field(default_factory=_latest, repr=False)

    @property
    def cycles(self) -> int:
        """Full cycles of all kinds."""
        return sum(kind.cycles for kind in list(self.by_cycle.values()))

    @property
    def drafts_per_cycle(self) -> float:
        """Mean drafts of a full cycle; NaN before the first."""
        drafts = sum(kind.drafts for kind in list(self.by_cycle.values()))
        return drafts / self.cycles if self.cycles else float("nan")

    @property
    def accepted_per_cycle(self) -> float:
        """Mean accepted drafts of a full cycle; NaN before the first."""
        accepted = sum(sum(kind.accepted_at) for kind in list(self.by_cycle.values()))
        return accepted / self.cycles if self.cycles else float("nan")

    @property
    def accepted_by_position(self) -> list[float]:
        """Of the full cycles with a 1st, 2nd, ... k-th draft, the share in which it was accepted; empty before the
        first."""
        longest = max((len(kind.accepted_at) for kind in list(self.by_cycle.values())), default=0)
        shares = []
        for place in range(longest):
            kinds = [kind for kind in list(self.by_cycle.values()) if len(kind.accepted_at) > place]
            shares.append(sum(kind.accepted_at[place] for kind in kinds) / sum(kind.cycles for kind in kinds))
        return shares

    @property
    def tokens_per_target_pass(self) -> float:
        """Tokens for each full-attention pass that a request took part in; 1.0 for plain decoding."""
        return self.tokens / self.target_passes if self.target_passes else float("nan")

    @property
    def kv_bytes_share(self) -> float:
        """Bytes of KV cache read, over what plain decoding reads for the same tokens (prompts left out of both)."""
        return self.kv_read / self.kv_read_plain if self.kv_read_plain else float("nan")

    def __rich__(self) -> Group:
        """Two tables: the counts, and what became of the drafts of each kind of cycle."""
        counts = Table(title="generation", show_header=False)
        counts.add_column()
        counts.add_column(justify="right")
        counts.add_row("tokens", f"{self.tokens:,}")
        counts.add_row("iterations", f"{self.iterations:,}")
        counts.add_row("tokens for each target pass", f"{self.tokens_per_target_pass:.2f}")
        counts.add_row("accepted of drafted, a cycle", f"{self.accepted_per_cycle:.2f} of {self.drafts_per_cycle:.3g}")
        counts.add_row("KV read, of plain decoding's", f"{self.kv_bytes_share:.1%}")
        counts.add_row("prompt tokens found in the pool", f"{self.cached_tokens:,}")
        counts.add_row("pages moved to host memory", f"{self.pages_offloaded:,}")
        counts.add_row("iterations with 8-bit weights", f"{self.draft_weight_iterations:,}")
        counts.add_row("host busy, host waiting", f"{self.host_seconds:.2f} s, {self.waited_seconds:.2f} s")
        kinds = Table("drafter", "drafts", "of iterations", "cycles", "accepted", title="cycles")
        for (drafter, drafts), iterations in self.iterations_by_cycle.most_common():
            kind = self.by_cycle.get((drafter, drafts))
            accepted = f"{sum(kind.accepted_at) / kind.cycles:.2f}" if kind and kind.cycles else "-"
            share = f"{iterations / self.iterations:.0%}"
            kinds.add_row(drafter, str(drafts), share, f"{kind.cycles:,}" if kind else "-", accepted)
        return Group(counts, kinds)

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens in {self.target_passes} target passes"]
        if self.cycles:
            parts.append(f"{self.accepted_per_cycle:.2f} of {self.drafts_per_cycle:.3g} drafts accepted")
        if self.kv_read_plain:
            parts.append(f"{self.kv_bytes_share:.1%} of plain decoding's KV bytes read")
        if self.draft_weight_iterations:
            parts.append(f"{self.draft_weight_iterations} of {self.iterations} iterations with 8-bit weights")
        if len(self.iterations_by_cycle) > 1:
            parts.append(f"drafts: {self._chosen()}")
        return ", ".join(parts)

    def _chosen(self) -> str:
        """What was chosen most often, and in which share of iterations."""
        shares = [
            f"{f'{drafts} {drafter}' if drafts else 'none'} {count / self.iterations:.0%}"
            for (drafter, drafts), count in self.iterations_by_cycle.most_common(_SHOWN)
        ]
        others = len(self.iterations_by_cycle) - _SHOWN
        return ", ".join([*shares, f"{others} more"] if others > 0 else shares)


class StatsRecorder:
    """Adds up `Stats` from what the host knows: work, lengths and results.

    What a draft reads in a layer with a window depends on which pillars lie inside; the window bounds it.
    """

    def __init__(self, layout: KVLayout, config: SpecConfig) -> None:
        self.stats = Stats(config.most_draft_tokens)
        self._config = config
        self._kind = ("none", 0)
        by_window: Counter[tuple[int, bool]] = Counter()
        for layer in layout.layers:
            by_window[layer.window, layer.chunked] += layer.elements_per_token()
        self._elements_by_window = tuple(by_window.items())
        self._began = time.perf_counter()

    def begin_iteration(self, rows: int, cycle: Cycle, *, draft_weights: bool) -> None:
        """Count an iteration of `rows` packed rows in cycles of this kind; what is recorded next belongs to it."""
        self._kind = (cycle.name, cycle.drafts)
        self.stats.cycle_by_iteration.append(self._kind)
        self.stats.iterations_by_cycle[self._kind] += 1
        self.stats.iterations += 1
        self.stats.draft_weight_iterations += draft_weights
        self.stats.rows_by_iteration.append(rows)
        self.stats.kv_read_by_iteration.append(0)
        self.stats.tokens_by_iteration.append(0)
        self.stats.seconds_by_iteration.append(time.perf_counter() - self._began)

    def record_draft(self, request: Request, drafts: int) -> None:
        """Count a draft iteration behind so many drafts: it reads pillars, and everything behind them."""
        first = drafts + request.cached
        if first < request.max_length - 1:
            self._count_read(self._elements(request.pillars + first + 1 - request.recent_start, first, rows=1))

    def record(self, request: Request, work: Work, cached: int, final: int, judged: int, *, cut: bool) -> None:
        """Count one request's verification or part of a prompt.

        Args:
            request: whose work it was.
            work: what was planned for it.
            cached: positions with exact K/V before it.
            final: tokens that it added to the text.
            judged: drafts that it verified.
            cut: whether the text ended before all verified tokens were used.
        """
        self.stats.tokens += final
        self.stats.tokens_by_iteration[-1] += final
        first, planned = (work.offset, work.rows) if work.mode == Mode.PREFILL else (cached, judged + 1)
        rows = max(0, min(planned, request.max_length - 1 - first))
        if rows == 0:
            return
        if work.scored:
            request.recent_start = first + rows - min(work.scored, rows)
            request.pillars = min(self._config.budget(request.recent_start), request.recent_start)
        if work.logits:
            self.stats.target_passes += 1
            request.stats.target_passes += 1
        if work.mode == Mode.VERIFY:
            self._count_read(self._elements(first + rows, first, rows))
            self.stats.kv_read_plain += sum(self._elements(at + 1, at, 1) for at in range(first, first + final))
            if not cut:
                self._count_cycle(request, work, rows == planned, judged, final)

    def _count_read(self, elements: int) -> None:
        self.stats.kv_read += elements
        self.stats.kv_read_by_iteration[-1] += elements

    def _count_cycle(self, request: Request, work: Work, whole: bool, judged: int, final: int) -> None:
        if work.whole_cycle and whole:
            kind = self.stats.by_cycle.setdefault(self._kind, CycleStats(0, [0] * self._kind[1], 0, 0))
            kind.cycles += 1
            kind.drafted, kind.judged = kind.drafts + judged, kind.tried + min(final, judged)
            request.stats.cycles += 1
            request.stats.accepted += final - 1
            for place in range(final - 1):
                kind.accepted_at[place] += 1

    def _elements(self, tokens: int, first: int, rows: int) -> int:
        """Elements read over all layers for rows at `first` .. `first + rows - 1` that read `tokens` positions."""
        total = 0
        for window, elements in self._elements_by_window:
            total += elements * min(tokens, first + rows - max(0, first_visible(first, *window)))
        return total
