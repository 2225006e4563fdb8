"""`bench`: what speculation gains on the user's own model, prompts and device."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from tqdm import tqdm

from sparsespec_compile.advice.advise import advise
from sparsespec_compile.advice.prediction import Acceptance
from sparsespec_compile.api import OptimizedModel
from sparsespec_compile.errors import ConfigError, SparseSpecError
from sparsespec_compile.requests.prompts import Prompt
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.requests.stop_strings import Decoder
from sparsespec_compile.runtime.device.sampling import derive_seed
from sparsespec_compile.runtime.host.stats import CycleStats
from sparsespec_compile.trial.gaps import parting
from sparsespec_compile.trial.setting import Asked, Written, environment, plain, read_prompts, write

_SHOWN = 5
"""Kinds of cycles that are shown."""


@dataclass(frozen=True)
class Speed:
    """What one way of decoding took, a number for each run.

    Attributes:
        seconds: from the first prompt's submission to the last text's end.
        tokens: that were written.
    """

    seconds: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def tokens_per_second(self) -> float:
        """Median of the runs."""
        return statistics.median(tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True))


@dataclass(frozen=True)
class Kind:
    """One kind of cycle that was run.

    Attributes:
        drafter: where its drafts came from; "none" = plain decoding.
        drafts: of a cycle.
        share: of all iterations.
        accepted: mean accepted drafts of a full cycle; None = there was none.
    """

    drafter: str
    drafts: int
    share: float
    accepted: float | None


@dataclass(frozen=True)
class Predicted:
    """What `advise` says of the workload, with the acceptance that was measured.

    Attributes:
        length, batch: mean cached length, and requests decoded together.
        draft_tokens, drafter: the settings that it finds best.
        tokens_per_second, plain_tokens_per_second: that it predicts for these, and for plain decoding.
    """

    length: float
    batch: int
    draft_tokens: int
    drafter: str
    tokens_per_second: float
    plain_tokens_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """What speculation gains. Print it with rich.

    Attributes:
        plain, speculative: speeds of plain decoding and of the model's own settings, over the same compiled graph.
        kinds: cycles in the timed runs, the most frequent first. With "auto" they are what it chose.
        drafts, accepted: of full cycles, all together.
        kv_bytes_share: bytes of the KV cache that were read, over what plain decoding reads for the same tokens.
        equal: share of the texts that equal plain decoding's. In low precision rounding lets some part: see `audit`.
        predicted: None where `advise` cannot say; then `unpredicted` says why.
        environment: model, device, versions and settings.
    """

    plain: Speed
    speculative: Speed
    kinds: tuple[Kind, ...]
    drafts: int
    accepted: int
    kv_bytes_share: float
    equal: float
    predicted: Predicted | None
    unpredicted: str | None
    environment: dict[str, Any]

    @property
    def speedup(self) -> float:
        """Speculation over plain decoding, in the medians of their tokens a second."""
        return self.speculative.tokens_per_second / self.plain.tokens_per_second

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        found = asdict(self) | {"speedup": self.speedup}
        for name in ("plain", "speculative"):
            found[name]["tokens_per_second"] = getattr(self, name).tokens_per_second
        if found["kv_bytes_share"] != found["kv_bytes_share"]:  # there was nothing to read
            found["kv_bytes_share"] = None
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("decoding", "tokens/s", "runs", "tokens", "predicted")
        forecasts: tuple[float | None, float | None] = (None, None)
        if self.predicted is not None:
            forecasts = (self.predicted.plain_tokens_per_second, self.predicted.tokens_per_second)
        for name, speed, forecast in zip(
            ("plain", "speculative"), (self.plain, self.speculative), forecasts, strict=True
        ):
            each = [tokens / seconds for tokens, seconds in zip(speed.tokens, speed.seconds, strict=True)]
            table.add_row(
                name,
                f"{speed.tokens_per_second:,.1f}",
                f"{min(each):,.1f} to {max(each):,.1f}",
                f"{sum(speed.tokens):,}",
                "-" if forecast is None else f"{forecast:,.0f}",
            )
        yield table
        kinds = Table("cycles", "of the iterations", "drafts accepted")
        for kind in self.kinds[:_SHOWN]:
            name = f"{kind.drafts} {kind.drafter}" if kind.drafts else "plain decoding"
            kinds.add_row(name, f"{kind.share:.0%}", "-" if kind.accepted is None else f"{kind.accepted:.2f}")
        yield kinds
        share = f", {self.accepted / self.drafts:.1%} of {self.drafts:,} drafts accepted" if self.drafts else ""
        read = "" if self.kv_bytes_share != self.kv_bytes_share else f", {self.kv_bytes_share:.1%} of the KV bytes read"
        yield f"speedup [bold]{self.speedup:.2f}[/bold]{share}{read}, {self.equal:.0%} of the texts equal"
        yield f"draft weights: {self.environment['draft_weights']}"
        if self.predicted is not None:
            best = f"{self.predicted.draft_tokens} {self.predicted.drafter} drafts"
            yield (
                f"advise, for {self.predicted.batch} requests at {self.predicted.length:,.0f} cached tokens with this "
                f"acceptance: {best if self.predicted.draft_tokens else 'plain decoding'}. It leaves prompts out."
            )
        else:
            yield f"[yellow]nothing predicted: {self.unpredicted}"


def bench(
    fast: OptimizedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    runs: int = 3,
    tokenizer: Decoder | None = None,
    progress: bool = True,
) -> BenchReport:
    """Measure what speculation gains on this model, these prompts and this device.

    Plain decoding and the model's own settings write the same texts, one after the other over the same compiled graph.
    Each writes them once to warm up, which compiles, captures, and lets "auto" learn. Then the clock runs, prompts
    included, in each run over texts of other seeds, and over prompts of which the pool holds nothing: what requests of
    one run share they share. Afterwards the engine's memory is given back, and later calls allocate it anew.

    Args:
        fast: what to measure. Nothing else may generate with it meanwhile.
        prompts: as in `OptimizedModel.generate_batch`.
        max_new_tokens: of each text.
        temperature: 0.0 = greedy.
        seed: from which the seed of each text is derived.
        runs: whose median counts.
        tokenizer: encodes texts and chats.
        progress: whether to show a progress bar.

    Raises:
        PromptError: there are no prompts, or one cannot be read.
        SamplingError: an impossible length, temperature or seed.
        ConfigError: `runs` is no integer of at least 1, `fast` makes no drafts, or ranks share the model.
        RequestFailedError: a text could not be completed.
        EngineBusyError: another generation is unfinished.
        As `OptimizedModel.generate_batch` otherwise.
    """
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ConfigError(f"runs must be an integer of at least 1, got {runs!r}.")
    if fast.spec_config.draft_tokens == 0:
        raise ConfigError("draft_tokens is 0, which is plain decoding. Give SpecConfig drafts to compare with it.")
    SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    tokens = read_prompts(fast, prompts, tokenizer)
    rounds = [
        [
            Asked(number, prompt, temperature, derive_seed(seed, nth * len(tokens) + number))
            for number, prompt in enumerate(tokens)
        ]
        for nth in range(runs + 1)
    ]
    with tqdm(unit="text", total=2 * (runs + 1) * len(tokens), disable=None if progress else True) as bar:
        with plain(fast) as other:
            undrafted, reference = _timed(other, rounds, max_new_tokens, "plain decoding", bar)
        drafted, written = _timed(fast, rounds, max_new_tokens, "speculation", bar)
        fast.release()
    equal = [
        parting(text, other) is None
        for one, others in zip(written, reference, strict=True)
        for text, other in zip(one.texts, others.texts, strict=True)
    ]
    kinds, by_kind = _kinds(written)
    predicted, why = _predicted(fast, tokens, written, by_kind)
    stats = [one.stats for one in written if one.stats is not None]
    read, of = sum(one.kv_read for one in stats), sum(one.kv_read_plain for one in stats)
    return BenchReport(
        undrafted,
        drafted,
        kinds,
        sum(kind.drafts for kind in by_kind.values()),
        sum(sum(kind.accepted_at) for kind in by_kind.values()),
        read / of if of else float("nan"),
        sum(equal) / len(equal),
        predicted,
        why,
        environment(fast),
    )


def _timed(
    engine: OptimizedModel, rounds: Sequence[list[Asked]], max_new_tokens: int, what: str, bar: tqdm
) -> tuple[Speed, list[Written]]:
    """The rounds but for the first, which warms up."""
    seconds: list[float] = []
    written: list[Written] = []
    for nth, asked in enumerate(rounds):
        bar.set_description(f"{what}, {f'run {nth}' if nth else 'warm-up'}")
        engine._engine.forget_texts()
        start = time.perf_counter()
        one = write(engine, asked, max_new_tokens, bar)
        seconds.append(time.perf_counter() - start)
        written.append(one)
    timed = written[1:]
    return Speed(tuple(seconds[1:]), tuple(sum(map(len, one.texts)) for one in timed)), timed


def _kinds(written: Sequence[Written]) -> tuple[tuple[Kind, ...], dict[tuple[str, int], CycleStats]]:
    """The cycles of all timed runs together."""
    iterations: Counter[tuple[str, int]] = Counter()
    by_kind: dict[tuple[str, int], CycleStats] = {}
    for one in written:
        if one.stats is None:
            continue
        iterations.update(one.stats.iterations_by_cycle)
        for name, more in one.stats.by_cycle.items():
            known = by_kind.get(name, CycleStats(0, [0] * len(more.accepted_at)))
            places = [a + b for a, b in zip(known.accepted_at, more.accepted_at, strict=True)]
            counts = known.drafts + more.drafts, known.tried + more.tried
            by_kind[name] = CycleStats(known.cycles + more.cycles, places, *counts)
    kinds = []
    for (drafter, drafts), count in iterations.most_common():
        found = by_kind.get((drafter, drafts))
        accepted = sum(found.accepted_at) / found.cycles if found is not None and found.cycles and drafts else None
        kinds.append(Kind(drafter, drafts, count / iterations.total(), accepted))
    return tuple(kinds), by_kind


def _predicted(
    fast: OptimizedModel,
    prompts: Sequence[list[int]],
    written: Sequence[Written],
    by_kind: dict[tuple[str, int], CycleStats],
) -> tuple[Predicted | None, str | None]:
    """What `advise` says, or why it says nothing."""
    by_model, by_ngrams = _acceptance(by_kind, ngrams=False), _acceptance(by_kind, ngrams=True)
    if by_model is None and by_ngrams is None:
        return None, "no full cycle of drafts was verified, so that their acceptance is not known"
    lengths = [
        max(1, len(prompt) + len(text) // 2) for one in written for prompt, text in zip(prompts, one.texts, strict=True)
    ]
    config = fast.spec_config
    acceptance: Acceptance = 0.0 if by_model is None else {config.budget_ratio: by_model}
    try:
        advice = advise(
            fast.model,
            fast.device if config.ceilings is None else config.ceilings,
            lengths,
            min(len(prompts), config.max_requests),
            acceptance,
            config.draft_weights,
            by_ngrams,
        )
    except SparseSpecError as error:
        return None, str(error)
    best, load = advice.best, advice.workload
    return (
        Predicted(
            load.length,
            load.batch,
            best.draft_tokens,
            best.drafter,
            best.tokens_per_second,
            advice.plain.tokens_per_second,
        ),
        None,
    )


def _acceptance(by_kind: dict[tuple[str, int], CycleStats], *, ngrams: bool) -> float | None:
    """The probability that a draft is right when all before it in its cycle were; None = no draft was verified."""
    right = tried = 0
    for (drafter, _), kind in by_kind.items():
        if (drafter == "ngram") == ngrams:
            right += sum(kind.accepted_at)
            tried += kind.tried
    return right / tried if tried else None
