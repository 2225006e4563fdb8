"""`plot`: the counts of a generation as four charts. Needs matplotlib, the extra `plot`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from sparsespec_compile.errors import MissingPackageError, PlotError
from sparsespec_compile.runtime.host.stats import Stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS_SHOWN = 5
_BINS = 120
"""Points in time of which the mean is drawn; single iterations of a long generation would be a grey area."""


def plot(stats: Stats) -> "Figure":
    """Draw acceptance by position, the speed, the choice of the cycle and the schedule over time.

    The charts over time show the latest 8,192 iterations. A generation under way may be drawn, from any thread: the
    counts are copied first.

    Args:
        stats: of `OptimizedModel.stats`.

    Returns:
        A matplotlib figure: `figure.savefig("stats.png")`; a notebook shows it as a cell's value. It is pyplot's, so
        `pyplot.show()` shows it elsewhere.

    Raises:
        MissingPackageError: matplotlib is not installed.
        PlotError: `stats` is something else, or has no iteration.
    """
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingPackageError(
            "plot draws with matplotlib, which is not installed. Run: pip install matplotlib (the extra [plot] has it)."
        ) from error
    if not isinstance(stats, Stats):
        raise PlotError(f"plot takes the stats of a compiled model, plot(fast.stats), got {type(stats).__name__}.")
    # A generation may be running: copies may differ in length, and only complete iterations are drawn.
    kept = list(zip(*map(tuple, _series(stats)), strict=False))
    if not kept:
        raise PlotError("These stats have no iteration yet: generate first, then plot(fast.stats).")
    seconds, tokens, cycles, rows, read = zip(*kept, strict=True)
    figure, ((acceptance, speed), (choice, schedule)) = pyplot.subplots(2, 2, figsize=(12, 7), layout="constrained")
    _draw_acceptance(acceptance, stats)
    _draw_speed(speed, np.array(seconds), np.array(tokens))
    _draw_choice(choice, np.array(seconds), cycles)
    _draw_schedule(schedule, np.array(seconds), np.array(rows), np.array(read))
    figure.suptitle(str(stats), fontsize="small", wrap=True)
    if "inline" in matplotlib.get_backend():  # a notebook shows open figures besides the value of the cell
        pyplot.close(figure)
    return figure


def _series(stats: Stats) -> tuple[Iterable, ...]:
    return (
        stats.seconds_by_iteration,
        stats.tokens_by_iteration,
        stats.cycle_by_iteration,
        stats.rows_by_iteration,
        stats.kv_read_by_iteration,
    )


def _draw_acceptance(axes: "Axes", stats: Stats) -> None:
    """The share of cycles in which the draft at a place was accepted, of all cycles and of the most frequent kinds."""
    kinds = sorted(stats.by_cycle.items(), key=lambda item: -item[1].cycles)
    for (drafter, drafts), kind in kinds[:_KINDS_SHOWN]:
        shares = np.array(kind.accepted_at) / kind.cycles
        axes.plot(range(1, drafts + 1), shares, marker=".", label=f"{drafts} by {drafter}, {kind.cycles:,} cycles")
    every = stats.accepted_by_position
    if len(kinds) > 1:
        axes.plot(range(1, len(every) + 1), every, color="black", linewidth=2, label="all")
    axes.set(title="accepted drafts by position", xlabel="position in the cycle", ylabel="share", ylim=(0, 1.02))
    axes.locator_params(axis="x", integer=True)
    if kinds:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "no full cycle with drafts", ha="center", transform=axes.transAxes)


def _draw_speed(axes: "Axes", seconds: np.ndarray, tokens: np.ndarray) -> None:
    """Tokens of each stretch of time over its length."""
    edges = np.linspace(seconds[0], max(seconds[-1], seconds[0] + 1e-9), min(_BINS, len(seconds)) + 1)
    counts, _ = np.histogram(seconds[1:], bins=edges, weights=tokens[1:])  # those of the first came before it
    axes.stairs(counts / np.diff(edges), edges, fill=True, alpha=0.7)
    axes.set(title="speed", xlabel="seconds", ylabel="tokens/s")
    axes.set_ylim(bottom=0)


def _draw_choice(axes: "Axes", seconds: np.ndarray, cycles: tuple[tuple[str, int], ...]) -> None:
    """The number of drafts of a cycle; a colour for each drafter."""
    names = np.array([drafter if drafts else "none" for drafter, drafts in cycles])
    drafts = np.array([drafts for _, drafts in cycles], dtype=float)
    for name in dict.fromkeys(names.tolist()):
        axes.plot(seconds, np.where(names == name, drafts, np.nan), ".", markersize=4, label=name)
    axes.plot(seconds, drafts, color="grey", linewidth=0.5, drawstyle="steps-post", zorder=0)
    axes.set(
        title="choice of drafts", xlabel="seconds", ylabel="drafts of a cycle", ylim=(-0.5, max(drafts.max(), 1) + 0.5)
    )
    axes.legend(fontsize="small")


def _draw_schedule(axes: "Axes", seconds: np.ndarray, rows: np.ndarray, read: np.ndarray) -> None:
    """What iterations hold. A narrow band means that the schedule evens out what they cost."""
    other = axes.twinx()
    lines = []
    for side, values, name, colour in ((axes, rows, "rows", "tab:blue"), (other, read / 1e6, "K/V read", "tab:orange")):
        parts = [part for part in np.array_split(np.arange(len(seconds)), _BINS) if len(part)]
        at, mean = (np.array([series[part].mean() for part in parts]) for series in (seconds, values))
        low, high = (np.array([bound(values[part]) for part in parts]) for bound in (np.min, np.max))
        side.fill_between(at, low, high, alpha=0.25, color=colour, linewidth=0)
        lines += side.plot(at, mean, color=colour, label=f"{name}, mean and range")
        side.set_ylim(0, 1.25 * max(values.max(), 1e-9))
    axes.set(title="schedule", xlabel="seconds", ylabel="packed rows of an iteration")
    other.set_ylabel("K/V elements read, millions")
    axes.legend(handles=lines, fontsize="small", ncols=2)
