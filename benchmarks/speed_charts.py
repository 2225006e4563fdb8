"""Draws times plain decoding against the rate of right drafts, and against the tokens in the KV cache.

    python benchmarks/speed_charts.py

reads benchmarks/results/h200-throughput.json, which `throughput.py` has written, and writes docs/charts/speed.png. On
the left is every workload at its rates (64x8192 64x8192@0.95 ...). What a rate is says `wrong_drafts.py`; it is the one
that was measured with drafts by the model, of the row's fastest settings with a fixed number of them. On the right are
the workloads of drafts as the model makes them: what sparse attention saves grows with the KV cache, and other costs do
not. A dot is what default settings reach, a dash the best fixed ones.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from report import OURS, ReportError, command, matplotlib_module
from workloads import workload as parsed
from wrong_drafts import rate_for

from sparsespec_compile import SpecConfig

COLORS = (OURS, "#c2571a", "#2b5c8a", "#8a6d2b", "#6b4c8a", "#b03a5b", "#3a9a9a", "#555555")

PAPER = 6.16
"""Drafts of 8 that the paper's models accept."""


class Point(NamedTuple):
    """A workload at a share of right drafts.

    Attributes:
        rate: of right drafts.
        default: tokens a second with default settings over those of plain decoding; None = not measured.
        fixed: the same for the fastest other settings.
        settings: which these are.
    """

    rate: float
    default: float | None
    fixed: float | None
    settings: str


def points(rows: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """Of every workload with plain decoding and drafts, its points, lowest rate first.

    Raises:
        ReportError: there is none.
    """
    plain = {row["workload"]: row["tokens_per_second"] for row in rows if row["engine"] == "plain"}
    measured: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["engine"] == "sparsespec" and row["workload"] in plain:
            measured[row["workload"], row.get("right", 1.0)].append(row)
    found: dict[str, list[Point]] = defaultdict(list)
    for (workload, _), group in measured.items():
        rate = right_by_model(group)
        if rate is not None:
            found[workload].append(_point(rate, group, plain[workload]))
    if not found:
        raise ReportError("no workload has both plain decoding and a fixed number of drafts by the model.")
    return {workload: sorted(some) for workload, some in found.items()}


def right_by_model(group: list[dict[str, Any]]) -> float | None:
    """The rate of right drafts by the model, of rows of a workload at one share; None where no row has only such.

    Drafts that come from the text have a rate of their own, and auto a mixture.
    """
    by_model = [
        row
        for row in group
        if row.get("drafts_right") is not None
        and isinstance(row["settings"].get("draft_tokens"), int)
        and row["settings"].get("drafter", "pillar") != "ngram"
    ]
    return max(by_model, key=lambda row: row["tokens_per_second"])["drafts_right"] if by_model else None


def _point(rate: float, group: list[dict[str, Any]], plain: float) -> Point:
    speeds = {settings_name(row["settings"]): row["tokens_per_second"] / plain for row in group}
    default = speeds.pop("default", None)
    best = max(speeds, key=lambda name: speeds[name], default="")
    return Point(rate, default, speeds.get(best), best)


def is_default(settings: dict[str, Any]) -> bool:
    """Whether settings are those of `SpecConfig()`."""
    return SpecConfig(**settings) == SpecConfig()


def settings_name(settings: dict[str, Any]) -> str:
    """Settings in words: "8 drafts" by pillars, "8 drafts, 2 proposals", "3 drafts, ngram", or "default"."""
    if is_default(settings):
        return "default"
    shown = {name: value for name, value in settings.items() if getattr(SpecConfig(), name) != value}
    drafts = shown.pop("draft_tokens", "auto")
    shown.pop("drafter", None) if settings.get("drafter") == "pillar" else None
    words = ["no drafts" if drafts == 0 else f"{drafts} drafts"]
    if "draft_proposals" in shown:
        proposals = shown.pop("draft_proposals")
        words.append(f"{proposals} proposal{'s' if proposals != 1 else ''}")
    words += [str(value) if isinstance(value, str) else f"{name}={value}" for name, value in shown.items()]
    return ", ".join(words)


def cached_tokens(workload: str) -> int | None:
    """Tokens in the KV cache of all requests, in the middle of their texts; None = the name says no lengths.

    A batch that drains counts as if all of its texts were as long as the longest.
    """
    try:
        one = parsed(workload.split()[-1])
    except SystemExit:
        return None
    return one.requests * (one.length + one.new_tokens // 2)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the chart as PNG.

    Raises:
        ReportError: rows that do not suffice, or matplotlib is not installed.
    """
    by_workload = points(rows)
    unspoiled = {row["workload"] for row in rows if row["engine"] == "sparsespec" and row.get("right", 1.0) == 1}
    figure = matplotlib_module("figure").Figure(figsize=(11, 4.5), layout="constrained")
    matplotlib_module("backends.backend_agg").FigureCanvasAgg(figure)
    by_rate, by_cache = figure.subplots(1, 2, sharey=True)
    for color, (workload, some) in zip(COLORS * len(by_workload), by_workload.items(), strict=False):
        by_cache.plot([], color=color, marker="o", label=workload)
        _plot(by_rate, color, some, [point.rate for point in some])
        tokens = cached_tokens(workload)
        if tokens is not None and workload in unspoiled:
            _plot(by_cache, color, some[-1:], [tokens])
    for axis in (by_rate, by_cache):
        axis.axhline(1, color="#9aa5b1", linewidth=1)
        axis.tick_params(labelsize=8)
        axis.spines["right"].set_visible(False)
        axis.set_ylim(bottom=0)
    by_cache.spines["top"].set_visible(False)
    by_cache.set_xscale("log")
    by_cache.set_xlabel("tokens in the KV cache, of all requests; drafts as the model makes them", fontsize=9)
    by_rate.set_ylabel("times plain decoding", fontsize=9)
    _rates(by_rate)
    title = "dots: default settings, dashes: the best fixed ones"
    by_cache.legend(loc="upper left", fontsize=8, frameon=False, title=title, title_fontsize=8)
    figure.savefig(path, dpi=150)


def _plot(axis: Any, color: str, some: list[Point], places: list[float]) -> None:
    """Default settings as dots on a line, fixed ones as dashes."""
    dash = {"marker": "_", "linestyle": "none", "markersize": 10}
    for name, style in (("default", {"marker": "o"}), ("fixed", dash)):
        shown = [(x, y) for x, point in zip(places, some, strict=True) if (y := getattr(point, name)) is not None]
        axis.plot([x for x, _ in shown], [y for _, y in shown], color=color, **style)


def _rates(axis: Any) -> None:
    """The axis of rates, with the paper's and the number of accepted drafts that a rate yields."""
    axis.axvline(rate_for(PAPER, 8), color="#9aa5b1", linewidth=1, linestyle=":")
    axis.annotate("paper", (rate_for(PAPER, 8), 0.02), xycoords=("data", "axes fraction"), fontsize=8, color="#667788")
    axis.set_xlabel("share of drafts that are right, of those whose predecessors are", fontsize=9)
    above = axis.secondary_xaxis("top")
    low, high = axis.get_xlim()
    ticks = [accepted for accepted in range(1, 9) if low <= rate_for(accepted, 8) <= high]
    above.set_xticks([rate_for(accepted, 8) for accepted in ticks], [str(accepted) for accepted in ticks])
    above.set_xlabel("accepted of 8", fontsize=9)


if __name__ == "__main__":
    command(draw, "speed.png", __doc__)
