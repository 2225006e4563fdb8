"""How a prompt is continued, and what comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from sparsespec_compile.config import Settings
from sparsespec_compile.errors import SamplingError, TokenizerError
from sparsespec_compile.requests.processors import asked_processing
from sparsespec_compile.requests.stop_strings import Decoder
from sparsespec_compile.runtime.device.processing import Processor
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
        repetition_penalty: 1.0 = off; r > 0 divides the logits above 0 of tokens that occur in prompt or text, and
            multiplies those below.
        presence_penalty, frequency_penalty: 0.0 = off; taken off the logit of a token that occurs in the text, once,
            and for each time.
        logit_bias: token ids and what is added to their logits; -inf forbids a token.
        sequence_bias: the same of the last token of sequences, as transformers has it: {(5, 7): -2.0}.
        suppress_tokens, begin_suppress_tokens: tokens that do not occur, or not as the first of the text.
        bad_words_ids: sequences of tokens that do not occur.
        no_repeat_ngram_size: 0 = off; n tokens in a row do not occur twice in prompt and text.
        encoder_repetition_penalty, encoder_no_repeat_ngram_size: likewise, of the prompt alone.
        min_new_tokens, min_length: new tokens, or tokens with those of the prompt, before a stop token may occur.
        forced_bos_token_id: the token behind a prompt of one token.
        forced_eos_token_id: the token, or one of the tokens, that a text of max_new_tokens ends with.
        exponential_decay_length_penalty: (s, f): from new token s on stop tokens become likelier by powers of f.
        remove_invalid_values: whether NaN and infinite logits become finite ones.
        top_h, typical_p, epsilon_cutoff, eta_cutoff: transformers' other filters, of sampled texts.
        prefix_allowed_tokens_fn: of (number of the prompt, ids) gives the tokens that are allowed.
        logits_processor: functions of (ids [1, L], scores [1, V]) that give scores, such as transformers'
            `LogitsProcessor`. They must be functions: each row of drafts and verifications is put through them.
            These two, the filters in the line above them, and what the op does not hold (`docs/sampling.md`) take
            iterations that are not captured.
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
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    no_repeat_ngram_size: int = 0
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    min_length: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    prefix_allowed_tokens_fn: Callable[[int, Any], Sequence[int]] | None = None
    logits_processor: Sequence[Processor] | None = None
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
        if isinstance(tokens, bytes) or not _is_list(tokens) or not all(_is_token(one) for one in tokens):
            raise SamplingError(f"stop_token_ids must be a sequence of token ids, got {self.stop_token_ids!r}.")
        self.draw(0 if self.seed is None else self.seed)
        asked_processing(vars(self), sampled=True)

    def processing(self) -> dict[str, Any]:
        """What is done to logits, of `asked_processing`."""
        return asked_processing(vars(self), sampled=self.temperature > 0)

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
        tokenizer: decodes `text`; None = none was given.
    """

    index: int
    sample: int
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float]
    stats: RequestStats
    error: Exception | None = None
    tokenizer: Decoder | None = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The new tokens as text, without special tokens.

        Raises:
            TokenizerError: the text was generated without a tokenizer.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                "This text was generated without a tokenizer. Pass tokenizer= to the call, or use "
                "tokenizer.decode(completion.token_ids)."
            )
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
