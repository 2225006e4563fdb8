"""Real reasoning of a given length, for decoding that starts deep in a text."""

import random

from countdown_model import EXAMPLES  # noqa: F401  makes the example importable
from transformers import PreTrainedTokenizerBase

from countdown.hard_puzzles import load_hard_puzzles  # isort: skip
from countdown.trace import write_trace  # isort: skip


def recorded_traces(tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int = 1) -> list[list[int]]:
    """`count` searches of the kind that the Countdown model was trained on, each cut at exactly `length` tokens.

    All are of puzzles that need long searches, each in an order of its own, so that no search has ended before the cut.
    """
    rng = random.Random(seed)
    puzzles = load_hard_puzzles()
    traces: list[list[int]] = []
    while len(traces) < count:
        trace = write_trace(puzzles[len(traces) % len(puzzles)], rng, length)
        if not trace.solved:
            traces.append(tokenizer.convert_tokens_to_ids(trace.tokens))
    return traces
