"""Settings of `optimize`, and what all classes of settings share."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.errors import ConfigError, SparseSpecError

Drafter = Literal["auto", "pillar", "window", "full", "ngram"]
Backend = Literal["auto", "eager", "inductor"]
DraftWeights = Literal["auto", "exact", "int8", "fp8"]
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


AUTO_PROPOSALS = (1, 2, 3, 5)
"""Numbers of proposals that "auto" chooses among, besides none."""

MOST_REQUESTS = 1024
"""Requests decoded together. Every program of an attention kernel plans all of them in registers, and with 2,048 they
spill."""


@dataclass(frozen=True, kw_only=True)
class SpecConfig(Settings, error=ConfigError):
    """How a model is compiled and how its requests are drafted. Every field is checked when it is built.

    Frozen, so any number of models and threads may share it. No field changes a text, apart
    from rounding in 16 bits.

    Args:
        draft_tokens: drafts per cycle (k in the paper), 0 to 64. One verification follows every k drafts. 0 is plain
            decoding through the same graph. "auto" chooses k from 0 to `max_draft_tokens`, and the drafter unless one
            is named, while requests run, from what an iteration is predicted and measured to take and from how many
            drafts are accepted; what it learns is kept from call to call. Where nothing can be predicted, as on CPUs,
            it begins with plain decoding and tries drafts now and then, for a few iterations. A verification reads the
            cache once for each 64 (row, query head) pairs of a KV head: with 4 query heads to a KV head only once for
            up to 15 drafts, with 8 for up to 7. The last 64 pairs choose the next pillars. "auto" keeps room for the
            scores of half of the requests or of 160, whichever is more: 4 bytes a layer, KV head and position of the
            longest text.
        max_draft_tokens: drafts of the longest cycle of "auto", 1 to 64.
        budget_ratio: share of the cached positions a draft reads, in (0, 1] (the paper uses 0.05).
        min_budget: positions that a draft reads at least, per KV head: `max(min_budget, ceil(budget_ratio * length))`.
        drafter: where drafts come from. "auto" is "pillar", and where `draft_tokens` is "auto" whichever of "pillar"
            and "ngram" pays more at the time. Most are passes of the model that read, besides the tokens since the last
            verification, "pillar": the positions with the highest attention in that verification (paper, PillarAttn);
            "window": the first 4 and the latest ones (StreamingLLM), as many as "pillar" would read; "full":
            everything. "ngram" takes no pass: what followed the place that is most like the text's last 24 tokens, in
            the text itself or in another one of the batch, is proposed, and every iteration verifies.
        draft_proposals: "auto", or the number, 0 to 8, of tokens that are proposed as by "ngram" behind the newest
            draft, and that each draft iteration judges besides: those that it would have drafted itself are drafts at
            once. So a cycle of `draft_tokens` drafts has fewer draft iterations, as many as make so many drafts if
            proposals are right as often as expected; with fewer right ones it has fewer drafts. Iterations in which
            other requests verify or read prompts judge none. "auto": where `draft_tokens` and `drafter` are "auto", and
            times can be predicted, it is part of their choice, else 0. A number above 0 needs `draft_tokens` to
            be a larger number, or 0, and a drafter that runs the model.
        local_ratio: share of the "pillar" budget, in [0, 1], that is spent on the positions just before the last
            verification instead of on the highest scores. 0 is the paper's choice.
        draft_weights: what drafts read of the weights. "int8" and "fp8": copies in 8 bits with a scale for each output,
            for iterations of 64 ("int8") or 256 ("fp8") rows of drafts at most; everything else reads the weights, so
            the text does not depend on it.
            The copies take about half the memory of the weights (`OptimizedModel.memory_plan`) and follow changes in
            place before each generation. "fp8" needs a GPU of compute capability 8.9. "exact": the weights. "auto" is
            "fp8" on such GPUs and "int8" on others where memory allows it, else "exact"; `OptimizedModel.report` says
            which and why. Nothing is made where no iteration drafts.
        page_size: tokens in a page of the KV pool. Each text wastes less than one page for each group of layers; only
            whole pages are shared between texts.
        pool_tokens: tokens the KV pool holds. None: as many as `max_requests` of the longest texts could need, within
            `memory_fraction`; requests beyond it wait their turn. The pool decides how many texts are decoded together:
            about pool_tokens over their mean length.
        memory_fraction: share of the device's free memory, in (0, 1], that the engine's state may take when it is
            built, for the first request. `OptimizedModel.release` gives it back. What fixed buffers leave is the pool,
            so a smaller share means fewer texts decoded together. On a CPU at most half of the free memory is reserved,
            and pages of it are taken as they are first used.
        max_length: tokens of the longest text, prompt included, that room is kept for. None: the model's positions, or
            fewer where their scores and pillars would take more than a tenth of the memory. These buffers grow with it,
            and the pool gets what they leave.
        host_pool_tokens: tokens of KV that host memory takes when the pool is full: whole requests move there and come
            back, nothing is recomputed. Taken as needed, pinned. 0: no request starts before the pool can hold its
            longest text. None: half of the free host memory on CUDA, 0 on CPU.
        prefix_caching: whether requests whose texts begin alike share the KV pages of that beginning: samples of one
            prompt, few-shot prefixes, the next turn of a chat. Pages stay in the pool until it needs them for other
            texts, and are forgotten when weights change.
        max_requests: requests decoded together, 1 to 1,024: kernels keep a few numbers of each in registers. Further
            requests wait. Scores, page tables, logits and the number of captured steps grow with it.
        prefill_chunk: prompt tokens processed in one iteration, all requests together. Larger chunks take more memory
            for activations, and hold up the requests that decode beside them for longer.
        schedule: in which iterations requests verify. "grouped": in as few of a cycle as rows allow that cost hardly
            more than one, so many bytes in each. For comparison: "balanced": in all of them, so that every iteration
            reads about as many bytes (paper, unified batch scheduling); "random": in any; "in_phase": all in the same.
        overlap: whether an iteration is enqueued before the results of the one before are read (paper, delayed
            verification). False is for comparison.
        cuda_graphs: whether iterations on CUDA are captured once and replayed. Captured steps share one memory pool
            and are kept until `OptimizedModel.release`.
        backend: "inductor" compiles the graph with TorchInductor, "eager" runs it node by node, "auto" is "inductor"
            on CUDA and "eager" on CPU.
        tensor_parallel: how many ranks (processes, each with a GPU of its own) share the model, each with a part of
            its weights, heads and KV pool. None: as many as it was loaded for, 1 for a whole model. With more, every
            rank calls `optimize` on the same model, which becomes its part in place, and then makes the same calls with
            the same requests; neighbouring ranks of `torch.distributed`'s default process group share a model. That
            group alone does not make models shared, as data-parallel programs have one too.
        rank_timeout: seconds that a rank may stay away from an iteration that the others are in, as in code between two
            pieces of a stream, before all of them end with `RanksEndedError`; at least 1.
        ceilings: what the device can do, for the predictions of "auto". None: those of a known device, or of a CUDA
            device as measured once, which takes about a second and is kept in the user's cache folder.

    Raises:
        ConfigError: for an unknown name or a value that is not allowed; the text gives both.
    """

    draft_tokens: int | Literal["auto"] = "auto"
    max_draft_tokens: int = 15
    budget_ratio: float = 0.05
    min_budget: int = 128
    drafter: Drafter = "auto"
    local_ratio: float = 0.25
    draft_proposals: int | Literal["auto"] = "auto"
    draft_weights: DraftWeights = "auto"
    page_size: int = 16
    pool_tokens: int | None = None
    memory_fraction: float = 0.9
    max_length: int | None = None
    host_pool_tokens: int | None = None
    prefix_caching: bool = True
    max_requests: int = 64
    prefill_chunk: int = 2048
    schedule: Schedule = "grouped"
    overlap: bool = True
    cuda_graphs: bool = True
    backend: Backend = "auto"
    tensor_parallel: int | None = None
    rank_timeout: float = 60.0
    ceilings: Ceilings | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.draft_tokens, str) or self.draft_tokens != "auto":
            self._check_int("draft_tokens", 0, 64, or_else='"auto"')
        self._check_int("max_draft_tokens", 1, 64)
        if self.ceilings is not None and not isinstance(self.ceilings, Ceilings):
            raise ConfigError(f"ceilings must be Ceilings(...) or None, got {self.ceilings!r}.")
        self._check_int("min_budget", 1, 2**20)
        self._check_int("page_size", 1, 2**12)
        self._check_int("max_requests", 1, MOST_REQUESTS)
        self._check_int("prefill_chunk", 1, 2**20)
        if self.pool_tokens is not None:
            self._check_int("pool_tokens", self.page_size, 2**40, or_else="None")
        if self.tensor_parallel is not None:
            self._check_int("tensor_parallel", 1, 2**10, or_else="None")
        timeout = self.rank_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 1 <= timeout <= 86400:
            raise ConfigError(f"rank_timeout must be a number of seconds from 1 to 86400, got {timeout!r}.")
        if self.max_length is not None:
            self._check_int("max_length", 2, 2**31 - 1, or_else="None")
        if self.host_pool_tokens is not None:
            self._check_int("host_pool_tokens", 0, 2**40, or_else="None")
        for name in ("prefix_caching", "overlap", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_choice("drafter", get_args(Drafter))
        self._check_proposals()
        self._check_choice("draft_weights", get_args(DraftWeights))
        self._check_choice("schedule", get_args(Schedule))
        self._check_choice("backend", get_args(Backend))
        self._check_ratio("memory_fraction", zero=False)
        self._check_ratio("budget_ratio", zero=False)
        self._check_ratio("local_ratio", zero=True)

    def _check_proposals(self) -> None:
        proposals = self.draft_proposals
        if isinstance(proposals, str) and proposals == "auto":
            return
        self._check_int("draft_proposals", 0, 8, or_else='"auto"')
        proposals = int(proposals)
        if not proposals or self.draft_tokens == 0:  # plain decoding drafts nothing
            return
        if self.draft_tokens == "auto" or self.drafter == "ngram":
            raise ConfigError(
                f"draft_proposals is {proposals} with draft_tokens={self.draft_tokens!r} and drafter={self.drafter!r}. "
                f"Set draft_tokens to a number above {proposals}, and drafter to pillar, window or full, or leave "
                'draft_proposals at "auto".'
            )
        if proposals >= self.draft_tokens:
            raise ConfigError(
                f"draft_proposals must be below draft_tokens, {self.draft_tokens}, as an iteration makes one draft at "
                f"least; got {self.draft_proposals}."
            )

    def _check_int(self, name: str, low: int, high: int, or_else: str | None = None) -> None:
        """`or_else`: what is allowed besides, and was looked for before."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            besides = "" if or_else is None else f" or {or_else}"
            raise ConfigError(f"{name} must be an integer from {low} to {high}{besides}, got {value!r}.")

    def _check_ratio(self, name: str, *, zero: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or (value == 0 and not zero):  # NaN fails too
            raise ConfigError(f"{name} must be a number in {'[' if zero else '('}0, 1], got {value!r}.")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")

    @property
    def most_draft_tokens(self) -> int:
        """Drafts of the longest cycle."""
        return self.max_draft_tokens if self.draft_tokens == "auto" else self.draft_tokens

    @property
    def most_proposals(self) -> int:
        """Tokens that a draft iteration judges at most beside the draft that it makes anyway."""
        if self.draft_proposals == "auto":
            chosen = self.draft_tokens == "auto" and self.drafter == "auto" and self.max_draft_tokens > 1
            return AUTO_PROPOSALS[-1] if chosen else 0
        return self.draft_proposals if self.draft_tokens else 0

    def budget(self, length: int) -> int:
        """Pillars a draft reads, per KV head, when `length` positions were scored (paper, section on PillarAttn)."""
        return max(self.min_budget, math.ceil(self.budget_ratio * length))
