"""What speculation achieved: counted from each iteration's work and its result."""

from collections import Counter, deque
from dataclasses import dataclass, field

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.passes.layout import KVLayout
from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.device.work import Work
from sparsespec_compile.runtime.host.request import Request

LATEST = 8192
"""Iterations of which single figures are kept."""


def _latest() -> deque:
    return deque(maxlen=LATEST)


@dataclass
class CycleStats:
    """What became of the drafts of one kind of cycle: a drafter with a number of drafts, k.

    Attributes:
        cycles: verifications of k drafts.
        accepted_at: [k], cycles in which the draft at this place was accepted.
    """

    cycles: int
    accepted_at: list[int]


@dataclass
class Stats:
    """Counts of one generation: a call of `generate`, or a stream from beginning to end.

    Generations that run at the same time share their counts, from the first one's beginning.

    Attributes:
        draft_tokens: drafts of the longest cycle, k.
        tokens: tokens that became part of a text.
        iterations: passes of the graph, whatever they held.
        target_passes: verifications and prompts, one for each request they served: what plain decoding needs a token.
        by_cycle: what became of drafts, by (drafter, drafts of a cycle); more than one only with "auto". Shorter cycles
            (a request's first, and the one in which its text ends) are not counted here.
        kv_read: key and value elements that drafts and verifications read from the pool.
        kv_read_plain: elements that plain decoding would have read for the same tokens.
        pages_offloaded: pages that moved to host memory.
        pages_held: pages, of pool and host memory, in use when the call ended: 0 when every text came to its end.
        host_seconds: time the host took to plan iterations, enqueue them and read what they gave, waiting left out.
        waited_seconds: time the host waited for results.
        cycle_by_iteration: (drafter, drafts of a cycle) as of the planning of each of the latest 8,192 iterations;
            changes only with "auto". ("none", 0) is plain decoding.
        rows_by_iteration: packed rows of these iterations: what their GEMMs work on.
        kv_read_by_iteration: key and value elements that their drafts and verifications read.
    """

    draft_tokens: int
    tokens: int = 0
    iterations: int = 0
    target_passes: int = 0
    by_cycle: dict[tuple[str, int], CycleStats] = field(default_factory=dict)
    kv_read: int = 0
    kv_read_plain: int = 0
    pages_offloaded: int = 0
    pages_held: int = 0
    host_seconds: float = 0.0
    waited_seconds: float = 0.0
    cycle_by_iteration: deque[tuple[str, int]] = field(default_factory=_latest)
    rows_by_iteration: deque[int] = field(default_factory=_latest)
    kv_read_by_iteration: deque[int] = field(default_factory=_latest)

    @property
    def cycles(self) -> int:
        """Full cycles of all kinds."""
        return sum(kind.cycles for kind in list(self.by_cycle.values()))

    @property
    def drafts_per_cycle(self) -> float:
        """Mean drafts of a full cycle; NaN before the first."""
        drafts = sum(kind.cycles * len(kind.accepted_at) for kind in list(self.by_cycle.values()))
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

    def __str__(self) -> str:
        parts = [f"{self.tokens} tokens in {self.target_passes} target passes"]
        if self.cycles:
            parts.append(f"{self.accepted_per_cycle:.2f} of {self.drafts_per_cycle:.3g} drafts accepted")
        if self.kv_read_plain:
            parts.append(f"{self.kv_bytes_share:.1%} of plain decoding's KV bytes read")
        return ", ".join(parts)


class StatsRecorder:
    """Adds up `Stats` from what the host knows: work, lengths and results.

    What a draft reads in a layer with a sliding window depends on which pillars lie inside; the window bounds it.
    """

    def __init__(self, layout: KVLayout, config: SpecConfig) -> None:
        self.stats = Stats(config.most_draft_tokens)
        self._config = config
        self._kind = ("none", 0)
        by_window: Counter[int | None] = Counter()
        for layer in layout.layers:
            by_window[layer.window] += layer.elements_per_token()
        self._elements_by_window = tuple(by_window.items())

    def begin_iteration(self, rows: int, cycle: Cycle) -> None:
        """Count an iteration of `rows` packed rows in cycles of this kind; what is recorded next belongs to it."""
        self._kind = (cycle.drafter.name, cycle.drafts)
        self.stats.cycle_by_iteration.append(self._kind)
        self.stats.iterations += 1
        self.stats.rows_by_iteration.append(rows)
        self.stats.kv_read_by_iteration.append(0)

    def record_draft(self, request: Request, work: Work) -> None:
        """Count a draft: it reads pillars, and everything behind them."""
        first = work.offset + request.cached
        if first < request.max_length - 1:
            self._count_read(self._elements(request.pillars + first + 1 - request.recent_start, first, rows=1))

    def record(self, request: Request, work: Work, cached: int, final: int, *, cut: bool) -> None:
        """Count one request's verification or part of a prompt.

        Args:
            request: whose work it was.
            work: what was planned for it.
            cached: positions with exact K/V before it.
            final: tokens that it added to the text.
            cut: whether the text ended before all verified tokens were used.
        """
        self.stats.tokens += final
        first = work.offset + (0 if work.mode == Mode.PREFILL else cached)
        rows = max(0, min(work.rows, request.max_length - 1 - first))
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
                self._count_cycle(request, work, rows, final)

    def _count_read(self, elements: int) -> None:
        self.stats.kv_read += elements
        self.stats.kv_read_by_iteration[-1] += elements

    def _count_cycle(self, request: Request, work: Work, rows: int, final: int) -> None:
        if work.whole_cycle and rows == work.rows:
            kind = self.stats.by_cycle.setdefault(self._kind, CycleStats(0, [0] * self._kind[1]))
            kind.cycles += 1
            request.stats.cycles += 1
            request.stats.accepted += final - 1
            for place in range(final - 1):
                kind.accepted_at[place] += 1

    def _elements(self, tokens: int, first: int, rows: int) -> int:
        """Elements read over all layers for rows at `first` .. `first + rows - 1` that read `tokens` positions."""
        total = 0
        for window, elements in self._elements_by_window:
            total += elements * (min(tokens, first + rows, window + rows - 1) if window else tokens)
        return total
