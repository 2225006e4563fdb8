"""How tokens are drawn: the settings of a request, the same settings as rows, and the draw, also over ranks.

Verification is coupled: the draft for a position and the target's token for it are drawn with the same noise. A draft
is accepted while it equals the target's token, so the text is the one that plain decoding draws from the same seed.

Where ranks share the vocabulary, each has the logits of some tokens. The token of a row is the one with the highest sum
of logit and noise, and noise is keyed by the token's number in the whole vocabulary. So ranks exchange the highest sum
of their part and its token, 8 bytes a row, and all take the highest of these, the lowest token among equal ones: the
very token that one device draws. Filters, log-probabilities and what processes logits need whole rows. In iterations in
which some request has them, ranks exchange their logits, and each draws from whole rows what one device draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.kernels.ops import all_gather, draw_part, draw_tokens
from sparsespec_compile.kernels.reference.sampling import LOW, philox
from sparsespec_compile.passes.ranks import VocabularyPart


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

    @property
    def filtered(self) -> bool:
        """Whether some tokens are kept out, so that a draw needs the logits of all of them."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def _check(self, name: str, kind: type, allowed: Callable[[Any], bool], text: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):  # NaN passes no comparison
            raise SamplingError(f"{name} must be {text}; got {value!r}.")


class SamplingRows(NamedTuple):
    """Settings of R rows of logits, on the device, in the order `draw_tokens` takes them.

    float32, int64, float32, float32, int64, each [R].
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """Natural logarithm of the model's own probability of each token: float32 [R] for logits [R, V], int64 [R]."""
    logits = logits.float()
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(dim=-1)


def derive_seed(seed: int, index: int) -> int:
    """The seed of request `index` of a batch that was given one `seed`: distinct for distinct (seed, index).

    Returns:
        An integer in [0, 2**63).
    """
    numbers = (index, 0, 1, seed & LOW, (seed >> 32) & LOW)  # text noise has 0 where this has 1
    first, zero, one, low, high = torch.tensor(numbers, dtype=torch.int64, device="cpu").unbind()
    words = philox((first, zero, zero, one), (low, high))
    return (int(words[0]) | int(words[1]) << 32) & (2**63 - 1)


_MOST = 2**31 - 1
"""The largest token."""


def whole_rows(logits: Tensor, part: VocabularyPart) -> Tensor:
    """Logits [R, V] of the whole vocabulary, from each rank's [R, part.length]."""
    parts = all_gather(logits, part.ranks.group, part.ranks.size)
    return parts.transpose(0, 1).reshape(logits.shape[0], -1)[:, : part.tokens]


def draw_over_ranks(logits: Tensor, settings: SamplingRows, position: Tensor, part: VocabularyPart) -> Tensor:
    """The token int64 [R] of each row without filters, from each rank's logits [R, part.length]."""
    own = logits[:, : part.held]  # rows behind the last token are there for equal shapes alone
    value, token = draw_part(own, settings.temperature, settings.seed, position, part.first)
    best = all_gather(_key(value, token), part.ranks.group, part.ranks.size).amax(dim=0)
    return _MOST - (best & _MOST)


def draw(logits: Tensor, settings: SamplingRows, position: Tensor, part: VocabularyPart | None, whole: bool) -> Tensor:
    """A token for each row.

    Args:
        logits: [R, V], or [R, part.length] where they are not whole.
        settings: of the rows.
        position: int64 [R], the position of the token to be drawn.
        part: what this rank has of the vocabulary; None = all of it.
        whole: whether the logits are those of whole rows, which filters need.
    """
    if part is not None and not whole:
        return draw_over_ranks(logits, settings, position, part)
    return draw_tokens(logits, *settings, position)


def _key(value: Tensor, token: Tensor) -> Tensor:
    """int64 keys in the order of the values float32, and of equal values in the falling order of tokens."""
    bits = (value + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    ordered = torch.where(bits < 0, bits ^ _MOST, bits).long()
    return ordered * 2**32 + (_MOST - token)
