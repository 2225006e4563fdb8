"""Runs a step: as it is, or captured in CUDA graphs, one for each padded number of rows and variant of the step.

What a request does is data, so a graph serves every mix of drafts, verifications and prompts that fits its rows and
keeps the variant's promise.
"""

from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from sparsespec_compile.errors import PoolTooSmallError
from sparsespec_compile.kernels.step_kind import Promise
from sparsespec_compile.runtime.inputs import MIN_ROWS
from sparsespec_compile.runtime.step import Step, Variant

_FIRST_RUNS, _LATER_RUNS = 2, 1
"""Runs before the first capture and before others: one compiles and lets libraries load what they need for a size, the
very first one also allocates."""


def row_counts(most: int) -> list[int]:
    """Padded numbers of rows, ascending up to `most`: those at which products get dearer, from 256 on by a quarter.

    On H200s the products of a layer of Qwen3-8B, each timed by itself, take 103, 104, 110, 113, 118 and 149 us together
    for the numbers up to 256. More sizes would gain little, and each takes time to capture (benchmarks/LOG.md).
    """
    sizes = [MIN_ROWS, 16, 64, 128, 160, 256]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 5 // 4 // 16 * 16)
    return [*(size for size in sizes if size < most), max(most, MIN_ROWS)]


class StepRunner:
    """Runs `step` for any number of rows.

    Args:
        step: the computation.
        capture: whether to capture it in CUDA graphs; its state must be on a GPU then.
        fewest_rows: rows that the step's graph takes at least, when it is not captured.
    """

    def __init__(self, step: Step, *, capture: bool, fewest_rows: int = MIN_ROWS) -> None:
        self.step = step
        self._fewest_rows = fewest_rows
        sizes = step.inputs.sizes
        self._sizes = row_counts(sizes.rows) if capture else []
        self._graphs: dict[tuple[int, Variant], torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(step.state.device) if capture else None
        self._memory: Any = None  # what `CUDAGraph.pool` gives: torch has no public name for its type

    def prepare(self, rows: int) -> None:
        """Capture the steps of up to so many rows, without log-probabilities, so that none is waited for later.

        Where `rows` are no more than there are slots, nobody is expected to have more than one, but for prompts. Steps
        in which a prompt ends are captured when they are first needed, the largest aside.
        """
        if not self._sizes:
            return
        any_work, single = self.step.any_work, Variant(promise=Promise.SINGLE_ROWS)
        several = Variant(promise=max(any_work.promise, Promise.ONLY_VERIFICATIONS_SCORED))
        slots = self.step.state.capacity.slots
        asked = [(self._sizes[-1], any_work)]
        asked += [(size, several) for size in self._sizes if rows > slots and size <= self._padded(rows)]
        asked += [(size, single) for size in self._sizes if size <= self._padded(slots)]
        missing = [key for key in dict.fromkeys(asked) if key not in self._graphs]
        with torch.cuda.device_of(self.step.inputs.flat):
            for size, variant in tqdm(missing, desc="capturing", unit=" steps", leave=False, disable=None):
                self._capture(size, variant)

    def __call__(self, rows: int, logits: int, variant: Variant) -> None:
        """Run an iteration of `rows` packed rows, of which `logits` have logits, which the step's inputs hold."""
        if not self._sizes:
            self.step(max(rows, self._fewest_rows), max(logits, self._fewest_rows), variant)
            return
        padded = self._padded(rows)
        with torch.cuda.device_of(self.step.inputs.flat):
            if not self._graphs:
                # The largest first: the others fit into its memory.
                self._capture(self._sizes[-1], replace(variant, promise=self.step.any_work.promise))
            if (padded, variant) not in self._graphs:
                self._capture(padded, variant)
            self._graphs[padded, variant].replay()

    def _padded(self, rows: int) -> int:
        return next(size for size in self._sizes if size >= rows)

    def _capture(self, rows: int, variant: Variant) -> None:
        """Capture with inputs that hold no work, so that the runs before it change nothing; then put them back."""
        inputs = self.step.inputs
        logits = min(rows, inputs.sizes.logits)
        kept = inputs.flat.clone()
        inputs.clear()
        current, stream = torch.cuda.current_stream(inputs.flat.device), self._stream
        try:
            if stream is not None:
                stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_LATER_RUNS if self._graphs else _FIRST_RUNS):
                    self.step(rows, logits, variant)
            if stream is not None:
                current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Torch's own capture stream belongs to the device that captured first, and its default mode lets any other
            # thread's call break a capture.
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                self.step(rows, logits, variant)
        except torch.OutOfMemoryError as error:
            raise PoolTooSmallError(
                f"No memory to capture a step of {rows} rows beside the KV pool. Lower SpecConfig.pool_tokens, "
                "max_requests or prefill_chunk."
            ) from error
        self._memory = graph.pool()
        self._graphs[rows, variant] = graph
        inputs.flat.copy_(kept)
