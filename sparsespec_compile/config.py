"""Settings of `optimize`, and what all classes of settings share."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.errors import ConfigError, SparseSpecError

Drafter = Literal["pillar", "window", "full", "ngram"]
Backend = Literal["auto", "eager", "inductor"]
Schedule = Literal["grouped", "balanced", "random", "in_phase"]

_Self = TypeVar("_Self", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses whose fields are given by name: `class Mine(Settings, error=MyError)`.

    Values by position and unknown names raise `error`, which lists the names that exist, instead of Python's TypeError.
    """

    _error: ClassVar[type[SparseSpecError]]

    def __init_subclass__(cls, *, error: type[SparseSpecError]) -> None:
        cls._error = error

    def __new__(cls: type[_Self], *args: Any, **settings: Any) -> _Self:
        allowed = [field.name for field in fields(cls)]
        unknown = [name for name in settings if name not in allowed]
        if args or unknown:
            got = f"positional values {args}" if args else f"unknown setting(s) {', '.join(unknown)}"
            raise cls._error(f"{cls.__name__} got {got}. Allowed, by name: {', '.join(allowed)}.")
        return super().__new__(cls)


MOST_REQUESTS = 1024
"""Requests decoded together. Every program of an attention kernel plans all of them in registers, and with 2,048 they
spill."""


@dataclass(frozen=True, kw_only=True)
class SpecConfig(Settings, error=ConfigError):
    """How a model is compiled and how its requests are drafted. Frozen; every field is checked when it is built.

    Args:
        draft_tokens: drafts per cycle (k in the paper), 0 to 64. One verification follows every k drafts. 0 is plain
            decoding through the same graph. "auto" chooses k from 0 to `max_draft_tokens` while requests run, from
            what an iteration is predicted and measured to take and from how many drafts are accepted; what it learns is
            kept from call to call. Where nothing can be predicted, which is on CPUs and for mixtures of experts, it
            begins with plain decoding and tries drafts now and then, for a few iterations. A verification
            reads the cache once for each 64 (row, query head) pairs of a KV head: with 4 query heads to a KV head only
            once for up to 15 drafts, with 8 for up to 7. The last 64 pairs choose the next pillars. "auto" keeps room
            for the scores of half of the requests or of 128, whichever is more: 4 bytes a layer, KV head and position
            of the longest text.
        max_draft_tokens: drafts of the longest cycle of "auto", 1 to 64.
        budget_ratio: share of the cached positions a draft reads, in (0, 1] (the paper uses 0.05).
        min_budget: positions that a draft reads at least, per KV head: `max(min_budget, ceil(budget_ratio * length))`.
        drafter: where drafts come from. Most are passes of the model that read, besides the tokens since the last
            verification, "pillar": the positions with the highest attention in that verification (paper, PillarAttn);
            "window": the first 4 and the latest ones (StreamingLLM), as many as "pillar" would read; "full":
            everything. "ngram" takes no pass: what followed the latest earlier occurrence of the text's last 1 to 4
            tokens is proposed, and every iteration verifies.
        local_ratio: share of the "pillar" budget, in [0, 1], that is spent on the positions just before the last
            verification instead of on the highest scores. 0 is the paper's choice.
        page_size: tokens in a page of the KV pool.
        pool_tokens: tokens the KV pool holds. None: as many as `max_requests` of the longest texts could need, within
            `memory_fraction`; requests beyond it wait their turn.
        memory_fraction: share of the device's free memory, in (0, 1], that the engine's state may take when it is
            built, for the first request. `OptimizedModel.release` gives it back. On a CPU at most half of the free
            memory is reserved, and pages of it are taken as they are first used.
        max_length: tokens of the longest text, prompt included, that room is kept for. None: the model's positions, or
            fewer where their scores and pillars would take more than a tenth of the memory.
        host_pool_tokens: tokens of KV that host memory takes when the pool is full: whole requests move there and come
            back, nothing is recomputed. Taken as needed, pinned. 0: no request starts before the pool can hold its
            longest text. None: half of the free host memory on CUDA, 0 on CPU.
        max_requests: requests decoded together, 1 to 1,024: kernels keep a few numbers of each in registers. Further
            requests wait.
        prefill_chunk: prompt tokens processed in one iteration, all requests together.
        schedule: in which iterations requests verify. "grouped": in as few of a cycle as rows allow that cost hardly
            more than one, so many bytes in each. For comparison: "balanced": in all of them, so that every iteration
            reads about as many bytes (paper, unified batch scheduling); "random": in any; "in_phase": all in the same.
        overlap: whether an iteration is enqueued before the results of the one before are read (paper, delayed
            verification). False is for comparison.
        cuda_graphs: whether iterations on CUDA are captured once and replayed.
        backend: "inductor" compiles the graph with TorchInductor, "eager" runs it node by node, "auto" is "inductor"
            on CUDA and "eager" on CPU.
        ceilings: what the device can do, for the predictions of "auto". None: those of a known device, or of a CUDA
            device as measured once, which takes about a second and is kept in the user's cache folder.

    Raises:
        ConfigError: for an unknown name or a value that is not allowed; the text gives both.
    """

    draft_tokens: int | Literal["auto"] = "auto"
    max_draft_tokens: int = 12
    budget_ratio: float = 0.05
    min_budget: int = 128
    drafter: Drafter = "pillar"
    local_ratio: float = 0.25
    page_size: int = 16
    pool_tokens: int | None = None
    memory_fraction: float = 0.9
    max_length: int | None = None
    host_pool_tokens: int | None = None
    max_requests: int = 64
    prefill_chunk: int = 2048
    schedule: Schedule = "grouped"
    overlap: bool = True
    cuda_graphs: bool = True
    backend: Backend = "auto"
    ceilings: Ceilings | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.draft_tokens, str) or self.draft_tokens != "auto":
            self._check_int("draft_tokens", 0, 64)
        self._check_int("max_draft_tokens", 1, 64)
        if self.ceilings is not None and not isinstance(self.ceilings, Ceilings):
            raise ConfigError(f"ceilings must be Ceilings(...) or None, got {self.ceilings!r}.")
        self._check_int("min_budget", 1, 2**20)
        self._check_int("page_size", 1, 2**12)
        self._check_int("max_requests", 1, MOST_REQUESTS)
        self._check_int("prefill_chunk", 1, 2**20)
        if self.pool_tokens is not None:
            self._check_int("pool_tokens", self.page_size, 2**40)
        if self.max_length is not None:
            self._check_int("max_length", 2, 2**31 - 1)
        if self.host_pool_tokens is not None:
            self._check_int("host_pool_tokens", 0, 2**40)
        for name in ("overlap", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_choice("drafter", get_args(Drafter))
        self._check_choice("schedule", get_args(Schedule))
        self._check_choice("backend", get_args(Backend))
        self._check_ratio("memory_fraction", zero=False)
        self._check_ratio("budget_ratio", zero=False)
        self._check_ratio("local_ratio", zero=True)

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}.")

    def _check_ratio(self, name: str, *, zero: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or (value == 0 and not zero):  # NaN fails too
            raise ConfigError(f"{name} must be a number in {'[' if zero else '('}0, 1], got {value!r}.")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")

    @property
    def most_draft_tokens(self) -> int:
        """Drafts of the longest cycle."""
        return self.max_draft_tokens if self.draft_tokens == "auto" else self.draft_tokens

    def budget(self, length: int) -> int:
        """Pillars a draft reads, per KV head, when `length` positions were scored (paper, section on PillarAttn)."""
        return max(self.min_budget, math.ceil(self.budget_ratio * length))
