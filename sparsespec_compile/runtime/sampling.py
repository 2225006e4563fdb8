"""Drawing tokens on the device, with per-request settings.

Verification is coupled: the draft for a position and the target's token for it are drawn with the same noise. A draft
is accepted while it equals the target's token, so the text is the one that plain decoding draws from the same seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.runtime.noise import gumbel_noise


@dataclass(frozen=True, kw_only=True)
class DrawParams:
    """How one request's tokens are drawn.

    Args:
        temperature: 0.0 = greedy; t in [1e-5, 1e5] divides the logits.
        top_k: 0 = off; k > 0 keeps the k most likely tokens (all that tie with the k-th).
        top_p: 1.0 = off; p in (0, 1) keeps the most likely tokens until their probabilities reach p (and all that tie
            with the last of them).
        min_p: 0.0 = off; m in (0, 1] keeps tokens with at least m times the probability of the most likely.
        seed: in [0, 2**63). The text is a function of the prompt, the settings and the seed, in any batch.

    Filters apply in HuggingFace's order: temperature, top_k, top_p, min_p.

    Raises:
        SamplingError: for a value that is not allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("temperature", Real, lambda t: t == 0 or 1e-5 <= t <= 1e5, "a number in [1e-5, 1e5], or 0 = greedy")
        self._check("top_k", Integral, lambda k: 0 <= k < 2**31, "the number of tokens to keep, 0 = off")
        self._check("top_p", Real, lambda p: 0 < p <= 1, "a number in (0, 1], 1 = off")
        self._check("min_p", Real, lambda m: 0 <= m <= 1, "a number in [0, 1], 0 = off")
        self._check("seed", Integral, lambda s: 0 <= s < 2**63, "an integer in [0, 2**63)")

    def _check(self, name: str, kind: type, allowed: Callable[[Any], bool], text: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):  # NaN passes no comparison
            raise SamplingError(f"{name} must be {text}; got {value!r}.")

    @property
    def greedy(self) -> bool:
        """Whether tokens are the most likely ones, with no noise."""
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether top_k or top_p is on: these need the logits sorted."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)


class SamplingRows(NamedTuple):
    """Settings of R rows of logits, on the device: float32, int64, float32, float32, int64, each [R]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def sample(logits: Tensor, rows: SamplingRows, position: Tensor, *, noise: bool, sort: bool) -> Tensor:
    """Draw one token for each row of logits: the argmax of filtered, scaled logits plus Gumbel noise.

    Args:
        logits: [R, V], any floating dtype; computed in float32.
        rows: settings of the rows; a row of temperature 0 is greedy whatever else it says.
        position: int64 [R], the position in its sequence of the token to be drawn: the noise's counter.
        noise: False skips the noise, for when every row is greedy.
        sort: False skips top_k and top_p, for when no row uses them.

    Returns:
        int64 [R].
    """
    logits = logits.float()
    if not noise:
        return logits.argmax(dim=-1)
    greedy = rows.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, rows.temperature)[:, None]
    keep = scaled >= _lowest_kept(scaled, rows, sort)[:, None]
    noisy = scaled + gumbel_noise(rows.seed, position, logits.shape[-1])
    noisy = noisy.masked_fill(~keep, -math.inf)
    return torch.where(greedy[:, None], logits, noisy).argmax(dim=-1)


def log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """Natural logarithm of the model's own probability of each token: float32 [R] for logits [R, V], int64 [R]."""
    logits = logits.float()
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(dim=-1)


def _lowest_kept(scaled: Tensor, rows: SamplingRows, sort: bool) -> Tensor:
    """The lowest logit that passes every filter, float32 [R]. As thresholds, the filters need no scatter back."""
    min_p_lowest = scaled.amax(dim=-1) + torch.log(rows.min_p)  # log(0) = -inf keeps all
    if not sort:
        return min_p_lowest
    vocabulary = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values
    top_k = torch.where(rows.top_k > 0, rows.top_k, vocabulary).clamp(max=vocabulary)
    top_k_lowest = ordered.gather(-1, top_k[:, None] - 1)
    probability = ordered.masked_fill(ordered < top_k_lowest, -math.inf).softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # of the tokens more likely than this one
    within = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1.0)
    kept = within.sum(dim=-1, keepdim=True).clamp(min=1)
    top_p_lowest = ordered.gather(-1, kept - 1)
    return torch.maximum(min_p_lowest, torch.maximum(top_k_lowest, top_p_lowest)[:, 0])
