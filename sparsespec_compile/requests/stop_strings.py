"""Ends a text at a string that may span tokens."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = False) -> str:
        """Text of some tokens, with or without special ones."""


class StopStrings:
    """Whether the newest token of one text completes one of some strings.

    Args:
        strings: at least one, none of them empty.
        tokenizer: decodes tokens.
        before: tokens in front of the text, in which a string may begin, such as its prompt's.

    A window of the latest tokens is decoded for each new one. Its size follows the text it decodes to, not a number of
    tokens, because a decoder may drop some (special tokens) and may need several for one character. The window always
    holds more characters than the longest string, and a few tokens in front of them, because decoders treat a first
    token in their own way. Of a run of tokens that add no text, only the latest are kept, as many as the longest string
    has bytes and four more: enough for the beginning of a character and for blanks that a decoder strips. So the work
    for a token does not grow with the text.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Decoder, before: Sequence[int] = ()) -> None:
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._characters = max(map(len, strings)) + 4
        self._tail = max(len(string.encode()) for string in strings) + 4
        self._window = list(before[-self._tail :])
        self._text = tokenizer.decode(self._window) if self._window else ""
        self._limit = 2 * self._tail
        self._silent = 0  # tokens at the window's end that added no text
        self._read = 0

    def __call__(self, tokens: list[int]) -> bool:
        """Whether a string ends within the newest of `tokens`, the text's new tokens so far, which only grow."""
        fresh, self._read = tokens[self._read :], len(tokens)
        return any(self._take(token) for token in fresh)

    def _take(self, token: int) -> bool:
        self._window.append(token)
        before, self._text = self._text, self._tokenizer.decode(self._window)
        if self._text == before:
            self._forget_silent()
            return False
        self._silent = 0
        known = _common(before, self._text)
        found = any(self._text.find(string, max(0, known - len(string) + 1)) >= 0 for string in self._strings)
        if len(self._window) > self._limit:
            self._shrink()
        return found

    def _forget_silent(self) -> None:
        self._silent += 1
        if self._silent > self._tail:
            del self._window[-self._silent]
            self._silent -= 1

    def _shrink(self) -> None:
        """Keep the shortest end of the window, by doubling, that holds enough text."""
        size = self._tail
        while size < len(self._window):
            text = self._tokenizer.decode(self._window[-size:])
            if len(text) >= self._characters:
                self._window, self._text = self._window[-size:], text
                break
            size *= 2
        self._limit = 2 * max(self._tail, len(self._window))


def _common(before: str, after: str) -> int:
    """Characters at the beginning that both texts have."""
    if after.startswith(before):
        return len(before)
    return next((nth for nth, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
