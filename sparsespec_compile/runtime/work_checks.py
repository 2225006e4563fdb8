"""What a captured step refuses of another's loop: on a GPU it would be an index out of bounds, or wrong text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from sparsespec_compile.errors import ConfigError
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.work import PageUpdate, Work

_MODES = (Mode.DRAFT, Mode.VERIFY, Mode.PREFILL)


@dataclass
class SlotText:
    """What the host knows of a slot's text.

    Attributes:
        max_length: tokens of the text at most, prompt included.
        prefilled: positions that prompts were given for.
        verified: rows of verifications since: at most so many positions behind `prefilled` are cached.
        drawn: whether the newest token, which drafts and verifications begin with, was drawn.
    """

    max_length: int
    prefilled: int = 0
    verified: int = 0
    drawn: bool = False

    def took(self, work: Work) -> None:
        """Take note of work that was given to the slot."""
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
        """Raises ConfigError for what is no slot."""
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
