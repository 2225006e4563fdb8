"""One request, as the host knows it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

from sparsespec_compile.runtime.device.drafters import Drafter
from sparsespec_compile.runtime.device.processing import Processing, RowProcessors
from sparsespec_compile.runtime.device.sampling import DrawParams

StopCheck = Callable[[list[int]], bool]
"""Whether a text, given as its new tokens so far, ends with the newest of them."""


class Place(Enum):
    """Where a request's K/V are."""

    NOWHERE = "waiting, or done"
    DEVICE = "in the pool"
    LEAVING = "on the way to host memory"
    HOST = "in host memory"
    RETURNING = "on the way back"


@dataclass
class PageTable:
    """A request's pages in one group of layers.

    Attributes:
        first: logical page of the first page held; those before it were given back.
        pages: page of the pool, or of host memory, of each logical page from `first` on.
        tabled: the page table on the device is right for logical pages `first` to `tabled - 1`.
    """

    first: int = 0
    pages: list[int] = field(default_factory=list)
    tabled: int = 0

    @property
    def end(self) -> int:
        """The logical page after the last one held."""
        return self.first + len(self.pages)

    def drop_before(self, page: int) -> list[int]:
        """Give back the logical pages before `page`."""
        count = min(max(page - self.first, 0), len(self.pages))
        dropped, self.pages = self.pages[:count], self.pages[count:]
        self.first += count
        self.tabled = max(self.tabled, self.first)  # pages that came back from host memory may not be tabled yet
        return dropped


class FinishReason(str, Enum):
    """Why a text ended."""

    LENGTH = "length"
    """max_new_tokens were written."""
    STOP = "stop"
    """A stop token or stop string was written; it is part of the text."""
    CANCELLED = "cancelled"
    """The caller took the request back."""
    MEMORY = "memory"
    """Neither the pool nor host memory could hold it any longer; the text so far is right."""
    ERROR = "error"
    """Something that this request alone needs failed, such as a tokenizer's `decode`; the text so far is right."""


@dataclass
class RequestStats:
    """What one request took.

    Attributes:
        target_passes: full-attention passes that it took part in; plain decoding needs one a token.
        cycles: verifications of k drafts; shorter cycles are not counted.
        accepted: drafts accepted in these cycles.
        cached_tokens: prompt tokens that were not computed, because the pool held their K/V already.
        admitted_seconds, first_token_seconds, seconds: from its submission to its first iteration, its first token and
            its end; NaN before.
    """

    target_passes: int = 0
    cycles: int = 0
    accepted: int = 0
    cached_tokens: int = 0
    admitted_seconds: float = math.nan
    first_token_seconds: float = math.nan
    seconds: float = math.nan

    @property
    def accepted_per_cycle(self) -> float:
        """Mean accepted drafts of a full cycle; NaN before the first."""
        return self.accepted / self.cycles if self.cycles else math.nan


@dataclass(eq=False)
class Request:
    """A prompt on its way to a text.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: new tokens at most.
        params: how its tokens are drawn.
        stop_tokens: the text ends with the first of these, which is part of it.
        stop_check: asked after each token; None = stop tokens and length alone end the text.
        logprobs: whether `output_logprobs` is wanted.
        processing: what is done to its logits on the device; None = nothing.
        processors: functions that its logits go through one row at a time; None = there are none.
        output: the tokens that are final so far.
        output_logprobs: natural log-probabilities of `output` under the model itself.
        finish_reason: why `output` is complete; None = it is not.
        error: what failed, with `FinishReason.ERROR`; None otherwise.
        slot: row in the state tensors, -1 while waiting or done.
        place: where its K/V are.
        page_tables: for each group of layers, the pages of the pool that it holds, or those that hold it in host
            memory.
        prefilled: prompt tokens that were sent to the device, or whose K/V were there.
        page_keys: `PrefixCache` keys of the first full pages of its text.
        kept_pages: full pages of its text that others can find.
        awaited: key of the page that another prompt was about to compute when it was last held back for it.
        weights: how often weights had changed when it was admitted: what it has computed before a change is not kept.
        phase: it verifies in the iterations for which `Phases.at` gives this; None before.
        passes: draft iterations of the cycle under way.
        drafted: drafts of it at most.
        counted: whether they are exactly so many; where it has judged proposals, the device alone knows.
        told_drafted: drafts of it as far as results have been read.
        drafter: the drafter of the planned drafts; None before the first.
        fresh: whether its pillars are from its last verification.
        looked_up: tokens of `output` in which n-grams were looked up (`Foresight`).
        unread: rows of its verifications whose results were not read yet.
        pillars, recent_start: as far as results have been read, how many pillars its drafts read, and the position from
            which on they read everything.
        stats: what it took so far.
    """

    prompt: list[int]
    max_new_tokens: int
    params: DrawParams = field(default_factory=DrawParams)
    stop_tokens: frozenset[int] = frozenset()
    stop_check: StopCheck | None = None
    logprobs: bool = False
    processing: Processing | None = None
    processors: RowProcessors | None = None
    output: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    slot: int = -1
    place: Place = Place.NOWHERE
    page_tables: tuple[PageTable, ...] = ()
    prefilled: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    kept_pages: int = 0
    awaited: bytes | None = None
    weights: int = 0
    phase: int | None = None
    passes: int = 0
    drafted: int = 0
    counted: bool = True
    told_drafted: int = 0
    drafter: Drafter | None = None
    fresh: bool = False
    looked_up: int = 0
    unread: int = 0
    pillars: int = 0
    recent_start: int = 0
    stats: RequestStats = field(default_factory=RequestStats)

    @property
    def finished(self) -> bool:
        """Whether `output` is complete."""
        return self.finish_reason is not None

    @property
    def asked(self) -> tuple[object, ...]:
        """What it asks for, but for its seed."""
        stops = sorted(self.stop_tokens)
        own = () if self.processors is None else [type(one).__name__ for one in self.processors.processors]
        asked = self.prompt, self.max_new_tokens, replace(self.params, seed=0), stops, self.logprobs
        return *asked, self.processing, own

    @property
    def needs_whole_rows(self) -> bool:
        """Whether its tokens are drawn from the logits of all tokens, and not from the best of each part."""
        return self.params.filtered or self.processing is not None or self.processors is not None

    @property
    def max_length(self) -> int:
        """Prompt and new tokens together, at most."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be sent."""
        return self.prefilled < len(self.prompt)

    @property
    def cached(self) -> int:
        """Positions with exact K/V, as far as results have been read: all but the newest token."""
        return len(self.prompt) + len(self.output) - 1 if self.output else self.prefilled

    @property
    def pages_held(self) -> int:
        """Pages that it holds, in all groups of layers."""
        return sum(len(table.pages) for table in self.page_tables)

    def all_pages(self) -> list[int]:
        """The pages that it holds, one group of layers after the other."""
        return [page for table in self.page_tables for page in table.pages]

    @property
    def reach(self) -> int:
        """Upper bound of its verified length on the device once everything enqueued has run."""
        return min(self.cached + self.unread, self.max_length)

    def append(self, tokens: list[int], logprobs: list[float]) -> list[int]:
        """Add final tokens up to the text's end; returns those that were added, which may be fewer.

        `logprobs` holds the log-probability of each token, or nothing when they are not wanted.
        """
        before = len(self.output)
        for nth, token in enumerate(tokens):
            if self.finished:
                break
            self.output.append(token)
            self.output_logprobs.extend(logprobs[nth : nth + 1])
            self.finish_reason = self._reason(token)
        return self.output[before:]

    def cancel(self) -> None:
        """End the text at its present length, unless it has ended."""
        if not self.finished:
            self.finish_reason = FinishReason.CANCELLED

    def fail(self, error: Exception) -> None:
        """End the text at its present length, because of `error`."""
        self.error = error
        self.finish_reason = FinishReason.ERROR

    def _reason(self, token: int) -> FinishReason | None:
        if token in self.stop_tokens:
            return FinishReason.STOP
        if self.stop_check is not None:
            try:
                stops = self.stop_check(self.output)
            except Exception as error:  # the caller's own code: whatever it raises ends this request and no other
                self.error = error
                return FinishReason.ERROR
            if self.finished:  # the check may cancel the request
                return self.finish_reason
            if stops:
                return FinishReason.STOP
        return FinishReason.LENGTH if len(self.output) == self.max_new_tokens else None
