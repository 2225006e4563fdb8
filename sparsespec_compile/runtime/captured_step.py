"""Steps for loops that are not ours: fill the inputs, replay, read the results."""

from collections.abc import Sequence

import torch

from sparsespec_compile.runtime.capture import StepRunner
from sparsespec_compile.runtime.inputs import InputPacker, StepInputs
from sparsespec_compile.runtime.sampling import DrawParams
from sparsespec_compile.runtime.state import State
from sparsespec_compile.runtime.step import Results, Variant
from sparsespec_compile.runtime.work import PageUpdate, Work


class CapturedStep:
    """A step with its own state, which a loop of yours drives. Get it from `OptimizedModel.capture`.

    An iteration is `fill` (or writing into `inputs` yourself) and `replay`; it needs no answer from the device, so any
    number can be enqueued ahead. On a GPU a replay is a CUDA graph, on a CPU the same computation runs at once.

    Each slot owns pages for its longest text from the start. To lay them out differently, pass `PageUpdate` entries to
    `fill`, or write into `state.page_table`.

    Attributes:
        inputs: what an iteration does, static tensors; see `StepInputs` for names, shapes and dtypes.
        results: what came out, static tensors; see `Results`.
        state: what outlives an iteration; see `State`.
    """

    def __init__(self, runner: StepRunner, variant: Variant) -> None:
        self._runner = runner
        self._variant = variant
        self._packer = InputPacker(runner.step.inputs.sizes)
        self._counts = (0, 0)
        self.inputs: StepInputs = runner.step.inputs
        self.results: Results = runner.step.results
        self.state: State = runner.step.state
        slots, pages = self.state.capacity.slots, self.inputs.sizes.request_pages
        own = torch.arange(slots * pages, dtype=torch.int32, device=self.state.device)
        self.state.page_table[:slots] = own.view(slots, pages)

    def begin(self, slot: int, max_length: int, params: DrawParams | None = None) -> None:
        """Give `slot` to a new text of at most `max_length` tokens, prompt included; None draws greedily."""
        self._packer.admit(slot, max_length, DrawParams() if params is None else params)

    def fill(self, work: Sequence[Work], updates: Sequence[PageUpdate] = ()) -> None:
        """Write an iteration into `inputs`: what each slot does, at most one `Work` for each."""
        self._counts = self._packer.pack(work, updates)
        self.inputs.flat.copy_(torch.from_numpy(self._packer.flat), non_blocking=False)

    def replay(self) -> Results:
        """Enqueue the iteration that `inputs` holds; `results` is valid once the device has come so far."""
        self._runner(*self._counts, self._variant)
        return self.results
