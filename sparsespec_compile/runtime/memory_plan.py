"""What the device's memory is spent on, counted before it is taken."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from sparsespec_compile.errors import MemoryPlanError

_GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a state and its steps need, beside what is free.

    Attributes:
        parts: bytes by what they are for.
        available: free bytes of the device before the parts are allocated; None = not limited (CPU).
    """

    parts: dict[str, int]
    available: int | None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def require(self) -> None:
        """Raises MemoryPlanError, with every figure, unless the parts fit."""
        if self.available is not None and self.total > self.available:
            figures = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.parts.items())
            raise MemoryPlanError(
                f"The device has {self.available / _GIB:.2f} GiB free, and {self.total / _GIB:.2f} are needed: "
                f"{figures}. Lower SpecConfig.max_requests, pool_tokens or prefill_chunk, or max_new_tokens."
            )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("memory", "GiB", title="memory plan")
        for name, size in (*self.parts.items(), ("together", self.total)):
            table.add_row(name, f"{size / _GIB:.2f}")
        if self.available is not None:
            table.add_row("free on the device", f"{self.available / _GIB:.2f}")
        yield table
