"""Training batches: traces packed one after the other into rows of a fixed number of tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .puzzles import puzzles
from .tokenizer import VOCABULARY, encode
from .trace import Trace, write_trace

IGNORE = -100
MAX_DOCUMENTS = 128
_FILLER = VOCABULARY["\n"]


class Batch(NamedTuple):
    """Packed traces: T tokens, each trace at positions 0, 1, 2, ...

    Attributes:
        tokens: int64 [T].
        targets: int64 [T], the token that follows each; `IGNORE` where nothing is to be learned (inside a prompt, which
            no rule decides, and in the filler).
        positions: int64 [T], within the token's trace.
        boundaries: int32 [MAX_DOCUMENTS + 1], where traces start and end; the last value is T, repeated.
        determined: bool [T], whether the target follows from what stands before it.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor
    determined: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack(traces: Iterator[Trace], size: int) -> Batch:
    """Fills one batch of `size` tokens; the last trace is cut off where the batch ends."""
    tokens: list[int] = []
    targets: list[int] = []
    positions: list[int] = []
    determined: list[bool] = []
    boundaries = [0]
    while len(tokens) < size:
        if len(boundaries) < MAX_DOCUMENTS:
            trace = next(traces)
            ids = encode(trace.tokens)
            following = [IGNORE] * (trace.prompt_length - 1) + ids[trace.prompt_length :]
            free = set(trace.free)
            ruled = [position not in free for position in range(1, len(ids))]
        else:
            ids = [_FILLER] * (size - len(tokens) + 1)
            following = [IGNORE] * (len(ids) - 1)
            ruled = [False] * (len(ids) - 1)
        tokens += ids[:-1]
        targets += following
        determined += ruled
        positions += range(len(ids) - 1)
        boundaries.append(min(len(tokens), size))
    boundaries += [size] * (MAX_DOCUMENTS + 1 - len(boundaries))
    return Batch(
        torch.tensor(tokens[:size]),
        torch.tensor(targets[:size]),
        torch.tensor(positions[:size]),
        torch.tensor(boundaries, dtype=torch.int32),
        torch.tensor(determined[:size]),
    )


def traces(seed: int, held_out: bool, window: int) -> Iterator[Trace]:
    """Fresh traces of fresh puzzles of one split, cut off after window + 1 tokens (one more than inputs)."""
    rng = random.Random(f"{seed} order")
    return (write_trace(puzzle, rng, window + 1) for puzzle in puzzles(seed, held_out))


class _Stream(IterableDataset[Batch]):
    def __init__(self, seed: int, window: int, size: int) -> None:
        self.seed, self.window, self.size = seed, window, size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        stream = traces(self.seed * 1000 + (worker.id if worker else 0), False, self.window)
        while True:
            yield pack(stream, self.size)


def training_batches(seed: int, window: int, size: int, workers: int) -> Iterator[Batch]:
    """An endless stream of training batches, written by worker processes while the model trains."""
    loader = DataLoader(
        _Stream(seed, window, size),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
