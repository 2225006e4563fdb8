"""Writes the graph before and after each pass, for people to read and compare."""

from __future__ import annotations

import os
from pathlib import Path

from torch.fx import GraphModule

VARIABLE = "SPARSESPEC_DUMP"


class Dumper:
    """Writes numbered files into the folder that SPARSESPEC_DUMP names, or nothing when it is unset."""

    def __init__(self) -> None:
        chosen = os.environ.get(VARIABLE)
        self.folder = Path(chosen) if chosen else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, number: int, name: str, moment: str, graph_module: GraphModule) -> None:
        """Writes `graph_module` to `<number>_<name>_<moment>.py`, with shapes and types as comments."""
        if self.folder is None:
            return
        file = self.folder / f"{number:02d}_{name.replace(' ', '_')}_{moment}.py"
        file.write_text(graph_module.print_readable(print_output=False) + "\n", encoding="utf-8")
