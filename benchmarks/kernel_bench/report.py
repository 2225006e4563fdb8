"""A case's outcome, whether it reaches its bar, and how it is shown."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from .cases import READ_CEILING, Bar


@dataclass
class Result:
    """Outcome of a case.

    Attributes:
        name: of the case.
        ms: median milliseconds of a call.
        fewest_bytes: that no kernel can avoid to move.
        peers: milliseconds of what it is compared with.
        notes: why a peer is missing.
        met: whether the bar is reached; None if there is none.
        missed: what of the bar is not reached.
    """

    name: str
    ms: float
    fewest_bytes: int
    peers: dict[str, float] = field(default_factory=dict)
    notes: str = ""
    met: bool | None = None
    missed: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the read ceiling."""
        return self.fewest_bytes / (self.ms * 1e-3) / READ_CEILING

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        floor = self.fewest_bytes / READ_CEILING * 1e3
        return {**asdict(self), "floor_ms": floor, "share_of_read_ceiling": self.share}


def judge(results: list[Result], bars: list[Bar]) -> None:
    """Hold each result to its bar; another case or a peer that was not measured leaves that part of it open."""
    times = {result.name: result.ms for result in results}
    for result, bar in zip(results, bars, strict=True):
        checks = []
        if bar.share is not None:
            checks.append((result.share >= bar.share, f"{bar.share:.0%} of the ceiling"))
        if bar.ms is not None:
            checks.append((result.ms <= bar.ms, f"{bar.ms} ms"))
        if bar.against is not None:
            other, ratio = bar.against
            base = result.peers.get(other, times.get(other))
            if base is not None:
                checks.append((result.ms <= ratio * base, f"{ratio:.2f} x {other}"))
        result.missed = [what for reached, what in checks if not reached]
        result.met = not result.missed if checks else None


def as_table(results: list[Result]) -> Table:
    """One line a case."""
    table = Table("case", "ms", "fewest MB", "floor ms", "share", "bar", "peers, ms", "notes")
    for result in results:
        bar = "" if result.met is None else "met" if result.met else f"missed: {', '.join(result.missed)}"
        peers = "\n".join(f"{name} {ms:.4f}" for name, ms in result.peers.items())
        megabytes, floor = result.fewest_bytes / 1e6, result.fewest_bytes / READ_CEILING * 1e3
        numbers = (f"{result.ms:.4f}", f"{megabytes:.1f}", f"{floor:.4f}", f"{result.share:.0%}")
        table.add_row(result.name, *numbers, bar, peers, result.notes)
    return table
