"""Picks the hard puzzles: held-out ones that the symbolic search, too, needs long traces for.

python -m examples.countdown.hard_puzzles
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from .puzzles import Puzzle, puzzles
from .tokenizer import CONTEXT
from .trace import write_trace

FILE = Path(__file__).with_name("hard_puzzles.json")
COUNT = 50
SEED = 7
MIN_TOKENS = 12_000
TRIES = 6
"""A puzzle is hard if this many searches in different orders all need over `MIN_TOKENS` tokens and one succeeds."""


def is_hard(puzzle: Puzzle, rng: random.Random) -> bool:
    """Whether all searches are long, and the puzzle is still within reach."""
    solved = False
    for _ in range(TRIES):
        trace = write_trace(puzzle, rng, CONTEXT)
        if len(trace.tokens) <= MIN_TOKENS:
            return False
        solved = solved or trace.solved
    return solved


def load_hard_puzzles() -> list[Puzzle]:
    """The hard puzzles that come with the example."""
    return [Puzzle(tuple(entry["numbers"]), entry["target"]) for entry in json.loads(FILE.read_text())]


def main() -> None:
    rng = random.Random(SEED)
    found: dict[Puzzle, None] = {}
    for puzzle in puzzles(SEED, held_out=True):
        if is_hard(puzzle, rng):
            found[puzzle] = None
        if len(found) == COUNT:
            break
    lines = [json.dumps({"numbers": puzzle.numbers, "target": puzzle.target}) for puzzle in found]
    FILE.write_text("[\n " + ",\n ".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
