"""`advise`: whether speculation pays for a model, a device and a workload, before anything is compiled."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from rich.jupyter import JupyterMixin
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel

from sparsespec_compile.advice.ceilings import Ceilings, ceilings_of
from sparsespec_compile.advice.config_cost import config_cost, experts_of
from sparsespec_compile.advice.prediction import (
    Acceptance,
    Curve,
    DraftCost,
    Workload,
    accepted,
    curves,
    draft_cost,
    predict_cycle,
    workload,
)
from sparsespec_compile.config import AUTO_PROPOSALS, Drafter, DraftWeights, SpecConfig
from sparsespec_compile.errors import AdviceError
from sparsespec_compile.passes.cost.terms import IterationCost, distinct_experts
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.host.phases import expected_drafts

_NGRAMS = "ngram_acceptance"

MAX_DRAFT_TOKENS = 16
"""Longest cycle that is considered."""


class Costs(NamedTuple):
    """The cost of an iteration, and of one in which every row is a draft."""

    exact: IterationCost
    drafts: DraftCost | None


@dataclass(frozen=True)
class Choice:
    """One way to decode a workload.

    Attributes:
        draft_tokens: k; 0 = plain decoding.
        drafter: "pillar" or "ngram".
        draft_proposals: as in `SpecConfig`.
        budget_ratio: as in `SpecConfig`.
        budget: cached positions that a draft reads at the workload's length; 0 where no pass drafts.
        accepted: mean accepted drafts of a cycle.
        tokens_per_second: predicted, all requests together.
        light_tokens_per_second: the same at the speed of light.
    """

    draft_tokens: int
    drafter: Drafter
    draft_proposals: int
    budget_ratio: float
    budget: int
    accepted: float
    tokens_per_second: float
    light_tokens_per_second: float


@dataclass(frozen=True)
class Advice(JupyterMixin):
    """Whether speculation pays, and with which settings. Print it; a notebook shows it as it is printed.

    Attributes:
        device: its name.
        draft_weights: what drafts read of the weights, as in `SpecConfig`.
        workload: mean cached length, and requests.
        plain: decoding without speculation.
        speculative: the best choice with k >= 1 and drafts by the model, also when it does not pay.
        ngrams: the best choice with drafts from the text itself; None = how many of them are right was not given.
        both: the best choice with drafts by the model that judge proposals from the text; None likewise.
        break_even_length: shortest mean cached length at which drafts by the model pay with this batch, None when they
            do not even at the model's longest.
        experts: of a mixture, experts of a layer that one row of each request chooses on average, and all of them.
    """

    device: str
    draft_weights: DraftWeights
    workload: Workload
    plain: Choice
    speculative: Choice
    ngrams: Choice | None
    both: Choice | None
    break_even_length: int | None
    experts: tuple[float, int] | None = None

    @property
    def speedup(self) -> float:
        """Predicted speed of the fastest speculation over plain decoding; below 1 where none pays."""
        return self._speculation.tokens_per_second / self.plain.tokens_per_second

    @property
    def light_speedup(self) -> float:
        """The same choice at the speed of light."""
        return self._speculation.light_tokens_per_second / self.plain.light_tokens_per_second

    @property
    def speculate(self) -> bool:
        """Whether speculation pays, by the model or from the text itself."""
        return self.best is not self.plain

    @property
    def best(self) -> Choice:
        """What is advised."""
        return max(self.plain, self._speculation, key=lambda choice: choice.tokens_per_second)

    @property
    def _speculation(self) -> Choice:
        """The fastest choice with drafts."""
        choices = [choice for choice in (self.speculative, self.ngrams, self.both) if choice is not None]
        return max(choices, key=lambda choice: choice.tokens_per_second)

    def config(self) -> SpecConfig:
        """The settings that are advised; others are the defaults."""
        return SpecConfig(
            draft_tokens=self.best.draft_tokens,
            drafter=self.best.drafter,
            draft_proposals=self.best.draft_proposals,
            budget_ratio=self.best.budget_ratio,
            draft_weights=self.draft_weights,
            max_requests=max(self.workload.batch, SpecConfig().max_requests),
        )

    @property
    def _weights(self) -> str:
        return "exact weights" if self.draft_weights == "exact" else "8-bit draft weights"

    def __str__(self) -> str:
        load = self.workload
        limit = (
            "at no length of this model"
            if self.break_even_length is None
            else f"from {self.break_even_length:,} cached tokens"
        )
        requests = "1 request" if load.batch == 1 else f"{load.batch} requests"
        lines = [
            f"{'Speculate' if self.speculate else 'Do not speculate'}: {requests} at {load.length:,.0f} cached tokens "
            f"on {self.device}.",
            f"plain decoding:       {self.plain.tokens_per_second:,.0f} tok/s",
            f"drafts by the model:  {self._line(self.speculative)}",
            f"  budget_ratio={self.speculative.budget_ratio:g} ({self.speculative.budget:,} positions), "
            f"{self._weights}",
            f"  speedup {self._over_plain(self.speculative)} at the speed of light; with this batch they",
            f"  pay {limit}",
        ]
        if self.ngrams is not None:
            lines.append(f"drafts from the text: {self._line(self.ngrams)}")
        if self.both is not None:
            lines.append(f"both:                 {self._line(self.both)},")
            lines.append(f"  draft_proposals={self.both.draft_proposals}")
        if self.experts is not None:
            read, count = self.experts
            rows = "1 draft row chooses" if load.batch == 1 else f"{load.batch} draft rows choose"
            lines.append(f"experts of a layer:   {rows} {read:.0f} of {count} on average")
            if read < 0.8 * count:
                lines.append("  draft steps of few requests read few experts, verifications more")
        return "\n".join(lines)

    def _over_plain(self, choice: Choice) -> str:
        light = choice.light_tokens_per_second / self.plain.light_tokens_per_second
        return f"{choice.tokens_per_second / self.plain.tokens_per_second:.2f}, {light:.2f}"

    @staticmethod
    def _line(choice: Choice) -> str:
        return (
            f"{choice.tokens_per_second:,.0f} tok/s with draft_tokens={choice.draft_tokens}, "
            f"{choice.accepted:.2f} accepted"
        )

    def __rich__(self) -> Text:
        return Text(str(self))


def advise(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    device: torch.device | str | Ceilings,
    lengths: int | Sequence[int],
    batch: int,
    acceptance: Acceptance,
    draft_weights: DraftWeights = "auto",
    ngram_acceptance: Curve | None = None,
) -> Advice:
    """Predict whether speculation pays, the best k and budget, and the length at which it breaks even.

    R requests give R (a + 1) / (k + 1) tokens an iteration on average, a = accepted of k drafts; plain decoding gives
    R, and R (a + 1) with drafts from the text itself, where every iteration verifies. The times of both iterations come
    from the bytes and FLOPs of the model and the ceilings of the device (`prediction.py`).

    Args:
        model_or_config: a decoder-only causal LM of a known family, or its configuration with `dtype` set.
        device: a CUDA device, the name of a known one ("H200"), or its `Ceilings`.
        lengths: cached length of the requests, or a sample of their lengths, of which the mean counts.
        batch: requests decoded together.
        acceptance: the probability p that a draft is right when all before it were (a = p + p^2 + ... + p^k); or a
            function from k, 1 to 16, to a; or a mapping from `budget_ratio` to one of these. Only the mapping lets the
            budget be chosen: how acceptance depends on it is a property of the model, to be measured.
        draft_weights: as in `SpecConfig`; "auto" is taken for 8 bits, as on a GPU with memory for them.
        ngram_acceptance: of drafts from the texts of the batch, as `acceptance` but for the mapping; such as 0.3 for
            ordinary documents. None = they are left out.

    Raises:
        CostModelError: the family or the dtype is unknown.
        CeilingsError: the device is unknown.
        AdviceError: impossible lengths, batch or acceptance.

    Example:
        >>> print(advise(AutoConfig.from_pretrained("Qwen/Qwen3-8B"), "H200", 8192, 64, acceptance=0.9))
    """
    config, dtype = _config(model_or_config)
    kind = SpecConfig(draft_weights=draft_weights).draft_weights
    cost, ceilings, load = config_cost(config, dtype), ceilings_of(device), workload(lengths, batch)
    narrow = draft_cost(config_cost(config, dtype, draft_weights=True), "int8" if kind == "int8" else "fp8")
    costs = Costs(cost, None if kind == "exact" else narrow)
    ways, positions = curves(acceptance), config.to_dict()["max_position_embeddings"]
    if load.length > positions:
        raise AdviceError(
            f"lengths are {load.length:,.0f} tokens on average, and the model has {positions:,} positions "
            "(config.max_position_embeddings). Give lengths that its texts can have."
        )
    return Advice(
        device=ceilings.name,
        draft_weights=kind,
        workload=load,
        plain=_plain(costs, ceilings, load),
        speculative=_best(costs, ceilings, load, ways),
        ngrams=None if ngram_acceptance is None else _best_ngrams(costs, ceilings, load, ngram_acceptance),
        both=None if ngram_acceptance is None else _best_of_both(costs, ceilings, load, ways, ngram_acceptance),
        break_even_length=_break_even(costs, ceilings, load.batch, ways, positions),
        experts=_experts_read(config, load.batch),
    )


def _experts_read(config: PreTrainedConfig, rows: int) -> tuple[float, int] | None:
    experts = experts_of(config)
    if experts is None:
        return None
    return float(distinct_experts(rows, experts.experts, experts.chosen)), experts.experts


def _config(model_or_config: PreTrainedModel | PreTrainedConfig) -> tuple[PreTrainedConfig, torch.dtype | str | None]:
    if isinstance(model_or_config, PreTrainedModel):
        return model_or_config.config, model_or_config.dtype
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config, model_or_config.dtype
    raise AdviceError(f"Expected a transformers model or configuration, got {type(model_or_config).__name__}.")


def _choice(
    costs: Costs,
    ceilings: Ceilings,
    load: Workload,
    settings: SpecConfig,
    budget: int,
    curve: Curve,
    right: Sequence[float] | None = None,
    name: str = "acceptance",
) -> Choice:
    """`right`: probability that the first 1, 2, ... proposals are all right; None = there are none. `name`: of the
    argument that the curve is."""
    (kind,) = cycles_of(settings)
    made = kind.drafts if right is None else expected_drafts(kind, right, settings.schedule, load.batch)
    few = math.floor(made)
    mean = accepted(curve, few, name)
    if made > few:  # between whole numbers of drafts, in proportion
        mean += (made - few) * (accepted(curve, few + 1, name) - mean)
    time = predict_cycle(costs.exact, kind, settings.schedule, load.length, load.batch, ceilings, costs.drafts)
    tokens = load.batch * (mean + 1) / (kind.passes + 1)
    speeds = tokens / time.seconds, tokens / time.light_seconds
    return Choice(kind.drafts, settings.drafter, kind.proposals, settings.budget_ratio, budget, mean, *speeds)


def _plain(costs: Costs, ceilings: Ceilings, load: Workload) -> Choice:
    return _choice(costs, ceilings, load, SpecConfig(draft_tokens=0, drafter="pillar"), budget=0, curve=0.0)


def _best(costs: Costs, ceilings: Ceilings, load: Workload, ways: dict[float, Curve]) -> Choice:
    choices = []
    for ratio, curve in ways.items():
        for k in range(1, MAX_DRAFT_TOKENS + 1):
            settings = SpecConfig(draft_tokens=k, drafter="pillar", budget_ratio=ratio)
            budget = settings.budget(round(load.length))
            choices.append(_choice(costs, ceilings, load, settings, budget, curve))
    return max(choices, key=lambda choice: choice.tokens_per_second)


def _best_of_both(costs: Costs, ceilings: Ceilings, load: Workload, ways: dict[float, Curve], ngrams: Curve) -> Choice:
    up_to = np.array([accepted(ngrams, drafts, _NGRAMS) for drafts in range(AUTO_PROPOSALS[-1] + 1)])
    right, choices = np.diff(up_to).tolist(), []
    for ratio, curve in ways.items():
        for k, proposals in itertools.product(range(2, MAX_DRAFT_TOKENS + 1), AUTO_PROPOSALS):
            if proposals < k:
                settings = SpecConfig(draft_tokens=k, draft_proposals=proposals, drafter="pillar", budget_ratio=ratio)
                budget = settings.budget(round(load.length))
                choices.append(_choice(costs, ceilings, load, settings, budget, curve, right))
    return max(choices, key=lambda choice: choice.tokens_per_second)


def _best_ngrams(costs: Costs, ceilings: Ceilings, load: Workload, curve: Curve) -> Choice:
    settings = [SpecConfig(draft_tokens=k, drafter="ngram") for k in range(1, MAX_DRAFT_TOKENS + 1)]
    choices = [_choice(costs, ceilings, load, one, 0, curve, name=_NGRAMS) for one in settings]
    return max(choices, key=lambda choice: choice.tokens_per_second)


def _break_even(costs: Costs, ceilings: Ceilings, batch: int, ways: dict[float, Curve], longest: int) -> int | None:
    """The more is cached, the more speculation saves: bisection finds where it begins to pay."""

    def pays(length: int) -> bool:
        load = Workload(length, batch)
        plain = _plain(costs, ceilings, load).tokens_per_second
        return _best(costs, ceilings, load, ways).tokens_per_second > plain

    if not pays(longest):
        return None
    low, high = 0, longest  # does not pay at low, pays at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
