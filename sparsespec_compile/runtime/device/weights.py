"""Follows a model's weights, which may change in place: notices that they have, and makes 8-bit copies of them anew.

Drafts read the copies. What these hold decides how many drafts are accepted, and never which text comes out: every
iteration that verifies or prefills runs the exact graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import quantise_rows
from sparsespec_compile.runtime.device.interface import Stream
from sparsespec_compile.runtime.host.iteration_times import IterationTime

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""Integers by their bytes, the widest first: sums of narrower ones than int64 take up to 30 times as long."""

_FACTORS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9


class WeightsRecord:
    """What weights were when they were last looked at.

    Versions that torch counts show most changes, but not those through `Tensor.data`, by which many rollout loops load
    weights. So the bits of each tensor are summed as well: over its rows and over its columns, and these sums once
    more, each times a number of its place, so that rows, columns or elements that trade places show.

    Args:
        weights: the tensors, of any dtype.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._versions: list[int] = []
        self._sums: list[int] | None = None

    @property
    def known(self) -> bool:
        """Whether they were looked at before."""
        return self._sums is not None

    @torch.no_grad()
    def changed(self, *, look_inside: bool = True) -> bool:
        """Whether any element differs from when it was last looked at; False in the first call.

        Args:
            look_inside: read all weights twice and wait for the current stream; without it versions alone are compared.
        """
        versions = [0 if weight.is_inference() else weight._version for weight in self._weights]
        sums = self._sums
        if look_inside or sums is None:
            parts = [_sum(weight) for weight in self._weights]
            sums = torch.stack(parts).tolist() if parts else []
        changed = self._sums is not None and (versions, sums) != (self._versions, self._sums)
        self._versions, self._sums = versions, sums
        return changed


def _sum(weight: Tensor) -> Tensor:
    """A number of all bits and their places, int64 []."""
    words = _words(weight.detach())
    if words.dim() < 2:
        return _placed(words.reshape(-1).long())
    rows = words.sum(dim=tuple(range(1, words.dim())), dtype=torch.int64)
    columns = words.sum(dim=tuple(range(words.dim() - 1)), dtype=torch.int64)
    return _placed(rows) * 3 + _placed(columns)


def _words(weight: Tensor) -> Tensor:
    """The bits of a tensor as the widest integers that its layout allows, several elements in one."""
    weight = torch.view_as_real(weight) if weight.is_complex() else weight
    if not weight.dim():
        return weight.view(_WORDS[weight.itemsize])
    weight = weight.permute(sorted(range(weight.dim()), key=weight.stride, reverse=True))
    steps = (weight.shape[-1], weight.storage_offset(), *weight.stride()[:-1])
    fitting = (
        word
        for width, word in _WORDS.items()
        if width == weight.itemsize
        or (width > weight.itemsize and weight.stride(-1) == 1 and not any(n * weight.itemsize % width for n in steps))
    )
    return weight.view(next(fitting))


def _placed(values: Tensor) -> Tensor:
    """A sum of int64 values [n], each mixed with its place: their highest bits would change nothing below them."""
    place = torch.arange(1, len(values) + 1, device=values.device)
    return _mixed(values * (_mixed(place * _FACTORS[0]) | 1)).sum()


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ (values >> 29)) * _FACTORS[1]
    return values ^ (values >> 32)


MOST_ROWS = {"int8": 64, "fp8": 256}
"""Rows of an iteration up to which products with copies of a kind are faster: on an H200 those of a layer of Qwen3-8B
take 67.7, 89.7 and 138 us at 2, 64 and 128 rows with int8, 61, 61 and 66 with fp8, and 106, 110 and 117 us with 16-bit
weights (benchmarks/LOG.md)."""

Copy = tuple[Tensor, Tensor, Tensor, bool]
"""A weight [N, K], its copy int8 or float8_e4m3fn [N, K], the scales of its rows float32 [N], and whether the copy lies
in pairs (`kernels.ops`)."""


class DraftCopies:
    """The copies of one graph. All steps over this graph share them.

    Args:
        copies: those that the graph reads, by tensors whose storage has no memory yet.
        kind: of the copies, a key of `QUANTISED_DTYPES`.
    """

    def __init__(self, copies: Sequence[Copy], kind: str) -> None:
        self.kind = kind
        self._copies = tuple(copies)
        self._holders: WeakSet[Any] = WeakSet()
        self._follows = False

    @property
    def count(self) -> int:
        """How many weights have a copy."""
        return len(self._copies)

    @property
    def bytes(self) -> int:
        """Bytes of all copies."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self._tensors())

    @property
    def held_bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    def hold(self, holder: object) -> None:
        """Have memory until `holder` gives it back, on the current stream of their device.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is none; what was taken is given back.
        """
        try:
            for tensor in self._tensors():
                if not tensor.untyped_storage().nbytes():
                    self._follows = False
                    tensor.untyped_storage().resize_(tensor.numel() * tensor.itemsize)
                    tensor.view(torch.uint8).zero_()
        except BaseException:
            self.give_back(holder)
            raise
        self._holders.add(holder)

    def give_back(self, holder: object) -> None:
        """`holder` runs no longer; give the memory back if none does."""
        self._holders.discard(holder)
        if not self._holders:
            for tensor in self._tensors():
                tensor.untyped_storage().resize_(0)

    def outdate(self) -> None:
        """The weights have changed, or may have."""
        self._follows = False

    def follow(self, stream: Stream) -> None:
        """Enqueue to copy the weights anew, if they may have changed. Call it before each iteration that reads them."""
        if not self._follows:
            self._follows = True
            stream.run(self._copy)

    @torch.no_grad()
    def _copy(self) -> None:
        for weight, copy, scale, paired in self._copies:
            quantise_rows(weight, self.kind, copy, scale, paired)

    def _tensors(self) -> list[Tensor]:
        return [tensor for _, copy, scale, _ in self._copies for tensor in (copy, scale)]


@dataclass(frozen=True)
class DraftGraph:
    """The graph for iterations in which every row is a draft.

    Attributes:
        forward: called as `step.Forward` is, while a step holds the copies.
        copies: what it reads.
        required: whether the settings ask for it by name: then it is not left out where memory is short.
        settled: told in a line what became of it, whenever a state is built.
        iteration_time: as in `build.Target`, with this graph; None = as there.
    """

    forward: Callable[..., Tensor]
    copies: DraftCopies
    required: bool
    settled: Callable[[str], object]
    iteration_time: IterationTime | None = None

    @property
    def most_rows(self) -> int:
        """Most rows of an iteration that is faster with the copies."""
        return MOST_ROWS[self.copies.kind]
