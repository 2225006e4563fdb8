"""How a parameter is divided among ranks, and which part of a value one of them has. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ranks import Ranks, VocabularyPart


@dataclass(frozen=True)
class Split:
    """Each rank holds a piece of the parameter along one dimension.

    Attributes:
        dim: the dimension, 0 or more.
        blocks: equal blocks that lie one after the other along it, such as the rows of gate and of up in one weight. A
            rank holds its piece of each.
        copies: ranks that hold the same piece, more than 1 where there are fewer KV heads than ranks. Neighbouring
            ranks do.
    """

    dim: int
    blocks: int = 1
    copies: int = 1

    def pieces(self, ranks: Ranks) -> int:
        """Different pieces of each block."""
        return ranks.size // self.copies

    def ranges(self, length: int, ranks: Ranks) -> list[tuple[int, int]]:
        """Begin and end of this rank's ranges of a dimension of `length`, one for each block."""
        block = length // self.blocks
        piece = block // self.pieces(ranks)
        begin = ranks.rank // self.copies * piece
        return [(number * block + begin, number * block + begin + piece) for number in range(self.blocks)]

    def take(self, whole: Any, shape: tuple[int, ...], ranks: Ranks) -> list[Any]:
        """What this rank holds of `whole`, one item for each block.

        Args:
            whole: a tensor of `shape`, or what reads parts of one from a file; it is indexed once for each block.
        """
        parts = [slice(begin, end) for begin, end in self.ranges(shape[self.dim], ranks)]
        indices = [(slice(None),) * self.dim + (part,) for part in parts]
        return [whole[index] for index in indices]


@dataclass(frozen=True)
class VocabularySplit(Split):
    """Each rank holds the rows of some tokens, equally many on all ranks: the last ones are filled up with zeros.

    Attributes:
        tokens: rows of the whole parameter.
    """

    tokens: int = 0

    def part(self, ranks: Ranks) -> VocabularyPart:
        """The tokens of this rank."""
        return VocabularyPart(ranks, self.tokens)

    def take(self, whole: Any, shape: tuple[int, ...], ranks: Ranks) -> list[Any]:
        """As `Split.take`."""
        part = self.part(ranks)
        rows = whole[part.first : part.first + part.held]
        return [torch.cat([rows, rows.new_zeros(part.length - part.held, *shape[1:])])]


@dataclass(frozen=True)
class Summand:
    """The parameter's value is a sum over the ranks: the first rank holds it, the others hold zeros.

    That is the bias of a product whose summands the ranks hold: it must be added once.
    """


Division = Split | Summand
"""A parameter that has none is whole on every rank."""


@dataclass(frozen=True)
class Part:
    """Which part of a model its modules hold.

    Attributes:
        ranks: the ranks that share it.
        divisions: how its parameters are divided, by path; others are whole.
    """

    ranks: Ranks
    divisions: Mapping[str, Division]

    def notes(self) -> list[str]:
        """What a report says about it: how much is divided, and which KV heads several ranks hold."""
        found = [f"{len(self.divisions)} parameters are divided among {self.ranks.size} ranks, by the model's own plan"]
        for path, division in self.divisions.items():
            if isinstance(division, Split) and division.copies > 1:
                found.append(f"{path}: {division.copies} ranks hold each KV head, as there are more ranks than heads")
        return found


@dataclass(frozen=True)
class Placement:
    """What a rank has of a value.

    Attributes:
        kind: "whole"; "piece", along `dim`; or "summand", where the value is the sum of what the ranks have.
        dim: the dimension of a piece.
        blocks: local sizes of the blocks along `dim`, of each of which the rank has a piece.
    """

    kind: str
    dim: int = -1
    blocks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"a piece along dimension {self.dim}" if self.kind == "piece" else f"a {self.kind}"


WHOLE, SUMMAND = Placement("whole"), Placement("summand")


def piece(dim: int, *blocks: int) -> Placement:
    """A piece along a dimension, in blocks of these local sizes."""
    return Placement("piece", dim, blocks)


def placement_of(division: Division, shape: tuple[int, ...]) -> Placement:
    """The placement of a parameter of which a rank holds a part of this shape."""
    if isinstance(division, Summand):
        return SUMMAND
    return piece(division.dim, *(shape[division.dim] // division.blocks,) * division.blocks)
