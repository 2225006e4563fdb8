"""`advise`: whether speculation pays for a model, a device and a workload, before anything is compiled."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparsespec_compile.advice.calibration import ceilings_of
from sparsespec_compile.advice.ceilings import Ceilings
from sparsespec_compile.advice.config_cost import config_cost
from sparsespec_compile.advice.prediction import cycle, predict_mean
from sparsespec_compile.advice.workload import Acceptance, Curve, Workload, accepted, curves, workload
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import AdviceError
from sparsespec_compile.passes.cost.terms import IterationCost

MAX_DRAFT_TOKENS = 16
"""Longest cycle that is considered."""


@dataclass(frozen=True)
class Choice:
    """One way to decode a workload.

    Attributes:
        draft_tokens: k; 0 = plain decoding.
        budget_ratio: as in `SpecConfig`.
        budget: cached positions that a draft reads at the workload's length; 0 for plain decoding.
        accepted: mean accepted drafts of a cycle.
        tokens_per_second: predicted, all requests together.
        light_tokens_per_second: the same at the speed of light.
    """

    draft_tokens: int
    budget_ratio: float
    budget: int
    accepted: float
    tokens_per_second: float
    light_tokens_per_second: float


@dataclass(frozen=True)
class Advice:
    """Whether speculation pays, and with which settings.

    Attributes:
        device: its name.
        workload: mean cached length, and requests.
        plain: decoding without speculation.
        speculative: the best choice with k >= 1, also when it does not pay.
        break_even_length: shortest mean cached length at which speculation pays with this batch, None when it does
            not even at the model's longest.
    """

    device: str
    workload: Workload
    plain: Choice
    speculative: Choice
    break_even_length: int | None

    @property
    def speedup(self) -> float:
        """Predicted speed of the best speculation over plain decoding."""
        return self.speculative.tokens_per_second / self.plain.tokens_per_second

    @property
    def light_speedup(self) -> float:
        """The same at the speed of light."""
        return self.speculative.light_tokens_per_second / self.plain.light_tokens_per_second

    @property
    def speculate(self) -> bool:
        """Whether speculation pays."""
        return self.speedup > 1.0

    @property
    def best(self) -> Choice:
        """What is advised."""
        return self.speculative if self.speculate else self.plain

    def config(self) -> SpecConfig:
        """The settings that are advised; others are the defaults."""
        return SpecConfig(draft_tokens=self.best.draft_tokens, budget_ratio=self.best.budget_ratio)

    def __str__(self) -> str:
        choice, load = self.speculative, self.workload
        limit = (
            "at no length of this model"
            if self.break_even_length is None
            else f"from {self.break_even_length:,} cached tokens"
        )
        requests = "1 request" if load.batch == 1 else f"{load.batch} requests"
        return (
            f"{'Speculate' if self.speculate else 'Do not speculate'}: {requests} at {load.length:,.0f} cached tokens "
            f"on {self.device}.\nBest speculation: draft_tokens={choice.draft_tokens}, "
            f"budget_ratio={choice.budget_ratio:g} ({choice.budget:,} positions), {choice.accepted:.2f} accepted: "
            f"{choice.tokens_per_second:,.0f} tok/s.\nPlain decoding: {self.plain.tokens_per_second:,.0f} tok/s; "
            f"speedup {self.speedup:.2f}, {self.light_speedup:.2f} at the speed of light.\n"
            f"With this batch speculation pays {limit}."
        )


def advise(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    device: torch.device | str | Ceilings,
    lengths: int | Sequence[int],
    batch: int,
    acceptance: Acceptance,
) -> Advice:
    """Predict whether speculation pays, the best k and budget, and the length at which it breaks even.

    R requests give R (a + 1) / (k + 1) tokens an iteration on average, a = accepted of k drafts; plain
    decoding gives R. The times of both iterations come from the bytes and FLOPs of the model and the ceilings of the
    device (`prediction.py`).

    Args:
        model_or_config: a decoder-only causal LM of a known family, or its configuration with `dtype` set.
        device: a CUDA device, the name of a known one ("H200"), or its `Ceilings`.
        lengths: cached length of the requests, or a sample of their lengths, of which the mean counts.
        batch: requests decoded together.
        acceptance: the probability p that a draft is right when all before it were (a = p + p^2 + ... + p^k); or a
            function from k to a; or a mapping from `budget_ratio` to one of these. Only the mapping lets the budget
            be chosen: how acceptance depends on it is a property of the model, to be measured.

    Raises:
        CostModelError: the family or the dtype is unknown.
        CeilingsError: the device is unknown.
        AdviceError: impossible lengths, batch or acceptance.

    Example:
        >>> print(advise(AutoConfig.from_pretrained("Qwen/Qwen3-8B"), "H200", 8192, 64, acceptance=0.9))
    """
    config, dtype = _config(model_or_config)
    cost, ceilings, load = config_cost(config, dtype), ceilings_of(device), workload(lengths, batch)
    ways, positions = curves(acceptance), config.to_dict()["max_position_embeddings"]
    if load.length > positions:
        raise AdviceError(
            f"lengths are {load.length:,.0f} tokens on average, and the model has {positions:,} positions "
            "(config.max_position_embeddings). Give lengths that its texts can have."
        )
    return Advice(
        device=ceilings.name,
        workload=load,
        plain=_plain(cost, ceilings, load),
        speculative=_best(cost, ceilings, load, ways),
        break_even_length=_break_even(cost, ceilings, load.batch, ways, positions),
    )


def _config(model_or_config: PreTrainedModel | PreTrainedConfig) -> tuple[PreTrainedConfig, torch.dtype | str | None]:
    if isinstance(model_or_config, PreTrainedModel):
        return model_or_config.config, model_or_config.dtype
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config, model_or_config.dtype
    raise AdviceError(f"Expected a transformers model or configuration, got {type(model_or_config).__name__}.")


def _choice(
    cost: IterationCost, ceilings: Ceilings, load: Workload, settings: SpecConfig, budget: int, curve: Curve
) -> Choice:
    k = settings.most_draft_tokens
    mean = accepted(curve, k)
    time = predict_mean(cost, cycle(load.batch, k, load.length, budget), ceilings)
    tokens = load.batch * (mean + 1) / (k + 1)
    return Choice(k, settings.budget_ratio, budget, mean, tokens / time.seconds, tokens / time.light_seconds)


def _plain(cost: IterationCost, ceilings: Ceilings, load: Workload) -> Choice:
    return _choice(cost, ceilings, load, SpecConfig(draft_tokens=0), budget=0, curve=0.0)


def _best(cost: IterationCost, ceilings: Ceilings, load: Workload, ways: dict[float, Curve]) -> Choice:
    choices = []
    for ratio, curve in ways.items():
        for k in range(1, MAX_DRAFT_TOKENS + 1):
            settings = SpecConfig(draft_tokens=k, budget_ratio=ratio)
            budget = settings.budget(round(load.length))
            choices.append(_choice(cost, ceilings, load, settings, budget, curve))
    return max(choices, key=lambda choice: choice.tokens_per_second)


def _break_even(
    cost: IterationCost, ceilings: Ceilings, batch: int, ways: dict[float, Curve], longest: int
) -> int | None:
    """The more is cached, the more speculation saves: bisection finds where it begins to pay."""

    def pays(length: int) -> bool:
        load = Workload(length, batch)
        plain = _plain(cost, ceilings, load).tokens_per_second
        return _best(cost, ceilings, load, ways).tokens_per_second > plain

    if not pays(longest):
        return None
    low, high = 0, longest  # does not pay at low, pays at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
