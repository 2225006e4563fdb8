"""Steps for loops that are not ours: fill the inputs, replay, read the results."""

from collections.abc import Sequence

import torch

from sparsespec_compile.errors import ConfigError
from sparsespec_compile.runtime.capture import StepRunner
from sparsespec_compile.runtime.device.interface import Device
from sparsespec_compile.runtime.inputs import InputPacker, StepInputs
from sparsespec_compile.runtime.sampling import DrawParams
from sparsespec_compile.runtime.state import State
from sparsespec_compile.runtime.step import Results, Variant
from sparsespec_compile.runtime.work import PageUpdate, Work, promise_of
from sparsespec_compile.runtime.work_checks import Bounds, SlotText


class CapturedStep:
    """A step with its own state, which a loop of yours drives. Get it from `OptimizedModel.capture`.

    An iteration is `fill` and `replay`, or writing into `inputs` yourself and `replay(rows, logits)`. It needs no
    answer from the device, so any number can be enqueued ahead. On a GPU a replay is a CUDA graph, on a CPU the same
    computation runs at once.

    Unlike a generation's steps, which run on a stream of the engine's own, `fill` and `replay` enqueue on the calling
    thread's current stream. Call all of them, `OptimizedModel.capture` included, under one stream, or let the streams
    wait for each other.

    An iteration holds at most `inputs.sizes.rows` packed rows, `inputs.sizes.logits` rows with logits, and, if pillars
    are chosen by score, as many scored requests as `state.scores` has rows: requests that verify in different
    iterations share them.

    Each slot owns pages for its longest text from the start. To lay them out differently, pass `PageUpdate` entries to
    `fill`, or write into `state.page_table`.

    Attributes:
        inputs: what an iteration does, static tensors; see `StepInputs` for names, shapes and dtypes.
        results: what came out, static tensors; see `Results`.
        state: what outlives an iteration; see `State`.
    """

    def __init__(self, runner: StepRunner, device: Device, vocabulary: int | None = None) -> None:
        self._runner = runner
        self._device = device
        self._texts: dict[int, SlotText] = {}
        self._packer = InputPacker(runner.step.inputs.sizes)
        self._filled = (0, 0, runner.step.any_work)
        self.inputs: StepInputs = runner.step.inputs
        self.results: Results = runner.step.results
        self.state: State = runner.step.state
        slots, groups = self.state.capacity.slots, len(self.state.layout.groups)
        pages = self.state.layout.pages_for(self.state.capacity.tokens)
        own = torch.arange(slots * pages * groups, dtype=torch.int32, device=self.state.device)
        self.state.page_table[:, :slots, :pages] = own.view(slots, pages, groups).permute(2, 0, 1)
        capacity, cycle = self.state.capacity, self.results.logprobs.shape[1]
        self._bounds = Bounds(slots, capacity.tokens, cycle, groups, capacity.pages, pages, vocabulary)

    def begin(self, slot: int, max_length: int, params: DrawParams | None = None) -> None:
        """Give `slot` to a new text of at most `max_length` tokens, prompt included; None draws greedily.

        Raises:
            ConfigError: there is no such slot, it holds no text so long, or `params` are none.
        """
        self._bounds.check_slot(slot)
        self._bounds.check_length(max_length)
        if params is not None and not isinstance(params, DrawParams):
            raise ConfigError(f"params must be DrawParams or None, got {type(params).__name__}.")
        self._texts[slot] = SlotText(max_length)
        self._packer.admit(slot, max_length, DrawParams() if params is None else params)

    def fill(self, work: Sequence[Work], updates: Sequence[PageUpdate] = ()) -> None:
        """Write an iteration into `inputs`: what each slot does, at most one `Work` for each.

        Raises:
            ConfigError: more packed rows, rows with logits, scored requests or page-table entries than fit, or work
                that a slot cannot do.
        """
        self._bounds.check_slots(work, self._texts)
        self._check(work, updates)
        self._bounds.check_work(work, self._texts)
        self._bounds.check_updates(updates)
        for item in work:
            self._texts[item.slot].took(item)
        promise = promise_of(work, self._runner.step.reads_scores)
        self._filled = (*self._packer.pack(work, updates), Variant(promise=promise))
        self.inputs.flat.copy_(torch.from_numpy(self._packer.flat), non_blocking=False)

    def _check(self, work: Sequence[Work], updates: Sequence[PageUpdate]) -> None:
        sizes = self.inputs.sizes
        reads_scores = self._runner.step.reads_scores
        asked = {
            "packed rows": (sum(item.rows for item in work), sizes.rows),
            "rows with logits": (sum(item.logits for item in work), sizes.logits),
            "scored requests": (
                sum(item.scored > 0 for item in work) if reads_scores else 0,
                self.state.capacity.score_slots,
            ),
            "page-table entries": (len(updates), sizes.updates),
        }
        for name, (got, most) in asked.items():
            if got > most:
                raise ConfigError(
                    f"The iteration has {got} {name}, the step holds {most}. Spread the work over more iterations, or "
                    "capture a step for more requests."
                )

    def replay(self, rows: int | None = None, logits: int | None = None) -> Results:
        """Enqueue the iteration that `inputs` holds; `results` is valid once the device has come so far.

        Args:
            rows: packed rows that were written into `inputs`, whatever they do; None: what the latest `fill` wrote. It
                knows what nobody asks for, such as scores of prompts, and takes a computation that leaves it out, so
                give `rows` and `logits` if you change `inputs` behind a `fill`.
            logits: rows with logits; likewise.

        Raises:
            ConfigError: more rows than the step holds.
        """
        sizes = self.inputs.sizes
        for name, got, most in (("rows", rows, sizes.rows), ("logits", logits, sizes.logits)):
            if got is not None and not 0 <= got <= most:
                raise ConfigError(f"{name} must be from 0 to {most}, which the step holds, got {got}.")
        filled_rows, filled_logits, variant = self._filled
        if rows is not None or logits is not None:
            variant = self._runner.step.any_work
        rows, logits = filled_rows if rows is None else rows, filled_logits if logits is None else logits
        self._device.current().run(lambda: self._runner(rows, logits, variant))
        return self.results
