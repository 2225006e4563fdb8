"""Ends a text at a string that may span tokens."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], /) -> str:
        """Text of some tokens."""


class StopStrings:
    """Whether the newest token completes one of some strings.

    Args:
        strings: at least one, none of them empty.
        tokenizer: decodes tokens.

    Only the end of a text is decoded: a string of c characters has at most 4c bytes, and a token at least one byte. A
    few more tokens are decoded in front, since a tokenizer may treat the first one in its own way.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Decoder) -> None:
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._tail = max(len(string.encode()) for string in strings) + 4

    def __call__(self, tokens: list[int]) -> bool:
        """Whether `tokens`, the new tokens of a text, hold one of the strings at their end."""
        text = self._tokenizer.decode(tokens[-self._tail :])
        return any(string in text for string in self._strings)
