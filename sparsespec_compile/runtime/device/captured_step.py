"""Steps for loops of the user's own: fill the inputs, replay, read the results."""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from sparsespec_compile.errors import ConfigError
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.inputs import InputPacker, PageUpdate, StepInputs, Work
from sparsespec_compile.runtime.device.interface import Device, Event
from sparsespec_compile.runtime.device.sampling import DrawParams
from sparsespec_compile.runtime.device.state import State
from sparsespec_compile.runtime.device.step import Results

_MODES = (Mode.DRAFT, Mode.VERIFY, Mode.PREFILL)


@dataclass
class SlotText:
    """What the host knows of a slot's text.

    Attributes:
        max_length: tokens of the text at most, prompt included.
        prefilled: positions that prompts were given for.
        verified: rows of verifications since then, an upper bound of the cached positions after `prefilled`.
        drawn: whether the newest token, which drafts and verifications begin with, was drawn.
    """

    max_length: int
    prefilled: int = 0
    verified: int = 0
    drawn: bool = False

    def took(self, work: Work) -> None:
        """Record work that was planned for the slot."""
        if work.mode == Mode.PREFILL:
            self.prefilled, self.verified = work.offset + work.rows, 0
            self.drawn = work.logits > 0
        elif work.mode == Mode.VERIFY:
            self.verified += work.rows


@dataclass(frozen=True)
class Bounds:
    """What a step holds.

    Attributes:
        slots: requests.
        tokens: of a text.
        cycle: rows of a verification, drafts and one more.
        groups: groups of layers, each with page tables of its own.
        pages: physical pages of the pool.
        request_pages: logical pages of a slot.
        vocabulary: token ids; None if it is not known.
    """

    slots: int
    tokens: int
    cycle: int
    groups: int
    pages: int
    request_pages: int
    vocabulary: int | None

    def check_slot(self, slot: Any) -> None:
        """Raises ConfigError for a number that is not a slot's."""
        _require_range("slot", slot, 0, self.slots - 1)

    def check_length(self, max_length: Any) -> None:
        """Raises ConfigError for a text that no slot holds."""
        _require_range("max_length", max_length, 1, self.tokens, "Capture a step with a larger max_length.")

    def check_slots(self, work: Sequence[Work], texts: Mapping[int, SlotText]) -> None:
        """Raises ConfigError for what is no work of a text; ``texts`` are those that have begun, by their slot."""
        for item in work:
            if not isinstance(item, Work):
                raise ConfigError(f"fill takes Work, got {type(item).__name__}.")
            self.check_slot(item.slot)
            if item.slot not in texts:
                raise ConfigError(f"Slot {item.slot} holds no text yet. Call begin({item.slot}, max_length) first.")
        twice = [slot for slot, count in Counter(item.slot for item in work).items() if count > 1]
        if twice:
            raise ConfigError(f"Slot {twice[0]} has several Work. Give one for each slot in an iteration.")

    def check_work(self, work: Sequence[Work], texts: Mapping[int, SlotText]) -> None:
        """Raises ConfigError for what a slot cannot do, or what would continue another text than its own."""
        for item in work:
            self._check_one(item, texts[item.slot])

    def _check_one(self, item: Work, text: SlotText) -> None:
        longest = text.max_length
        where = f" (of the Work for slot {item.slot})"
        if item.mode not in _MODES:
            allowed = ", ".join(f"Mode.{mode.name}" for mode in _MODES)
            raise ConfigError(f"mode must be one of {allowed}, got {item.mode!r}{where}.")
        most = {Mode.DRAFT: 1, Mode.VERIFY: self.cycle, Mode.PREFILL: longest}[Mode(item.mode)]
        _require_range("rows", item.rows, 1, most, where=where)
        prefills = item.mode == Mode.PREFILL
        fewest, most = (0, 1) if prefills else (item.rows, item.rows)
        _require_range("logits", item.logits, fewest, most, "All rows of a draft or verification have some.", where)
        _require_range("scored", item.scored, 0, item.rows, where=where)
        last = {Mode.DRAFT: self.cycle - 1, Mode.VERIFY: 0, Mode.PREFILL: longest - item.rows}[Mode(item.mode)]
        _require_range("offset", item.offset, 0, last, where=where)
        if prefills:
            advice = "Positions before the offset must hold the text already: give its prompt without a gap."
            _require_range("offset", item.offset, 0, text.prefilled + text.verified, advice, where)
        elif not text.drawn:
            raise ConfigError(
                f"Slot {item.slot} has no token to continue from{where}: give its whole prompt first, as PREFILL with "
                "logits=1 in the last part."
            )
        if len(item.tokens) != (item.rows if prefills else 0):
            needs = f"one for each of the {item.rows} rows" if prefills else "none: they are on the device"
            raise ConfigError(f"tokens must be {needs}, got {len(item.tokens)}{where}.")
        if item.proposes:
            raise ConfigError(f"proposes must be False, got {item.proposes!r}{where}: captured steps propose nothing.")
        for token in item.tokens:
            _require_range("tokens", token, 0, (self.vocabulary or 2**31) - 1, where=where)

    def check_updates(self, updates: Sequence[PageUpdate]) -> None:
        """Raises ConfigError for entries that no page table has."""
        for update in updates:
            self.check_slot(update.slot)
            _require_range("page", update.page, 0, self.request_pages - 1)
            _require_range("physical", update.physical, 0, self.pages - 1)
            _require_range("group", update.group, 0, self.groups - 1)


def _require_range(name: str, value: Any, low: int, high: int, advice: str = "", where: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}{where}. {advice}".rstrip())


class CapturedStep:
    """A step with its own state, which a loop of yours drives. Get it from `OptimizedModel.capture`.

    An iteration is `fill` and `replay`, or writing into `inputs` yourself and `replay(rows, logits)`. It needs no
    answer from the device, so any number can be enqueued ahead. On a GPU a replay is a CUDA graph, on a CPU the same
    computation runs at once. Whoever drops the last reference waits for the replays under way.

    Unlike a generation's steps, which run on a stream of the engine's own, `fill` and `replay` enqueue on the calling
    thread's current stream. Call all of them, `OptimizedModel.capture` included, under one stream, or let the streams
    wait for each other.

    An iteration holds at most `inputs.sizes.rows` packed rows, `inputs.sizes.logits` rows with logits, and, if pillars
    are chosen by score, as many scored requests as `state.scores` has rows: requests that verify in different
    iterations share them.

    One thread at a time may use it. Its memory is kept as long as the step is.

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
        self._latest: list[Event] = []  # behind the latest replay
        weakref.finalize(self, _end, runner, self._latest).atexit = False  # by then there may be no driver

    def begin(self, slot: int, max_length: int, params: DrawParams | None = None) -> None:
        """Give `slot` to a new text of at most `max_length` tokens, prompt included; None draws greedily.

        8-bit draft weights follow the model's parameters at the next draft.

        Raises:
            ConfigError: there is no such slot, it holds no text so long, or `params` are none.
        """
        self._bounds.check_slot(slot)
        self._bounds.check_length(max_length)
        if params is not None and not isinstance(params, DrawParams):
            raise ConfigError(f"params must be DrawParams or None, got {type(params).__name__}.")
        self._texts[slot] = SlotText(max_length)
        if self._runner.step.drafts is not None:
            self._runner.step.drafts.copies.outdate()
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
        # Settings stay in the slots, and may have filters.
        self._filled = (*self._packer.pack(work, updates), self._runner.step.variant(work, filters=True))
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
        stream, runner = self._device.current(), self._runner
        drafts = runner.step.drafts
        if variant.draft_weights and drafts is not None:
            drafts.copies.follow(stream)
        stream.run(lambda: runner(rows, logits, variant))
        self._latest[:] = [stream.record()]
        return self.results


def _end(runner: StepRunner, latest: Sequence[Event]) -> None:
    """Nobody has the step any longer: its graphs, counters and copies are needed until the latest replay has run."""
    for event in latest:
        event.wait()
    if runner.step.drafts is not None:
        runner.step.drafts.copies.give_back(runner.step)
