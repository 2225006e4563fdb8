"""`audit`: are the texts right, on the user's own model, prompts and device?"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from sparsespec_compile.api import OptimizedModel
from sparsespec_compile.errors import SamplingError
from sparsespec_compile.kernels.reference.sampling import gumbel_noise
from sparsespec_compile.requests.prompts import Prompt
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.requests.stop_strings import Decoder
from sparsespec_compile.runtime.device.sampling import derive_seed
from sparsespec_compile.trial.gaps import (
    Gaps,
    Logits,
    in_float32,
    in_large_batches,
    in_small_batches,
    parting,
    token_gaps,
)
from sparsespec_compile.trial.setting import (
    Asked,
    Written,
    drafting,
    environment,
    plain,
    read_prompts,
    stop_tokens,
    uncompiled,
    write,
)

Verdict = Literal["equal", "rounding", "unclear", "wrong"]

_MEANING: dict[Verdict, str] = {
    "equal": "every text is equal",
    "rounding": "right; texts part only where two tokens are equally likely up to rounding",
    "unclear": "unclear: rounding is as large as what separates likely tokens; audit the model in float32",
    "wrong": "WRONG: texts differ by more than rounding explains",
}

_TOGETHER = 8
"""Texts that HuggingFace's `generate` writes at a time."""

_QUANTILE = 0.99
"""Of the noise of all judged tokens: it counts where a token's own is less."""

_LEAST_POWER = 0.5
"""Share of tokens at which the second-best one would have to be called wrong, for the measure to tell anything."""

_SHOWN = 8
"""Wrong texts that are shown."""


@dataclass(frozen=True)
class Parting:
    """The place at which a text is no longer what it is compared with.

    Attributes:
        prompt: number of the prompt.
        temperature, seed: of the text.
        place: the first new token that differs, from 0.
        token, other: the two tokens there; None = that text has ended.
        gap: by which the worse of both trails HuggingFace's favourite, in logits; infinite where one has ended.
        allowed: the most that rounding explains there.
        wrong: whether `gap`, or that of a later token of a text of ours, is more than is allowed for it.
    """

    prompt: int
    temperature: float
    seed: int
    place: int
    token: int | None
    other: int | None
    gap: float
    allowed: float
    wrong: bool


@dataclass(frozen=True)
class Check:
    """Texts of the engine beside others that must be equal to them.

    Attributes:
        name: what was compared with what.
        texts, tokens: that were compared.
        drafts, accepted: that were verified for the texts in full cycles, and were right; None where drafts are not
            the subject.
        partings: one for each text that differs.
    """

    name: str
    texts: int
    tokens: int
    drafts: int | None
    accepted: int | None
    partings: tuple[Parting, ...]

    @property
    def wrong(self) -> int:
        """Texts that rounding does not explain."""
        return sum(parting.wrong for parting in self.partings)


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. Print it with rich.

    Attributes:
        checks: in the order of the table.
        noise: of the difference of two logits, 99th percentile over the tokens of texts that parted; None = none did.
        power: share of these tokens at which even the second-best one would have been called wrong; None likewise.
        environment: model, device, versions and settings.
    """

    checks: tuple[Check, ...]
    noise: float | None
    power: float | None
    environment: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        """What the checks say together.

        "equal": every text is equal to what it was compared with. "rounding": some part, and only where two tokens are
        equally likely up to rounding. "unclear": some part, and rounding is too coarse to tell right tokens from wrong
        ones. "wrong": some text is wrong.
        """
        if any(check.wrong for check in self.checks):
            return "wrong"
        if not any(check.partings for check in self.checks):
            return "equal"
        return "rounding" if self.power is not None and self.power >= _LEAST_POWER else "unclear"

    @property
    def passed(self) -> bool:
        """Whether the verdict is "equal" or "rounding"."""
        return self.verdict in ("equal", "rounding")

    @property
    def unproven(self) -> list[str]:
        """What the texts did not put to the test: the checks in which no draft, or no wrong one, was verified."""
        return [
            f"{check.name}: no {'wrong ' if check.drafts else ''}draft was verified"
            for check in self.checks
            if check.drafts is not None and check.drafts == check.accepted
        ]

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {"verdict": self.verdict, "passed": self.passed, "unproven": self.unproven} | _finite(asdict(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("compared", "texts", "tokens", "drafts right", "equal", "parted", "wrong", "largest gap")
        for check in self.checks:
            gaps = [parting.gap for parting in check.partings]
            table.add_row(
                check.name,
                str(check.texts),
                f"{check.tokens:,}",
                f"{check.accepted:,} of {check.drafts:,}" if check.drafts else "-",
                str(check.texts - len(check.partings)),
                str(len(check.partings)),
                f"[red]{check.wrong}" if check.wrong else "0",
                f"{max(gaps):.3g}" if gaps else "-",
            )
        yield table
        wrong = [parting for check in self.checks for parting in check.partings if parting.wrong]
        for one in wrong[:_SHOWN]:
            how = f"temperature {one.temperature:g}" if one.temperature else "greedy"
            yield (
                f"prompt {one.prompt}, {how}: new token {one.place} is {one.token} and {one.other}; gap {one.gap:.3g}, "
                f"rounding explains {one.allowed:.3g} (or a later token is wrong)"
            )
        for note in self.unproven:
            yield f"[yellow]{note}; longer texts would prove more"
        if self.noise is not None and self.power is not None:
            yield (
                f"noise of the difference of two logits: {self.noise:.3g}. At {self.power:.1%} of the tokens even the "
                "second-best one would be called wrong"
            )
        yield f"verdict: [{'green' if self.passed else 'red'}]{_MEANING[self.verdict]}"


def audit(
    fast: OptimizedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    seed: int = 0,
    tokenizer: Decoder | None = None,
    progress: bool = True,
) -> AuditReport:
    """Check on this model, these prompts and this device that texts are right.

    Every prompt is continued greedily and with a seed. These texts are compared with plain decoding of the same engine,
    with the same requests in another order and in smaller batches, with the graph called op by op and not captured, and
    with those of `model.generate`, which for sampled texts is given the noise of their seeds. Where texts part, as they
    may in low precision, HuggingFace's own logits tell a tie from a wrong text (`trial/gaps.py`).

    The engine is audited as it stands, with whatever its pool holds. Then its memory is given back, and later calls
    allocate it anew. Where `draft_tokens` is "auto", which may choose no drafts, those by pillars and by n-grams are
    checked as well. Of the model's `generation_config` only the end-of-sequence tokens count.

    Args:
        fast: what to audit. Nothing else may generate with it meanwhile.
        prompts: as in `OptimizedModel.generate_batch`.
        max_new_tokens: of each text.
        temperature: of the sampled texts.
        seed: from which the seed of each text is derived.
        tokenizer: encodes texts and chats.
        progress: whether to show a progress bar.

    Raises:
        PromptError: there are no prompts, or one cannot be read.
        SamplingError: an impossible length, temperature or seed.
        ConfigError: ranks share the model, which `model.generate` cannot run then.
        RequestFailedError: a text could not be completed.
        EngineBusyError: another generation is unfinished.
        As `OptimizedModel.generate_batch` otherwise.

    Example:
        >>> report = audit(optimize(model), prompts, tokenizer=tokenizer)
        >>> rich.print(report)
        >>> report.passed
    """
    SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if temperature == 0:
        raise SamplingError(
            "temperature is that of the sampled texts and must not be 0; greedy ones are always audited."
        )
    tokens = read_prompts(fast, prompts, tokenizer)
    asked = [
        Asked(number, prompt, chosen, derive_seed(seed, number))
        for chosen in (0.0, temperature)
        for number, prompt in enumerate(tokens)
    ]
    with tqdm(unit="text", disable=None if progress else True) as bar:
        return _audit(fast, asked, max_new_tokens, bar)


def _audit(fast: OptimizedModel, asked: list[Asked], max_new_tokens: int, bar: tqdm) -> AuditReport:
    config = fast.spec_config
    auto = config.draft_tokens == "auto"
    drafters = [one for one in ("pillar", "ngram") if config.drafter in ("auto", one)] if auto else []
    bar.total = len(asked) * (4 + (config.draft_tokens != 0) + len(drafters))

    def written(engine: OptimizedModel, what: str, some: Sequence[Asked] = asked) -> Written:
        bar.set_description(what)
        return write(engine, some, max_new_tokens, bar)

    ours = written(fast, "auditing")
    pieces = _shuffled(len(asked))
    reordered = _in_order(pieces, [written(fast, "another order", [asked[i] for i in one]) for one in pieces])
    checks: list[tuple[str, Written, Written]] = []
    if config.draft_tokens != 0:
        with plain(fast) as other:
            undrafted = written(other, "plain decoding")
        kind = "chosen" if auto else "pillar" if config.drafter == "auto" else config.drafter
        checks.append((f"{kind} drafts, plain decoding", ours, undrafted))
        for drafter in drafters:
            with drafting(fast, drafter) as other:
                checks.append((f"{drafter} drafts, plain decoding", written(other, f"{drafter} drafts"), undrafted))
    with uncompiled(fast) as other:
        checks.append(("steps, the graph op by op", ours, written(other, "op by op")))
    checks.append(("batch, another order and batch", ours, reordered))
    fast.release()
    bar.set_description("model.generate")
    checks.append(("texts, model.generate", ours, _generate(fast, asked, max_new_tokens, bar)))
    bar.set_description("judging")
    judge = _Judge(fast.model, asked)
    for _, one, others in checks:
        judge.measure(one, others)
    return AuditReport(
        tuple(_check(name, one, others, judge) for name, one, others in checks),
        judge.noise,
        judge.power,
        environment(fast),
    )


def _check(name: str, one: Written, others: Written, judge: "_Judge") -> Check:
    drafts = accepted = None
    if name.endswith("plain decoding") and one.stats is not None:
        kinds = list(one.stats.by_cycle.values())
        drafts = sum(kind.drafts for kind in kinds)
        accepted = sum(sum(kind.accepted_at) for kind in kinds)
    partings = judge.partings(one, others)
    return Check(name, len(one.texts), sum(map(len, one.texts)), drafts, accepted, tuple(partings))


def _shuffled(texts: int) -> list[list[int]]:
    """Numbers of texts in another order, in batches of which the first is a single text."""
    order = torch.randperm(texts, generator=torch.Generator("cpu").manual_seed(1), device="cpu").tolist()
    half = 1 + (texts - 1) // 2
    return [piece for piece in (order[:1], order[1:half], order[half:]) if piece]


def _in_order(pieces: list[list[int]], written: list[Written]) -> Written:
    texts = {
        number: text
        for piece, one in zip(pieces, written, strict=True)
        for number, text in zip(piece, one.texts, strict=True)
    }
    return Written([texts[number] for number in sorted(texts)], written[-1].stats)


class _NoiseOfSeeds(LogitsProcessor):
    """Gives greedy decoding the noise with which this engine draws: the favourite is the token that the seed draws."""

    def __init__(self, asked: Sequence[Asked], padding: Tensor) -> None:
        device = padding.device
        self._padding = padding
        self._temperature = torch.tensor([one.temperature for one in asked], device=device)[:, None]
        self._seed = torch.tensor([one.seed for one in asked], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of which the highest is drawn."""
        noise = gumbel_noise(self._seed, input_ids.shape[1] - self._padding, scores.shape[1])
        drawn = scores.float() / self._temperature.clamp(min=1e-5) + noise
        return torch.where(self._temperature > 0, drawn, scores.float())


def _generate(fast: OptimizedModel, asked: Sequence[Asked], max_new_tokens: int, bar: tqdm) -> Written:
    """The texts that HuggingFace's own `generate` writes."""
    model: Any = copy.copy(fast.model)
    stops = stop_tokens(fast)
    pad = stops[0] if stops else 0
    # Of the copy alone, which shares everything else: what the model's own asks for is not audited.
    model.generation_config = GenerationConfig(eos_token_id=list(stops) or None, pad_token_id=pad)
    texts: list[list[int]] = []
    for start in range(0, len(asked), _TOGETHER):
        batch = asked[start : start + _TOGETHER]
        width = max(len(one.tokens) for one in batch)
        rows = [[pad] * (width - len(one.tokens)) + one.tokens for one in batch]
        input_ids = torch.tensor(rows, device=fast.device)
        padding = torch.tensor([width - len(one.tokens) for one in batch], device=fast.device)
        mask = (torch.arange(width, device=fast.device) >= padding[:, None]).long()
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([_NoiseOfSeeds(batch, padding)]),
        )
        texts += [_until_its_end(row, stops) for row in output[:, width:].tolist()]
        bar.update(len(batch))
    return Written(texts)


def _until_its_end(row: list[int], stops: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


class _Judge:
    """HuggingFace's logits, for texts that part."""

    def __init__(self, model: PreTrainedModel, asked: Sequence[Asked]) -> None:
        self._model = model
        self._asked = asked
        self._measured: dict[tuple[int, tuple[int, ...]], Gaps] = {}

    def measure(self, one: Written, others: Written) -> None:
        """Measure each pair of texts that part; of texts that `model.generate` wrote, the token where they do."""
        for number, (text, other) in enumerate(zip(one.texts, others.texts, strict=True)):
            place = parting(text, other)
            if place is not None:
                self._gaps(number, text)
                self._gaps(number, _ours(others, other, place))

    @cached_property
    def noise(self) -> float | None:
        """As in `AuditReport`; to be read when everything is measured."""
        if not self._measured:
            return None
        return float(torch.cat([gaps.noise for gaps in self._measured.values()]).quantile(_QUANTILE))

    @property
    def power(self) -> float | None:
        """As in `AuditReport`."""
        if not self._measured:
            return None
        caught = [gaps.margin > self._allowed(gaps) for gaps in self._measured.values()]
        return float(torch.cat(caught).float().mean())

    def partings(self, one: Written, others: Written) -> list[Parting]:
        """What became of the pairs that were measured."""
        found = []
        for number, (text, other) in enumerate(zip(one.texts, others.texts, strict=True)):
            place = parting(text, other)
            if place is not None:
                found.append(self._parting(number, text, other, _ours(others, other, place), place))
        return found

    def _parting(self, number: int, text: list[int], other: list[int], judged: list[int], place: int) -> Parting:
        asked = self._asked[number]
        ended = place in (len(text), len(other))
        gap, allowed, wrong = (math.inf, 0.0, True) if ended else (-math.inf, 0.0, False)
        for tokens in (text, judged):
            gaps = self._gaps(number, tokens)
            limits = self._allowed(gaps)
            # Written so that a gap that is not a number is wrong.
            wrong = wrong or not bool((gaps.gap[place:] <= limits[place:]).all())
            if not ended and not float(gaps.gap[place]) <= gap:
                gap, allowed = float(gaps.gap[place]), float(limits[place])
        token, others = (None if place == len(one) else one[place] for one in (text, other))
        return Parting(asked.prompt, asked.temperature, asked.seed, place, token, others, gap, allowed, wrong)

    @cached_property
    def _again(self) -> list[Logits]:
        """What tells how uncertain the logits are."""
        exact = in_float32(self._model)
        return [in_small_batches(self._model), *([] if exact is None else [exact])]

    def _gaps(self, number: int, tokens: list[int]) -> Gaps:
        key = number, tuple(tokens)
        if key not in self._measured:
            asked = self._asked[number]
            text = torch.tensor([*asked.tokens, *tokens], device=self._model.device)
            self._measured[key] = token_gaps(
                in_large_batches(self._model),
                self._again,
                text,
                len(asked.tokens),
                self._model.dtype,
                asked.temperature,
                asked.seed,
            )
        return self._measured[key]

    def _allowed(self, gaps: Gaps) -> Tensor:
        """Twice the noise, once for each of two right programs."""
        noise = torch.maximum(gaps.own_noise, gaps.ulp)
        return 2 * noise.clamp(min=self.noise or 0.0)


def _ours(others: Written, text: list[int], place: int) -> list[int]:
    """What of the other text is judged: all of it where it is ours, else the token where they part."""
    return text if others.stats is not None else text[: place + 1]


def _finite(value: Any) -> Any:
    """Plain data for JSON, which has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
