"""Tables of the documents, made from the committed results: compared with what the documents say, or written into them.

    python benchmarks/check_readme.py
    python benchmarks/check_readme.py --write

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is one of `TABLES`. Run it after a file of
benchmarks/results has changed. Without --write it names the tables that are not those of the results, and ends with 1.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drafters import markdown as drafters_table
from report import RESULTS as THROUGHPUT
from speed_charts import is_default, right_by_model, settings_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/**/*.md")

Rows = list[dict[str, Any]]


def table(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    titles = list(titles)
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *lines))


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def by_workload(rows: Rows) -> Iterator[tuple[str, float, float, Rows]]:
    """For each workload and share of right drafts: its name, the share, plain decoding's speed, and the other rows."""
    plain = {row["workload"]: row["tokens_per_second"] for row in rows if row["engine"] == "plain"}
    keys = dict.fromkeys((row["workload"], row.get("right", 1.0)) for row in rows if row["engine"] == "sparsespec")
    for workload, right in keys:
        if workload in plain:
            group = [row for row in rows if row["engine"] == "sparsespec" and row["workload"] == workload]
            yield workload, right, plain[workload], [row for row in group if row.get("right", 1.0) == right]


def throughput() -> str:
    """A line for each workload and share: plain decoding, default settings, the best fixed ones."""
    lines = []
    for workload, _, plain, group in by_workload(load(THROUGHPUT.name)):
        default = next((row for row in group if is_default(row["settings"])), None)
        fixed = [row for row in group if not is_default(row["settings"])]
        best = max(fixed, key=lambda row: row["tokens_per_second"], default=None)
        rate = right_by_model(group)
        cells = [in_words(workload), "-" if rate is None else f"{rate:.1%}", f"{plain:,.0f}"]
        for row in (default, best):
            cells += (
                [f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / plain:.2f}"] if row else ["-", "-"]
            )
        lines.append([*cells, settings_name(best["settings"]) if best else "-"])
    titles = (
        "requests x tokens",
        "drafts right",
        "plain, tokens/s",
        "default",
        "times",
        "best fixed",
        "times",
        "which is",
    )
    return table(titles, lines)


def throughput_rows(file: str, *, shape: bool = False) -> str:
    """Every row of a file, with the shape of the model where a file has several."""
    lines = []
    rows = load(file)
    plain = {row["workload"]: row["tokens_per_second"] for row in rows if row["engine"] == "plain"}
    for row in rows:
        times = row["tokens_per_second"] / plain[row["workload"]] if row["workload"] in plain else None
        runs = row.get("runs") or []
        accepted = row["accepted_per_cycle"]
        drafts = row.get("drafts_per_cycle")
        of = "" if drafts is None else f" of {drafts:.2f}"
        choice = row.get("choice")
        lines.append(
            [
                *([row["workload"].split()[0]] if shape else []),
                in_words(row["workload"]),
                row["engine"] if row["engine"] != "sparsespec" else settings_name(row["settings"]),
                _number(row.get("right"), ".3g"),
                f"{row['tokens_per_second']:,.0f}",
                f"{len(runs)}, {max(runs) / min(runs) - 1:.1%}" if runs else "-",
                _number(times, ".2f"),
                _number(row["ms_per_iteration"], ".2f"),
                "-" if accepted is None else f"{accepted:.2f}{of}",
                _number(row.get("drafts_right"), ".1%"),
                _number(row.get("light_share"), ".1%"),
                "-" if choice is None else f"{choice} ({row['choice_share']:.0%})",
                _number(row.get("equal_to_plain"), ".1%"),
            ]
        )
    return table(
        (
            *(["shape"] if shape else []),
            "requests x tokens",
            "settings",
            "left alone",
            "tokens/s",
            "runs, apart",
            "times plain",
            "ms",
            "accepted",
            "right",
            "of light",
            "most iterations",
            "as plain",
        ),
        lines,
    )


def throughput_before(file: str) -> str:
    """Every row of an earlier version, by engine; its settings then named what are defaults now."""
    rows = load(file)
    plain = {row["workload"]: row["tokens_per_second"] for row in rows if row["engine"] == "plain"}
    lines = []
    for row in rows:
        drafts = row["settings"].get("draft_tokens", "auto")
        engine = f"{drafts} drafts" if row["engine"] == "sparsespec" else row["engine"]
        times = row["tokens_per_second"] / plain[row["workload"]]
        cells = f"{row['tokens_per_second']:,.0f}", f"{times:.2f}", f"{row['ms_per_iteration']:.2f}"
        lines.append([in_words(row["workload"]), engine, *cells, _number(row["accepted_per_cycle"], ".2f")])
    return table(("requests x tokens", "engine", "tokens/s", "times plain", "ms", "accepted"), lines)


def experts() -> str:
    """A line for each shape and number of rows."""
    lines = []
    for case in load("h200-experts.json")["experts"]:
        ours, theirs = case["us"]["ours"], case["us"]["grouped_mm"]
        cells = f"{ours:.0f}", f"{case['floor_us'] / ours:.0%}", f"{theirs:.0f}"
        lines.append([case["shape"], str(case["rows"]), str(case["read"]), *cells])
    return table(("layer of", "rows", "experts read", "us", "of 4.3 TB/s", "grouped_mm, us"), lines)


def cpu_overhead() -> str:
    """A line for each case and engine."""
    lines = [
        [row["case"], row["engine"], f"{row['median_s']:.2f}", f"{row['times_huggingface']:.2f}", row["equal_texts"]]
        for row in load("cpu-overhead.json")["rows"]
    ]
    return table(("prompt + new tokens", "engine", "s", "times HuggingFace", "equal texts"), lines)


def families_equal() -> str:
    """The families whose text equals HuggingFace's in every configuration that was examined, in alphabetical order."""
    names = [one["family"] for one in _first("equal") if not _otherwise(one)]
    return textwrap.fill(", ".join(sorted(names)), 120, break_on_hyphens=False) + "."


def families_partly() -> str:
    """The families of which some checkpoints' configurations are equal and others are not."""
    lines = []
    for one in sorted(load("breadth.json")["outcomes"], key=lambda one: one["family"]):
        if "/" not in one["family"] and (others := _otherwise(one)):
            found = [f"{other['stands_for']}: {_in_short(other)}" for other in others]
            lines.append([one["family"], _in_short(one), "; ".join(found)])
    return table(("family", "default", "others"), lines) if lines else "None in the present results."


def families_refused() -> str:
    """The families that are refused, by error."""
    by_error: dict[str, list[str]] = {}
    for one in _first("refused"):
        if not _otherwise(one):
            by_error.setdefault(one["why"].split(":")[0], []).append(one["family"])
    lines = [[f"`{error}`", ", ".join(sorted(families))] for error, families in sorted(by_error.items())]
    return table(("error", "families"), lines)


def _first(status: str) -> list[dict]:
    """The first outcome of each family that has this status."""
    return [one for one in load("breadth.json")["outcomes"] if one["status"] == status and "/" not in one["family"]]


def _otherwise(outcome: dict) -> list[dict]:
    """Configurations of the same family with another status."""
    found = [one for one in load("breadth.json")["outcomes"] if one["family"].startswith(f"{outcome['family']}/")]
    return [one for one in found if one["status"] != outcome["status"]]


def _in_short(outcome: dict) -> str:
    return f"refused, `{outcome['why'].split(':')[0]}`" if outcome["status"] == "refused" else outcome["status"]


def in_words(workload: str) -> str:
    """A workload without the shape: 64 x 8,192, and what else it says."""
    match = re.fullmatch(r"\S+ (\d+)x(\d+)(?:\+(\d+))?(-drain)?", workload)
    if match is None:
        return workload
    requests, length, new, drains = match.groups()
    grown = f", {int(new):,} more" if new else ""
    return f"{requests} x {int(length):,}{grown}{', draining' if drains else ''}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def kernels(file: str) -> str:
    """Cases that others compute as well."""
    cases = [case for case in load(file)["cases"] if case["peers"] and case["name"].split()[0] in _ATTENTION]
    peers = dict.fromkeys(peer for case in cases for peer in case["peers"])
    lines = [
        [case["name"], f"{case['ms']:.3f}", f"{case['share_of_read_ceiling']:.0%}"]
        + [_number(case["peers"].get(peer), ".3f") for peer in peers]
        for case in cases
    ]
    return table(("case", "ms", "of 4.3 TB/s", *peers), lines)


_ATTENTION = ("decode", "verify", "draft", "mixed")


def ablation(file: str) -> str:
    """A line for each stage."""
    lines = [
        [
            row["stage"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms_per_iteration']:.2f}",
            _number(row["accepted_per_cycle"], ".2f"),
        ]
        for row in load(file)["rows"]
    ]
    return table(("stage", "tokens/s", "ms an iteration", "accepted of 8"), lines)


def startup() -> str:
    """A line for each start."""
    titles = {
        "caches": "caches",
        "optimize_seconds": "`optimize`, s",
        "to_first_token_seconds": "first token, s",
        "process_to_first_token_seconds": "from the process's start, s",
    }
    rows = load("h200-startup.json")["rows"]
    shown = [name for name in titles if name in rows[0]]
    return table(
        (titles[name] for name in shown),
        ([row[name] if name == "caches" else f"{row[name]:.0f}" for name in shown] for row in rows),
    )


def logit_gap() -> str:
    """Tokens that are not HuggingFace's own choice, and by how much at most."""
    runs = {name: value for name, value in load("h200-logit-gap.json").items() if name.startswith("temperature")}
    lines = [
        [name, f"{run['tokens']:,}", str(run["parted"]), f"{run['largest_gap']:.3f}"] for name, run in runs.items()
    ]
    return table(("", "tokens", "not the favourite", "largest gap, logits"), lines)


def formats(*, adapters: bool) -> str:
    """A line for each format of adapters, or of quantised weights."""
    outcomes = [one for one in load("formats.json")["outcomes"] if one["name"].startswith("PEFT") == adapters]
    return table(("format", "result", "why"), ([one["name"], one["status"], escaped(one["why"])] for one in outcomes))


def escaped(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


TABLES: Mapping[str, Callable[[], str]] = {
    "throughput": throughput,
    "throughput rows": lambda: throughput_rows(THROUGHPUT.name),
    "mixtures": lambda: throughput_rows("h200-mixtures.json", shape=True),
    "experts": experts,
    "throughput, 77ea47f": lambda: throughput_before("h200-throughput-77ea47f.json"),
    "startup": startup,
    "cpu overhead": cpu_overhead,
    "kernels": lambda: kernels("h200-kernels.json"),
    "kernels, flashinfer": lambda: kernels("h200-kernels-flashinfer.json"),
    "ablation": lambda: ablation("h200-ablation.json"),
    "ablation, host tier": lambda: ablation("h200-ablation-host-tier.json"),
    "drafters": lambda: drafters_table(load("h200-drafters.json")["rows"]),
    "logit gap": logit_gap,
    "families equal": families_equal,
    "families partly": families_partly,
    "families refused": families_refused,
    "formats quantised": lambda: formats(adapters=False),
    "formats adapters": lambda: formats(adapters=True),
}
"""What makes each table."""


def renewed(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """A document with its tables made anew."""
    for name, make in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if begin in text:
            before, rest = text.split(begin, 1)
            after = rest.split(end, 1)[1]
            text = f"{before}{begin}{make()}{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into the documents")
    arguments = parser.parse_args()
    stale = []
    for path in (path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))):
        text = path.read_text()
        wanted = renewed(text)
        if arguments.write:
            path.write_text(wanted)
        elif wanted != text:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        sys.exit(f"Tables are not those of the results in {', '.join(stale)}: run benchmarks/check_readme.py --write.")


if __name__ == "__main__":
    main()
