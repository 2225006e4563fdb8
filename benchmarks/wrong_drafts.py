"""Drafts that are wrong on purpose: what a model whose drafts are right less often would gain.

The Countdown model is an easy judge: nearly all of its drafts by pillars are right. `WrongDrafts` stands around a
compiled graph and spoils some of the drafts that the model makes: the logits of a draft row move by one token, so that
another token is drawn, and drafting goes on from it, as it does from a model's own mistakes.

What is meant by a rate here: **of the drafts whose predecessors in their cycle were right, the share that is right.**
Where `share` of the drafts are left alone, the rate is the model's own times `share`; where texts are sampled, a few
per cent of the spoiled drafts are right by chance, too. Of k drafts q + q^2 + ... + q^k are accepted at rate q
(`accepted_of`): the paper's 6.16 of 8 drafts, 77% of all, take a rate of 94.2%.

Which drafts are spoiled is a function of the slot, the position and a seed, alike for all runs, cycles and numbers of
drafts; those of one share are among those of every lower share. No position is judged twice, since what follows a wrong
draft is not judged, so outcomes are independent.

Verified rows and prompts are left alone, so the text is the same whatever the share. Drafts that run no pass of the
model (`drafter="ngram"`) come from the text, and are left alone too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode, StepTensors

Forward = Callable[..., Tensor]
"""The rewritten graph, see `runtime.device.step.Forward`."""

_DRAFT = int(Mode.DRAFT)  # torch.compile takes a tensor and an enum for unequal

_KEPT, _STEP = 2, 6
"""Places of the logits' rows, and of the first of the step tensors, among the graph's inputs."""

_WORDS, _MASK = 2**32, 2**32 - 1


class Share:
    """The share of drafts that are left alone, on a device, where captured steps read it.

    Args:
        device: of the graph.
        seed: another one spoils other drafts.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.seed = seed
        self.threshold = torch.full((), _WORDS, dtype=torch.int64, device=device)

    def set(self, share: float) -> None:
        """From the next step on; 1.0 spoils none."""
        self.threshold.fill_(round(share * _WORDS))


class WrongDrafts:
    """A graph in whose draft rows logits move by one token, unless `share` leaves them alone.

    Args:
        forward: the graph.
        share: what is left alone.
        compiler: applied to what is done to the logits, such as `torch.compile`.
    """

    def __init__(self, forward: Forward, share: Share, compiler: Callable[[Forward], Forward]) -> None:
        self._forward = forward
        self._share = share
        self._spoil = compiler(spoil)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits [1, R, V], of the graph's inputs."""
        step = StepTensors(*inputs[_STEP : _STEP + len(StepTensors._fields)])
        logits = self._forward(*inputs)
        where = (step.request_mode, step.row_start, step.row_count, step.cached_length)
        return self._spoil(logits, inputs[_KEPT], *where, self._share.threshold, self._share.seed)


def spoil(
    logits: Tensor,
    kept: Tensor,
    mode: Tensor,
    row_start: Tensor,
    row_count: Tensor,
    cached: Tensor,
    threshold: Tensor,
    seed: int,
) -> Tensor:
    """Logits [1, R, V] of rows `kept` int64 [R], those of some drafts moved to the next token; the others [S]."""
    place = kept[:, None] - row_start
    drafting = (mode == _DRAFT) & (place >= 0) & (place < row_count)  # [R, S]
    slot = torch.arange(mode.shape[0], device=mode.device)
    wrong = (drafting & (words(slot, cached + place, seed) >= threshold)).any(dim=1)
    return torch.where(wrong[None, :, None], logits.roll(1, dims=-1), logits)


def words(slot: Tensor, position: Tensor, seed: int) -> Tensor:
    """A 32-bit word for each slot and position, int64, by rounds of multiplication and shift."""
    word = (position * 0x1F123BB5 + slot * 0x5851F42D + (seed + 1) * 0x2545F491) & _MASK
    for factor in (0x21F0AAAD, 0x735A2D97):
        word = ((word ^ (word >> 16)) * factor) & _MASK
    return word ^ (word >> 15)


def accepted_of(drafts: int, rate: float) -> float:
    """Drafts accepted of a cycle of so many, where each is right with probability `rate` if those before it are."""
    return sum(rate**n for n in range(1, drafts + 1))


def rate_for(accepted: float, drafts: int) -> float:
    """The rate at which so many of a cycle's drafts are accepted, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if accepted_of(drafts, middle) < accepted else (low, middle)
    return low
