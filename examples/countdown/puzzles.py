"""Countdown puzzles: reach a target from four to six numbers with + - * /.

A number is used once at most and need not be used at all; every result is a positive integer of at most `MAX_VALUE`.
An answer is a list of steps such as ``25 - 8 = 17``: each takes two of the numbers at hand and puts back its result,
and the last result is the target.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

MAX_VALUE = 299
"""No result exceeds this: small enough for a model of a few million parameters to learn the arithmetic by heart."""
MAX_NUMBER = 40
MIN_TARGET, MAX_TARGET = 61, 199
SIZES = (4, 5, 6)
HELD_OUT_SHARE = 20
"""One puzzle in this many is held out of training."""

_PUZZLE = re.compile(r"solve ((?:\d+ )+)for (\d+)")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


class PuzzleError(ValueError):
    """A text or numbers that are no puzzle of this game."""


class Move(NamedTuple):
    """One operation on two numbers, the larger first, and the numbers it leaves untouched."""

    left: int
    operator: str
    right: int
    result: int
    rest: tuple[int, ...]

    @property
    def state(self) -> tuple[int, ...]:
        """The numbers at hand after the move: the result, then the untouched ones in their order."""
        return (self.result, *self.rest)


class Verdict(NamedTuple):
    """Whether an answer is right, and the reason if it is not."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class Puzzle:
    """The numbers, in the order in which they are shown, and the target."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if len(self.numbers) not in SIZES or len(set(self.numbers)) < len(self.numbers):
            raise PuzzleError(f"got the numbers {self.numbers}; a puzzle has {SIZES} numbers, all different")
        if not all(1 <= value <= MAX_VALUE for value in (*self.numbers, self.target)):
            raise PuzzleError(f"got {self.numbers} for {self.target}; numbers and target lie in 1..{MAX_VALUE}")

    @property
    def prompt(self) -> str:
        """The text that a model continues."""
        return f"solve {' '.join(map(str, self.numbers))} for {self.target}\n"

    @property
    def held_out(self) -> bool:
        """Whether the puzzle is in the held-out split; the order of the numbers makes no difference."""
        key = " ".join(map(str, (*sorted(self.numbers), self.target)))
        return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def parse_puzzle(text: str) -> Puzzle:
    """The puzzle that a prompt, or a text which starts with one, states."""
    match = _PUZZLE.match(text)
    if match is None:
        raise PuzzleError(f"got {text[:60]!r}; a prompt reads like 'solve 3 8 12 25 for 97'")
    return Puzzle(tuple(map(int, match[1].split())), int(match[2]))


def calculate(left: int, operator: str, right: int) -> int | None:
    """The result of one operation, None where it is no integer in 1..`MAX_VALUE`."""
    if operator == "/":
        result = left // right if right and left % right == 0 else 0
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return result if 1 <= result <= MAX_VALUE else None


def moves_on_pair(state: tuple[int, ...], i: int, j: int) -> list[Move]:
    """The moves worth trying on the numbers at places i and j, in the order + - * /.

    Multiplying or dividing by 1 changes nothing and is left out.
    """
    left, right = max(state[i], state[j]), min(state[i], state[j])
    rest = tuple(number for place, number in enumerate(state) if place not in (i, j))
    results = [(operator, calculate(left, operator, right)) for operator in ("+-" if right == 1 else "+-*/")]
    return [Move(left, operator, right, result, rest) for operator, result in results if result is not None]


def legal_moves(state: tuple[int, ...]) -> list[Move]:
    """The moves worth trying from a state."""
    return [move for i, j in combinations(range(len(state)), 2) for move in moves_on_pair(state, i, j)]


def random_puzzle(rng: random.Random) -> Puzzle:
    """A solvable puzzle: its target is what a random play with all its numbers reaches."""
    size = rng.choice(SIZES)
    while True:
        numbers = state = tuple(rng.sample(range(1, MAX_NUMBER + 1), size))
        while len(state) > 1 and (moves := legal_moves(state)):
            state = rng.choice(moves).state
        if len(state) == 1 and MIN_TARGET <= state[0] <= MAX_TARGET:
            return Puzzle(numbers, state[0])


def puzzles(seed: int, held_out: bool) -> Iterator[Puzzle]:
    """An endless stream of puzzles of one split: those of the other can never appear in it."""
    rng = random.Random(seed)
    while True:
        puzzle = random_puzzle(rng)
        if puzzle.held_out == held_out:
            yield puzzle


def check_answer(text: str) -> Verdict:
    """Checks the answer at the end of a solution, exactly.

    Args:
        text: the whole text, from the prompt to the answer; what stands between the two is not looked at.
    """
    puzzle = parse_puzzle(text)
    _, found, answer = text.rpartition("answer")
    if not found:
        return Verdict(False, "no answer")
    at_hand, result = Counter(puzzle.numbers), None
    for left, operator, right, stated in STEP.findall(answer):
        used = Counter((int(left), int(right)))
        result = calculate(int(left), operator, int(right))
        if result != int(stated):
            return Verdict(False, f"{left} {operator} {right} is not {stated}")
        if used - at_hand:
            return Verdict(False, f"{left} {operator} {right} uses a number that is not at hand")
        at_hand = at_hand - used + Counter((result,))
    if result != puzzle.target:
        return Verdict(False, f"the answer reaches {result} instead of {puzzle.target}")
    return Verdict(True, "right")
