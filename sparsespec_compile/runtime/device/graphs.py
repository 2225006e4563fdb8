"""Runs a step: as it is, or captured in CUDA graphs, one for each padded number of rows and variant of the step.

What a request does is data, so a graph serves every mix of drafts, verifications and prompts that fits its rows and
keeps the variant's promise.
"""

import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from sparsespec_compile.errors import GraphMemoryWarning, PoolTooSmallError
from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.runtime.device.inputs import MIN_ROWS
from sparsespec_compile.runtime.device.interface import Graph, Graphs
from sparsespec_compile.runtime.device.processing import Processing, RowProcessors
from sparsespec_compile.runtime.device.step import Step, Variant, with_processing

_FIRST_RUNS, _LATER_RUNS = 2, 1
"""Runs before the first capture and before others: one compiles and lets libraries load what they need for a size, the
very first one also allocates."""


def row_counts(most: int) -> list[int]:
    """Padded numbers of rows, ascending up to `most`: those at which products get dearer, from 256 on by a quarter.

    On H200s the products of a layer of Qwen3-8B, each timed by itself, take 103, 104, 110, 113, 118 and 149 us together
    for 2, 16, 64, 128, 160 and 256 rows; 192 are those of 64 requests with two proposals each. More sizes would gain
    little, and each takes time to capture (benchmarks/LOG.md).
    """
    sizes = [MIN_ROWS, 16, 64, 128, 160, 192, 256]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 5 // 4 // 16 * 16)
    return [*(size for size in sizes if size < most), max(most, MIN_ROWS)]


def padded(rows: float, sizes: Sequence[int]) -> int:
    """The least of `row_counts` that holds so many rows; the most where none does."""
    return sizes[min(bisect_left(sizes, rows), len(sizes) - 1)]


class StepRunner:
    """Runs `step` for any number of rows, on the current stream.

    Args:
        step: the computation.
        graphs: what captures it; None = it runs as it is.
        fewest_rows: rows that the step's graph takes at least, when it is not captured.
        shared: whether ranks share the model. Then all of them must replay the same steps, and none may take another
            one because its own memory is short.
    """

    def __init__(self, step: Step, graphs: Graphs | None, *, fewest_rows: int = MIN_ROWS, shared: bool = False) -> None:
        self.step = step
        self._shared = shared
        self._fewest_rows = fewest_rows
        sizes = step.inputs.sizes
        self._sizes = row_counts(sizes.rows)
        self._graphs = graphs
        self._captured: dict[tuple[int, Variant], Graph] = {}
        self._refused: set[tuple[int, Variant]] = set()  # steps for whose capture there was no memory

    def prepare(
        self,
        rows: Mapping[Promise, Iterable[int]],
        *,
        filters: bool = False,
        processing: Collection[Processing] = (),
    ) -> None:
        """Capture the steps with these numbers of rows and promises, without log-probabilities, before they are needed.

        Steps in which a prompt ends are captured when they are first needed, the largest aside. `filters`: whether
        tokens will be drawn with filters. `processing`: what will be done to logits; with some, steps that do
        nothing to them are captured when they are first needed.
        """
        if self._graphs is None:
            return
        asked = [self._largest]
        for promise, numbers in rows.items():
            drafts, kind = self.step.drafts, with_processing(Variant(promise=promise), processing)
            kind = self.step.whole_rows_where_needed(kind, filters)
            sizes = [padded(number, self._sizes) for number in numbers]
            asked += [(size, kind) for size in sizes]
            if promise is Promise.SMALL_TILES and drafts is not None:
                by_copies = replace(kind, draft_weights=True)
                asked += [(size, by_copies) for size in sizes if size <= drafts.most_rows]
        missing = [key for key in dict.fromkeys(asked) if key not in self._captured and key not in self._refused]
        for key in tqdm(missing, desc="capturing", unit=" steps", leave=False, disable=None):
            self._capture_or_refuse(self._graphs, key)

    def __call__(
        self, rows: int, logits: int, variant: Variant, of_slot: Mapping[int, RowProcessors] | None = None
    ) -> None:
        """Run an iteration of `rows` packed rows, of which `logits` have logits, which the step's inputs hold.

        `of_slot`: functions that the logits of some slots go through; with some the step runs as it is, uncaptured.
        """
        if self._graphs is None:
            self.step(max(rows, self._fewest_rows), max(logits, self._fewest_rows), variant, of_slot)
            return
        size = padded(rows, self._sizes)
        if of_slot:
            self.step(size, min(size, self.step.inputs.sizes.logits), variant, of_slot)
            return
        if not self._captured:
            # The largest first: the others fit into its memory.
            self._capture(self._graphs, self._sizes[-1], replace(self.step.any_work, logprobs=variant.logprobs))
        key = (size, variant)
        if key not in self._captured and key not in self._refused:
            self._capture_or_refuse(self._graphs, key)
        self._captured[self._largest if key in self._refused else key].replay()

    @property
    def _largest(self) -> tuple[int, Variant]:
        """The step that does whatever the others do, but for log-probabilities."""
        return self._sizes[-1], self.step.any_work

    def _capture_or_refuse(self, graphs: Graphs, key: tuple[int, Variant]) -> None:
        """Capture a step. Without memory for it, the largest captured step replaces it from now on, if there is one.

        Raises:
            PoolTooSmallError: there is no memory, and no other step that does what this one does.
        """
        rows, variant = key
        try:
            self._capture(graphs, rows, variant)
        except PoolTooSmallError as error:
            if variant.logprobs or variant.processed or self._shared or self._largest not in self._captured:
                raise
            warnings.warn(
                f"{error} Until then such steps take as long as the largest.", GraphMemoryWarning, stacklevel=2
            )
            self._refused.add(key)

    def _capture(self, graphs: Graphs, rows: int, variant: Variant) -> None:
        """Capture with inputs that hold no work, so that the runs before it change nothing; then put them back."""
        inputs = self.step.inputs
        work = partial(self.step, rows, min(rows, inputs.sizes.logits), variant)
        kept = inputs.flat.clone()
        inputs.clear()
        try:
            graph = graphs.capture(work, _LATER_RUNS if self._captured else _FIRST_RUNS)
        except torch.OutOfMemoryError as error:
            raise PoolTooSmallError(
                f"No memory to capture a step of {rows} rows beside the KV pool. Lower SpecConfig.pool_tokens, "
                "max_requests or prefill_chunk."
            ) from error
        finally:
            inputs.flat.copy_(kept)
        self._captured[rows, variant] = graph
