"""The search that the model learns to write out: depth first, in random order, every step of it a line of text.

A line executes one move. It starts with the label under which the move was planned, states the result and the untouched
numbers, and goes on in one of four ways::

    #7 40 - 3 = 37 | 12 5 25 ? #8 37 + 5 | 12 25 #9 25 - 12 | 37 5 ^     plan further moves under new labels
    #9 25 - 12 = 13 | 12 5 x #9                                          a number twice: give up
    #31 21 + 5 = 26 | 12 : 26 + 12 = 38 , 26 - 12 = 14 x #31             two numbers left: try all, give up
    #31 21 + 5 = 26 | 12 : 26 + 12 = 38 ! #31 ^ #30 ^ #7 ^ #1            the target: name the moves that led to it

A move that failed is followed by the next one of its plan. Where it was the last, ``^`` and the label of the move that
had made the plan follow: that one has failed too, and so on. All that decides the next line stands in the plan that
holds the label, be it ten tokens back or ten thousand.
"""

from __future__ import annotations

import random
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple

from .puzzles import Move, Puzzle, legal_moves, moves_on_pair
from .tokenizer import EOS, LABELS

MOVES_PLANNED = 3
"""Moves of a plan while more than three numbers are left; with three left, a plan holds all moves."""


class Trace(NamedTuple):
    """A search as tokens.

    Attributes:
        tokens: prompt, search and answer. Cut off at the limit if the search is longer.
        prompt_length: the number of tokens of the prompt.
        free: positions of tokens that were drawn at random. All others follow from what stands before them.
        solved: whether the search reached the target before the limit.
    """

    tokens: list[str]
    prompt_length: int
    free: list[int]
    solved: bool


class _OutOfTokens(Exception):
    pass


class _Search:
    """One search; `tokens` grows until the target is found or the limit reached."""

    def __init__(self, puzzle: Puzzle, rng: random.Random, limit: int) -> None:
        self.puzzle, self.rng, self.limit = puzzle, rng, limit
        self.tokens = ["solve", *map(str, puzzle.numbers), "for", str(puzzle.target), "\n"]
        self.free = [len(self.tokens)]
        # The first label is drawn, so that a short text teaches as much about label 900 as about label 3.
        self.next_label = rng.randrange(LABELS)
        self.steps: list[list[str]] = []

    def run(self) -> None:
        """Searches until the target is found."""
        root = self._new_label()
        untried: list[Move] = []
        while True:
            # All first moves are tried before any is tried again (what is planned below them differs every time).
            untried = untried or self.rng.sample(moves := legal_moves(self.puzzle.numbers), len(moves))
            moves, untried = untried[:MOVES_PLANNED], untried[MOVES_PLANNED:]
            self.tokens += [root, "|", *map(str, self.puzzle.numbers)]
            if self._try_moves(root, moves):
                self._write_answer()
                return
            self.tokens.append("\n")

    def _new_label(self) -> str:
        label = f"#{self.next_label}"
        self.next_label = (self.next_label + 1) % LABELS
        return label

    def _choose(self, state: tuple[int, ...]) -> list[Move]:
        if len(state) > 3:
            moves = legal_moves(state)
            return self.rng.sample(moves, min(MOVES_PLANNED, len(moves)))
        pairs = list(combinations(range(3), 2))
        self.rng.shuffle(pairs)
        return [move for pair in pairs for move in moves_on_pair(state, *pair)]

    def _try_moves(self, owner: str, moves: list[Move]) -> bool:
        """Plans the moves and executes them one by one; the plan's owner has failed if none of them leads on."""
        tokens = self.tokens
        tokens.append("?")
        plan = [(self._new_label(), move) for move in moves]
        for label, move in plan:
            self.free += range(len(tokens) + 1, len(tokens) + 4)
            tokens += [label, str(move.left), move.operator, str(move.right), "|", *map(str, move.rest)]
        tokens.append("^")
        for label, move in plan:
            tokens.append("\n")
            if len(tokens) >= self.limit:
                raise _OutOfTokens
            if self._execute(label, move):
                tokens += ["^", owner]
                return True
        tokens += ["^", owner]
        return False

    def _execute(self, label: str, move: Move) -> bool:
        tokens = self.tokens
        step = [label, str(move.left), move.operator, str(move.right), "=", str(move.result)]
        tokens += step
        self.steps.append(step)
        if move.result == self.puzzle.target:
            tokens += ["!", label]
            return True
        tokens += ["|", *map(str, move.rest)]
        if move.result not in move.rest:
            if len(move.rest) == 1:
                found = self._try_last_pair(label, move.state)
            else:
                found = self._try_moves(label, self._choose(move.state))
                if not found:
                    self.steps.pop()
                return found
            if found:
                return True
        tokens += ["x", label]
        self.steps.pop()
        return False

    def _try_last_pair(self, label: str, state: tuple[int, ...]) -> bool:
        separator = ":"
        for move in moves_on_pair(state, 0, 1):
            step = [str(move.left), move.operator, str(move.right), "=", str(move.result)]
            self.tokens += [separator, *step]
            if move.result == self.puzzle.target:
                self.steps.append(step)
                self.tokens += ["!", label]
                return True
            separator = ","
        return False

    def _write_answer(self) -> None:
        self.tokens += ["\n", "answer"]
        for index, step in enumerate(self.steps):
            self.tokens += [",", *step] if index else step
        self.tokens.append(EOS)


def write_trace(puzzle: Puzzle, rng: random.Random, limit: int) -> Trace:
    """Searches the puzzle and writes the search down.

    Args:
        rng: decides the order of tries and the first label.
        limit: the greatest number of tokens; a longer trace is cut off there.
    """
    search = _Search(puzzle, rng, limit)
    prompt_length = search.free[0]
    with suppress(_OutOfTokens):
        search.run()
    tokens = search.tokens[:limit]
    return Trace(tokens, prompt_length, search.free, tokens[-1] == EOS)
