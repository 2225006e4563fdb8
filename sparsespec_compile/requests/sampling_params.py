"""How a prompt is continued, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from sparsespec_compile.config import Settings
from sparsespec_compile.errors import SamplingError
from sparsespec_compile.runtime.device.sampling import DrawParams
from sparsespec_compile.runtime.host.request import FinishReason, RequestStats


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Settings, error=SamplingError):
    """How one prompt is continued. Frozen, so threads may share it; every field is checked when it is built.

    Where a call is given `SamplingParams`, they say everything about drawing, length and number of texts: nothing of
    that comes from the model's `generation_config`. Only what ends a text does, where `stop_token_ids` or
    `stop_strings` is None.

    Args:
        max_new_tokens: new tokens at most.
        temperature: 0.0 = greedy; t in [1e-5, 1e5] divides the logits.
        top_k: 0 = off; k keeps the k most likely tokens.
        top_p: 1.0 = off; p in (0, 1) keeps the most likely tokens until their probabilities reach p.
        min_p: 0.0 = off; m in (0, 1] keeps tokens with at least m times the probability of the most likely.
        seed: in [0, 2**63): the seed of the text. The text is a function of prompt, settings and seed, in any batch:
            prompts that are equal and share one seed get equal texts. For texts that differ, use `n`, or give each
            prompt `SamplingParams` with a seed of its own. (`generate(seed=7)` is a seed for the batch instead: each
            row gets its own, derived from it.) None: drawn from torch's global generator, another for each prompt.
        stop_token_ids: the text ends with the first of these. None: the model's own end-of-sequence tokens.
        stop_strings: the text ends with the token that completes one of these in the new text; needs a tokenizer. None:
            the model's own, which few models have; (): none.
        logprobs: whether the natural log-probability of each token, under the model itself, is wanted.
        n: texts for this prompt. A single one takes `seed` itself, several take seeds of their own, derived from it.

    Raises:
        SamplingError: for an unknown name or a value that is not allowed; the text gives both.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_strings: Sequence[str] | None = None
    logprobs: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "n"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise SamplingError(f"{name} must be an integer of at least 1, got {value!r}.")
        if not isinstance(self.logprobs, bool):
            raise SamplingError(f"logprobs must be True or False, got {self.logprobs!r}.")
        strings = () if self.stop_strings is None else self.stop_strings
        if not _is_list(strings) or not all(isinstance(one, str) and one for one in strings):
            raise SamplingError(f"stop_strings must be a sequence of non-empty strings, got {self.stop_strings!r}.")
        tokens = () if self.stop_token_ids is None else self.stop_token_ids
        if not _is_list(tokens) or not all(_is_token(one) for one in tokens):
            raise SamplingError(f"stop_token_ids must be a sequence of token ids, got {self.stop_token_ids!r}.")
        self.draw(0 if self.seed is None else self.seed)

    def draw(self, seed: int) -> DrawParams:
        """The settings that the device needs."""
        return DrawParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=seed)


@dataclass(frozen=True)
class Completion:
    """A prompt's text.

    Attributes:
        index: number of the prompt, from 0 in the order in which the prompts were given.
        sample: which of the prompt's `n` texts, from 0.
        token_ids: new tokens, with the stop token, if one ended the text.
        finish_reason: why it ended.
        logprobs: natural log-probability of each new token; empty unless asked for.
        stats: what it took.
        error: what failed, with `FinishReason.ERROR`; None otherwise.
    """

    index: int
    sample: int
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    stats: RequestStats
    error: Exception | None = None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
