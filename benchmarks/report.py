"""Draws the throughput results: tokens per second of every engine, workload by workload.

    python benchmarks/report.py

reads benchmarks/results/h200-throughput.json and writes docs/charts/throughput.png. The file is a list of rows, one for
each engine with its settings on each workload, with the fields in `FIELDS`. matplotlib comes with the extra `bench`.
"""

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsespec_compile import SparseSpecError

RESULTS = Path(__file__).parent / "results" / "h200-throughput.json"
CHARTS = Path(__file__).parents[1] / "docs" / "charts"

FIELDS = (
    "workload",
    "engine",
    "settings",
    "tokens_per_second",
    "ms_per_iteration",
    "accepted_per_cycle",
    "tokens_per_iteration",
    "kv_bytes_share",
    "gpu_idle_share",
    "versions",
)
"""Fields of a row. workload, engine: names; settings, versions: mappings; the others numbers. All numbers but
tokens_per_second are null where an engine does not tell."""

OURS, PEERS = "#1f6f43", "#9aa5b1"


class ReportError(SparseSpecError, ValueError):
    """The results cannot be read or drawn."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; raises ReportError when it is not one."""
    try:
        rows = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ReportError(f"{path} does not exist. Run benchmarks/throughput.py first, or name a file.") from error
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise ReportError(f"{path} must hold a list of rows, at least one, got {type(rows).__name__}.")
    for number, row in enumerate(rows):
        _check_row(path, number, row)
    return rows


def _check_row(path: Path, number: int, row: object) -> None:
    if not isinstance(row, dict):
        raise ReportError(f"row {number} of {path} must be a mapping, got {type(row).__name__}.")
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise ReportError(f"row {number} of {path} lacks {', '.join(missing)}. Needed: {', '.join(FIELDS)}.")
    speed = row["tokens_per_second"]
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed < float("inf"):
        raise ReportError(f"row {number} of {path} has tokens_per_second {speed!r}; it must be a positive number.")


def label(row: dict[str, Any]) -> str:
    """An engine with its settings, in one line."""
    settings = (f"{name}={value}" for name, value in row["settings"].items())
    return " ".join([row["engine"], *settings, *([f"@{row['right']:g}"] if row.get("right", 1) != 1 else [])])


def without_what_is_common(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the settings that are the same for all rows of their engine, for short labels."""
    short = []
    for row in rows:
        others = [other["settings"] for other in rows if other["engine"] == row["engine"]]
        told = {name: value for name, value in row["settings"].items() if any(o.get(name) != value for o in others)}
        short.append({**row, "settings": told})
    return short


def by_workload(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each workload, the slowest engine first; workloads in the order of the file."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["workload"], []).append(row)
    return {name: sorted(group, key=lambda row: row["tokens_per_second"]) for name, group in groups.items()}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the chart as PNG.

    Each workload of several rows has a panel of its own, for their speeds differ by orders of magnitude. A bar says its
    tokens per second, how many times the plain engine's that is, and, where drafts were made, how many of a cycle were
    accepted.

    Raises:
        ReportError: matplotlib is not installed.
    """
    figure_module, canvas_module = matplotlib_module("figure"), matplotlib_module("backends.backend_agg")
    groups = by_workload(without_what_is_common(rows))
    groups = {name: group for name, group in groups.items() if len(group) > 1} or groups
    heights = [len(group) + 1.5 for group in groups.values()]
    figure = figure_module.Figure(figsize=(10, 0.32 * sum(heights)), layout="constrained")
    canvas_module.FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (workload, group) in zip(panels[:, 0], groups.items(), strict=True):
        _draw_panel(panel, workload, group)
    figure.savefig(path, dpi=150)


def _draw_panel(panel: Any, workload: str, group: list[dict[str, Any]]) -> None:
    speeds = [row["tokens_per_second"] for row in group]
    colors = [OURS if row["engine"] == "sparsespec" else PEERS for row in group]
    bars = panel.barh(range(len(group)), speeds, color=colors)
    panel.set_yticks(range(len(group)), [label(row) for row in group])
    panel.bar_label(bars, [annotation(row, group) for row in group], padding=4, fontsize=8)
    panel.set_title(workload, loc="left", fontsize=10)
    panel.set_xlabel("tokens per second", fontsize=8)
    panel.set_xlim(0, max(speeds) * 1.4)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def annotation(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """What stands at a bar's end: speed, ratio to the plain engine if it ran, accepted drafts if there were any."""
    parts = [f"{row['tokens_per_second']:,.0f}"]
    plain = [other["tokens_per_second"] for other in group if other["engine"] == "plain"]
    if plain and row["engine"] != "plain":
        parts.append(f"{row['tokens_per_second'] / max(plain):.2f}x plain")
    if row["accepted_per_cycle"] is not None:
        parts.append(f"{row['accepted_per_cycle']:.2f} accepted")
    return ", ".join(parts)


def matplotlib_module(name: str) -> ModuleType:
    """A module of matplotlib; raises ReportError when that is not installed."""
    try:
        return import_module(f"matplotlib.{name}")
    except ImportError as error:
        raise ReportError(
            "Charts need matplotlib, which is not installed: pip install 'sparsespec-compile[bench]'."
        ) from error


def command(draw: Callable[[list[dict[str, Any]], Path], None], name: str, description: str | None) -> None:
    """The command that draws a chart of the results; `name` is that of its file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results")
    parser.add_argument("--png", type=Path, default=CHARTS / name, help="where to write the chart")
    arguments = parser.parse_args()
    draw(read_rows(arguments.json), arguments.png)
    print(f"wrote {arguments.png}")


if __name__ == "__main__":
    command(draw, "throughput.png", __doc__)
