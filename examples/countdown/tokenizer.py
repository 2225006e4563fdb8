"""The vocabulary of the traces, one token a word, and the tokenizer files that transformers loads."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .puzzles import MAX_VALUE

PAD, EOS = "<pad>", "<eos>"
_WORDS = ["\n", "solve", "for", "answer", "|", "?", "^", ":", ",", "=", "x", "!", "+", "-", "*", "/"]
_NUMBERS = [str(value) for value in range(1, MAX_VALUE + 1)]
VOCABULARY_SIZE = 1280
LABELS = VOCABULARY_SIZE - 2 - len(_WORDS) - len(_NUMBERS)
"""Labels fill the vocabulary: more than a trace of 16k tokens needs, so that none is given twice in it."""
VOCABULARY = {
    token: index for index, token in enumerate([PAD, EOS, *_WORDS, *_NUMBERS, *(f"#{i}" for i in range(LABELS))])
}
CONTEXT = 16384


def encode(tokens: list[str]) -> list[int]:
    """The ids of a trace's tokens: what the tokenizer gives for its text, without the detour through text."""
    return [VOCABULARY[token] for token in tokens]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: words stand between spaces, a line's end is a word of its own."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    # Every word but a line's end brings its own space, so that a text can be decoded piece by piece while it grows.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(r"(?<!\n)\z"), " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    build_tokenizer().save_pretrained(directory)
