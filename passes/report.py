"""What the compiler did: a report with a record of each pass and attention node, and dumps of the graph.

`print(report)` shows tables. SPARSESPEC_DUMP names a folder for the graph before and after each pass.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch.fx import GraphModule

from .layout import AttentionLayer

WIDTH = 80
"""Columns of what `print` shows; rich and notebooks take what room they have."""


@dataclass(frozen=True)
class PassRecord:
    """One pass.

    Attributes:
        name: the pass.
        seconds: time that it took, verification included.
        matches: number of places that it changed or examined.
        notes: what it changed, and what it left and why.
    """

    name: str
    seconds: float
    matches: int
    notes: tuple[str, ...] = ()


@dataclass
class AttentionRecord:
    """One attention node, and what became of it.

    Attributes:
        layer: its heads, dimensions, scale, window or chunks, and soft-capping.
        module: path of the calling module in the model.
        outcome: "rewritten" after the attention rewrite, "not reached" before.
    """

    layer: AttentionLayer
    module: str
    outcome: str = "not reached"


@dataclass
class CompileReport(JupyterMixin):
    """The compiler's report on one model. `print` shows it in 80 columns, a notebook as HTML.

    Attributes:
        model: class of the model.
        versions: of torch and transformers.
        passes: in the order in which they ran, the capture first.
        attention: in the order of the forward pass.
        takes_single_rows: whether the graph, captured for two rows at least, gives the same for a row alone.
        draft_weights: what drafts read of the weights, and why.
    """

    model: str
    versions: str
    passes: list[PassRecord] = field(default_factory=list)
    attention: list[AttentionRecord] = field(default_factory=list)
    takes_single_rows: bool = False
    draft_weights: str = "exact weights"

    @property
    def seconds(self) -> float:
        """Time of all passes together."""
        return sum(record.seconds for record in self.passes)

    def notes(self, name: str) -> tuple[str, ...]:
        """The notes of the pass called `name`, empty when it did not run."""
        return next((record.notes for record in self.passes if record.name == name), ())

    def __rich__(self) -> Group:
        drafts = f"drafts: {self.draft_weights}"
        return Group(self._pass_table(), self._attention_table(), *self._note_lines(), drafts)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, record=True)
        console.print(self)
        return console.export_text()

    def _pass_table(self) -> Table:
        table = Table(title=f"{self.model}, {self.versions}, {self.seconds:.1f} s", box=SIMPLE_HEAD)
        for heading in ("pass", "seconds", "matches"):
            table.add_column(heading, justify="left" if heading == "pass" else "right", min_width=len(heading))
        for record in self.passes:
            table.add_row(record.name, f"{record.seconds:.2f}", str(record.matches))
        table.min_width = min(len(str(table.title)), WIDTH)
        return table

    def _attention_table(self) -> Table:
        table = Table(title="attention nodes", box=SIMPLE_HEAD)
        for heading in ("layers", "module", "q/KV", "dims", "attention", "outcome"):
            table.add_column(heading, overflow="fold")
        alike: dict[tuple, list[AttentionRecord]] = {}
        for record in self.attention:
            kind = replace(record.layer, layer=0), _NUMBER.sub("*", record.module), record.outcome
            alike.setdefault(kind, []).append(record)
        for records in alike.values():
            record = records[0]
            layer = record.layer
            reach = "chunks of" if layer.chunked else "window"
            settings = {"scale": f"{layer.scale:.4g}", reach: layer.window, "softcap": layer.softcap}
            table.add_row(
                ranges([one.layer.layer for one in records]),
                record.module if len(records) == 1 else _NUMBER.sub("*", record.module),
                f"{layer.q_heads}/{layer.kv_heads}",
                f"{layer.key_dim}/{layer.value_dim}",
                "\n".join(f"{name} {value}" for name, value in settings.items() if value),
                record.outcome,
            )
        return table

    def _note_lines(self) -> list[str]:
        return [f"{record.name}: {note}" for record in self.passes for note in fold(record.notes)]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer in the path of a module."""


def fold(notes: Iterable[str]) -> list[str]:
    """Notes that differ in the number of one layer alone become one note, which says for which layers it holds."""
    alike: dict[str, list[tuple[str, int]]] = {}
    for note in notes:
        numbers = set(_NUMBER.findall(note))
        layer = int(numbers.pop()) if len(numbers) == 1 else -1
        alike.setdefault(_NUMBER.sub("*", note) if layer >= 0 else note, []).append((note, layer))
    lines = []
    for text, found in alike.items():
        layers = [layer for _, layer in found]
        lines.append(f"{text} (* = {ranges(layers)})" if len(found) > 1 and layers[0] >= 0 else found[0][0])
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `0-4, 6-10, 12`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


DUMP_VARIABLE = "SPARSESPEC_DUMP"


class Dumper:
    """Writes numbered files into the folder that SPARSESPEC_DUMP names, or nothing when it is unset."""

    def __init__(self) -> None:
        chosen = os.environ.get(DUMP_VARIABLE)
        self.folder = Path(chosen) if chosen else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, number: int, name: str, moment: str, graph_module: GraphModule) -> None:
        """Writes `graph_module` to `<number>_<name>_<moment>.py`, with shapes and types as comments."""
        if self.folder is None:
            return
        file = self.folder / f"{number:02d}_{name.replace(' ', '_')}_{moment}.py"
        file.write_text(graph_module.print_readable(print_output=False) + "\n", encoding="utf-8")
