"""The ranks that share a model. Plain data, which compiler and runtime both read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model together, a part each, and which of them this one is.

    Attributes:
        rank: number of this process among them, 0 for the first.
        size: how many they are, at least 2.
        group: name of their process group in `torch.distributed`, the same on all of them. Ops take it as an argument.
    """

    rank: int
    size: int
    group: str


PART_MULTIPLE = 8
"""Each rank's tokens are a multiple of this: noise is drawn 4 tokens at a time, and products need 16-byte rows."""


@dataclass(frozen=True)
class VocabularyPart:
    """The tokens of which a rank has embeddings and logits.

    Attributes:
        ranks: the ranks that share the vocabulary.
        tokens: of the vocabulary, V.
    """

    ranks: Ranks
    tokens: int

    @property
    def length(self) -> int:
        """Rows that every rank has room for; the last ranks may hold fewer tokens."""
        return -(-self.tokens // (self.ranks.size * PART_MULTIPLE)) * PART_MULTIPLE

    @property
    def first(self) -> int:
        """This rank's first token."""
        return self.ranks.rank * self.length

    @property
    def held(self) -> int:
        """Tokens that this rank holds."""
        return max(min(self.length, self.tokens - self.first), 0)

    @property
    def possible(self) -> bool:
        """Whether every rank would hold a token."""
        return (self.ranks.size - 1) * self.length < self.tokens
