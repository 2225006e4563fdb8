"""A text ends at the token that completes a stop string, whatever the decoder does to tokens."""

import random

import pytest
from tokenizers import Tokenizer, models
from tokenizers import decoders as decoders_of

from sparsespec_compile.requests.stop_strings import StopStrings


class Pieces:
    """Each token is some text."""

    def __init__(self, *pieces):
        self.pieces = pieces
        self.decoded = 0

    def decode(self, token_ids):
        self.decoded += len(token_ids)
        return "".join(self.pieces[token] for token in token_ids)


class Bytes:
    """Tokens are bytes, and those from 256 on add nothing, as special tokens that are skipped."""

    def __init__(self, errors="replace"):
        self.errors = errors
        self.decoded = 0

    def decode(self, token_ids):
        self.decoded += len(token_ids)
        return bytes(token for token in token_ids if token < 256).decode(errors=self.errors)


class Stripping(Bytes):
    """Blanks at both ends go, as in decoders of SentencePiece."""

    def decode(self, token_ids):
        return super().decode(token_ids).strip()


def stops_at(tokens, decoder, *strings, before=()):
    """Tokens of the text at its end; None = it goes on."""
    check = StopStrings(strings, decoder, before)
    return next((end for end in range(1, len(tokens) + 1) if check(tokens[:end])), None)


@pytest.mark.parametrize("silent", [0, 1, 5, 40, 400])
@pytest.mark.parametrize("decoder", [Bytes(), Bytes("ignore"), Stripping()], ids=["bytes", "ignoring", "stripping"])
def test_tokens_that_add_no_text_hide_nothing(decoder, silent):
    """Between the characters of the string stand tokens that decode to nothing."""
    text = [byte for character in "say <stop> now" for byte in (ord(character), *[300] * silent)]
    end = text.index(ord(">")) + 1
    assert stops_at(text, decoder, "never", "<stop>") == end


@pytest.mark.parametrize("errors", ["replace", "ignore"])
@pytest.mark.parametrize("silent", [0, 3])
def test_characters_of_several_tokens(errors, silent):
    text = [byte for part in "ab€🙂cd".encode() for byte in (part, *[300] * silent)]
    assert stops_at(text, Bytes(errors), "€🙂c") == text.index(ord("c")) + 1


def test_a_string_may_begin_and_end_within_tokens():
    pieces = Pieces("las", "topper", "x", "stopping")
    assert stops_at([2, 0, 1, 2], pieces, "stop") == 3
    assert stops_at([2, 3, 2], pieces, "stop") == 2


def test_a_string_in_front_of_the_text_does_not_end_it_but_one_that_begins_there_does():
    pieces = Pieces("stop", "st", "op", "x")
    assert stops_at([3, 3, 3], pieces, "stop", before=[0]) is None
    assert stops_at([2, 3], pieces, "stop", before=[3, 1]) == 1
    assert stops_at([2, 3], pieces, "stop") is None


def test_blanks_that_are_stripped_until_more_text_comes():
    text = [ord(character) for character in "a" + 30 * " " + "b"]
    assert stops_at(text, Stripping(), 20 * " " + "b") == len(text)


def test_the_work_for_a_token_does_not_grow_with_the_text():
    """Nor with runs of tokens that add nothing."""
    for tokens in ([ord("a"), ord("b")] * 2000, [300] * 4000, ([ord("a")] + [300] * 30) * 130):
        decoder = Bytes()
        assert stops_at(tokens, decoder, "<stop>") is None
        assert decoder.decoded < 250 * len(tokens)


def test_random_texts_end_where_the_whole_text_first_holds_the_string():
    draw = random.Random(1)
    pieces = ("a", "b", "ab", "", "ba a", " ", "é", "")
    ended = 0
    for _ in range(300):
        string = "".join(draw.choice("ab é") for _ in range(draw.randint(1, 6)))
        tokens = [draw.randrange(len(pieces)) for _ in range(60)]
        whole = (n for n in range(1, 61) if string in Pieces(*pieces).decode(tokens[:n]))
        expected = next(whole, None)
        assert stops_at(tokens, Pieces(*pieces), string) == expected
        ended += expected is not None
    assert 50 < ended < 300


def decoders():
    """Decoders that models have, over the same pieces: bytes, words with a mark in front, parts of words."""
    marks = decoders_of.Sequence(
        [decoders_of.Replace("▁", " "), decoders_of.ByteFallback(), decoders_of.Fuse(), decoders_of.Strip(" ", 1, 0)]
    )
    words = ["a", "b", "ab", "▁a", "▁b", "▁", ".", "##a", "Ġa", "Ġ", "Ã", "©", "<0xC3>", "<0xA9>", "<0xE2>"]
    for decoder in (marks, decoders_of.ByteLevel(), decoders_of.WordPiece(), decoders_of.Metaspace()):
        tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="a"))
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["<s>", "</s>"])
        yield tokenizer


@pytest.mark.parametrize("tokenizer", list(decoders()), ids=lambda tokenizer: type(tokenizer.decoder).__name__)
def test_decoders_that_look_at_neighbours(tokenizer):
    """Special tokens are skipped; the first token of a text is treated in its own way, and blanks before a stop go."""
    draw = random.Random(2)
    ended = 0
    for _ in range(200):
        tokens = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(80)]
        first = draw.randrange(2, 50)
        string = tokenizer.decode(tokens)[first : first + draw.randint(1, 6)]
        if not string:
            continue
        expected = next((n for n in range(1, 81) if string in tokenizer.decode(tokens[:n])), None)
        assert stops_at(tokens, tokenizer, string) == expected
        ended += expected is not None
    assert ended > 100
