"""What changes logits, as transformers' settings name it: read, checked, and made into what the engine applies.

Most settings are data of the op `process_logits`. What the op does not do is done by transformers' own processors, one
row at a time: then all of a request's settings are, so that they apply in transformers' order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.runtime.device.processing import Processing, Processor, RowProcessors, Rule
from sparsespec_compile.runtime.device.sampling import DrawParams

theirs: Any = logits_process  # whose annotations are narrower than what it takes

NEUTRAL: Mapping[str, Any] = {
    "sequence_bias": None,
    "logit_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "prefix_allowed_tokens_fn": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "logits_processor": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Every setting, in the order in which they apply, with the value that switches it off; None and empty do so too."""

OURS = frozenset({"logit_bias", "presence_penalty", "frequency_penalty"})
"""Settings that transformers' `generate` has not."""

FUNCTIONS = frozenset({"logits_processor", "prefix_allowed_tokens_fn"})
"""Settings that are no fields of a `GenerationConfig`, and cannot be compared between ranks."""

WARPERS = frozenset({"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"})
"""Filters that the op of drawing has not. Like the other filters, they are for sampled texts alone."""

_ON_DEVICE = frozenset(
    {
        "sequence_bias",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "min_length",
        "min_new_tokens",
        "suppress_tokens",
        "begin_suppress_tokens",
    }
)
"""Settings that the op `process_logits` can do."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether a setting asks for nothing."""
    if value is None or value is False:
        return True
    if isinstance(value, Tensor | np.ndarray):
        return not len(value) if value.ndim else value == NEUTRAL[name]
    if isinstance(value, Sequence | Mapping):
        return len(value) == 0
    return bool(value == NEUTRAL[name])


def asked_processing(settings: Mapping[str, Any], *, sampled: bool) -> dict[str, Any]:
    """What `settings` ask of logits, checked, in plain types and the order of `NEUTRAL`.

    Args:
        settings: by name; others than those of `NEUTRAL` are not looked at.
        sampled: whether texts are sampled: `WARPERS` are for these alone.

    Raises:
        SamplingError: a value that is not allowed.
    """
    asked = {name: settings[name] for name in NEUTRAL if not is_neutral(name, settings.get(name))}
    read = {name: _READERS[name](name, value) for name, value in asked.items() if sampled or name not in WARPERS}
    if "logit_bias" in read:
        bias, other = read.pop("logit_bias"), read.get("sequence_bias", {})
        if bias.keys() & other.keys():
            raise SamplingError(
                f"logit_bias and sequence_bias both name token(s) {sorted(bias.keys() & other.keys())}."
            )
        read = {"sequence_bias": {**other, **bias}, **{name: read[name] for name in read if name != "sequence_bias"}}
    return read


@dataclass(frozen=True)
class Context:
    """What settings refer to.

    Attributes:
        vocabulary: tokens.
        device: where logits are.
        prompt: the request's.
        max_new_tokens: of its text.
        stop_tokens: that end it.
        prompt_index: of its prompt among those of the call.
        padding: of its prompt in a padded batch, where transformers counts lengths from the batch's width.
    """

    vocabulary: int
    device: torch.device
    prompt: list[int]
    max_new_tokens: int
    stop_tokens: frozenset[int]
    prompt_index: int = 0
    padding: int = 0

    def stops(self) -> Tensor:
        """The stop tokens, int64 [n]."""
        return self._tokens(sorted(self.stop_tokens))

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(list(tokens), dtype=torch.int64, device=self.device)

    def ids(self) -> Tensor:
        """The prompt, int64 [1, L]."""
        return self._tokens(self.prompt)[None]


def place_processing(
    asked: Mapping[str, Any], params: DrawParams, context: Context, *, keep: bool = False
) -> tuple[Processing | None, RowProcessors | None, DrawParams]:
    """What is done to a request's logits on the device, or by functions, and how its tokens are then drawn.

    Args:
        asked: of `asked_processing`.
        params: temperature and filters.
        context: the request.
        keep: whether logits and scores are to be kept, for which rows go through functions.

    Raises:
        SamplingError: a token outside of the vocabulary.
    """
    named = {
        "logit_bias or sequence_bias": asked.get("sequence_bias", ()),
        "bad_words_ids": asked.get("bad_words_ids", ()),
        "forced_bos_token_id": [[asked.get("forced_bos_token_id", 0)]],
        "forced_eos_token_id": [asked.get("forced_eos_token_id", [])],
    }
    for called, sequences in named.items():
        outside = {token for sequence in sequences for token in sequence if token >= context.vocabulary}
        if outside:
            raise SamplingError(
                f"{called} has token(s) {sorted(outside)}, the vocabulary ends at {context.vocabulary}."
            )
    if not keep and asked.keys() <= _ON_DEVICE:
        processing = _on_device(asked, context)
        if processing is not None and processing.fits:
            return (processing if asked else None), None, params
    warps = bool(asked.keys() & WARPERS)
    warpers = _warpers(asked, params)
    processors = (*_processors(asked, context), *(warpers if warps else ()))
    functions = RowProcessors(processors, () if warps else warpers, keep, by_caller=bool(asked.keys() & FUNCTIONS))
    # What has been through all filters is drawn from as it is.
    drawn = DrawParams(temperature=1.0, seed=params.seed) if warps else params
    return None, functions, drawn


def _on_device(asked: Mapping[str, Any], context: Context) -> Processing | None:
    own = len(context.prompt)
    rules = [
        Rule(sequence[-1], value, len(sequence) - 1, prefix=sequence[:-1])
        for sequence, value in asked.get("sequence_bias", {}).items()
    ]
    if any(rule.prefix and rule.value > -math.inf for rule in rules):
        return None  # several may hold at once for one token, and their sum would depend on its order
    words = _bad_words(asked.get("bad_words_ids", ()), context)
    rules += [Rule(word[-1], -math.inf, len(word) - 1, prefix=word[:-1]) for word in words]
    until = max(asked.get("min_length", 0) - context.padding, own + asked.get("min_new_tokens", 0))
    if until > own:
        rules += [Rule(stop, -math.inf, until=until) for stop in sorted(context.stop_tokens)]
    rules += [Rule(token, -math.inf) for token in asked.get("suppress_tokens", ())]
    rules += [Rule(token, -math.inf, own, own + 1) for token in asked.get("begin_suppress_tokens", ())]
    return Processing(
        asked.get("repetition_penalty", 1.0),
        asked.get("presence_penalty", 0.0),
        asked.get("frequency_penalty", 0.0),
        asked.get("no_repeat_ngram_size", 0),
        own,
        tuple(dict.fromkeys(rule for rule in rules if rule.token < context.vocabulary)),
    )


def _bad_words(words: Sequence[tuple[int, ...]], context: Context) -> list[tuple[int, ...]]:
    """Without those that are a stop token, as in transformers."""
    return [word for word in words if len(word) > 1 or word[0] not in context.stop_tokens]


def _processors(asked: Mapping[str, Any], context: Context) -> list[Processor]:
    """transformers' own processors of what is asked, in the order of its `generate`, and the caller's."""
    makers: Mapping[str, Callable[[Any], Processor | None]] = {
        "sequence_bias": theirs.SequenceBiasLogitsProcessor,
        "encoder_repetition_penalty": lambda value: theirs.EncoderRepetitionPenaltyLogitsProcessor(
            value, context.ids()
        ),
        "repetition_penalty": theirs.RepetitionPenaltyLogitsProcessor,
        "frequency_penalty": lambda value: OccurrencePenalty(len(context.prompt), frequency=value),
        "presence_penalty": lambda value: OccurrencePenalty(len(context.prompt), presence=value),
        "no_repeat_ngram_size": theirs.NoRepeatNGramLogitsProcessor,
        "encoder_no_repeat_ngram_size": lambda size: theirs.EncoderNoRepeatNGramLogitsProcessor(size, context.ids()),
        "bad_words_ids": lambda words: _forbidding([list(word) for word in _bad_words(words, context)]),
        "min_length": lambda length: _unless_endless(
            context, lambda: theirs.MinLengthLogitsProcessor(max(length - context.padding, 0), context.stops())
        ),
        "min_new_tokens": lambda count: _unless_endless(
            context,
            lambda: theirs.MinNewTokensLengthLogitsProcessor(len(context.prompt), count, context.stops()),
        ),
        "prefix_allowed_tokens_fn": lambda allowed: theirs.PrefixConstrainedLogitsProcessor(
            lambda _, ids: allowed(context.prompt_index, ids), 1
        ),
        "forced_bos_token_id": lambda token: None if context.padding else theirs.ForcedBOSTokenLogitsProcessor(token),
        "forced_eos_token_id": lambda tokens: theirs.ForcedEOSTokenLogitsProcessor(
            len(context.prompt) + context.max_new_tokens, tokens, device=context.device
        ),
        "remove_invalid_values": lambda _: theirs.InfNanRemoveLogitsProcessor(),
        "exponential_decay_length_penalty": lambda decay: _unless_endless(
            context, lambda: theirs.ExponentialDecayLengthPenalty(decay, context.stops(), len(context.prompt))
        ),
        "suppress_tokens": lambda tokens: theirs.SuppressTokensLogitsProcessor(tokens, device=context.device),
        "begin_suppress_tokens": lambda tokens: theirs.SuppressTokensAtBeginLogitsProcessor(
            tokens, _begin(asked, context), device=context.device
        ),
    }
    made = [makers[name](value) for name, value in asked.items() if name in makers]
    return _merged([one for one in made if one is not None], asked.get("logits_processor", ()))


def _begin(asked: Mapping[str, Any], context: Context) -> int:
    """Tokens in front of the first that is free: a forced one does not count."""
    own = len(context.prompt)
    return own + 1 if own + context.padding == 1 and "forced_bos_token_id" in asked else own


def _forbidding(words: list[list[int]]) -> Processor | None:
    return theirs.NoBadWordsLogitsProcessor(words) if words else None


def _unless_endless(context: Context, make: Callable[[], Processor]) -> Processor | None:
    return make() if context.stop_tokens else None


def _merged(made: Sequence[Processor], own: Sequence[Processor]) -> list[Processor]:
    """As in transformers: one of the caller's takes the place of one of the same class, the others come behind."""
    merged = [next((one for one in own if type(one) is type(default)), default) for default in made]
    for one in own:
        if not any(one is other for other in merged):
            merged.append(one)
    return merged


def _warpers(asked: Mapping[str, Any], params: DrawParams) -> tuple[Processor, ...]:
    """Temperature and filters of sampled texts, in transformers' order."""
    if params.temperature == 0:
        return ()
    wanted: list[tuple[bool, Callable[[], Processor]]] = [
        (params.temperature != 1, lambda: theirs.TemperatureLogitsWarper(float(params.temperature))),
        ("top_h" in asked, lambda: theirs.TopHLogitsWarper(asked["top_h"])),
        (params.top_k > 0, lambda: theirs.TopKLogitsWarper(int(params.top_k))),
        (params.top_p < 1, lambda: theirs.TopPLogitsWarper(float(params.top_p))),
        (params.min_p > 0, lambda: theirs.MinPLogitsWarper(float(params.min_p))),
        ("typical_p" in asked, lambda: theirs.TypicalLogitsWarper(asked["typical_p"])),
        ("epsilon_cutoff" in asked, lambda: theirs.EpsilonLogitsWarper(asked["epsilon_cutoff"])),
        ("eta_cutoff" in asked, lambda: theirs.EtaLogitsWarper(asked["eta_cutoff"])),
    ]
    return tuple(make() for is_wanted, make in wanted if is_wanted)


@dataclass(frozen=True)
class OccurrencePenalty:
    """OpenAI's presence and frequency penalties: tokens of the text count, those of the prompt do not."""

    prompt: int
    presence: float = 0.0
    frequency: float = 0.0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V]."""
        count = torch.bincount(ids[0, self.prompt :], minlength=scores.shape[1])[None]
        return scores - self.frequency * count - self.presence * (count > 0)


# Readers: (name, value) -> the value in plain types.


def _number(low: float, high: float, text: str, *, inside: bool = False) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real or not (low < value < high if inside else low <= value <= high):
            raise SamplingError(f"{name} must be {text}; got {value!r}.")
        return float(value)

    return read


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**31:
        raise SamplingError(f"{name} must be an integer of at least 0; got {value!r}.")
    return int(value)


def _token(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**31:
        raise SamplingError(f"{name} must hold token ids of at least 0; got {value!r:.80}.")
    return int(value)


def _token_list(name: str, value: Any) -> list[int]:
    if isinstance(value, Tensor | np.ndarray):
        value = value.flatten().tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise SamplingError(f"{name} must be a sequence of token ids; got {value!r:.80}.")
    return [_token(name, token) for token in value]


def _one_or_more(name: str, value: Any) -> list[int]:
    return [_token(name, value)] if isinstance(value, Integral) else _token_list(name, value)


def _words(name: str, value: Any) -> list[tuple[int, ...]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(one, Sequence) for one in value):
        raise SamplingError(f"{name} must be a sequence of sequences of token ids; got {value!r:.80}.")
    words = [tuple(_token_list(name, word)) for word in value]
    if not all(words):
        raise SamplingError(f"{name} must hold no empty sequence; got {value!r:.80}.")
    return words


def _sequence_bias(name: str, value: Any) -> dict[tuple[int, ...], float]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        raise SamplingError(f"{name} must map sequences of token ids to floats, or list such pairs; got {value!r:.80}.")
    words = _words(name, [sequence for sequence, _ in pairs])
    return {word: _bias(name, bias) for word, (_, bias) in zip(words, pairs, strict=True)}


def _logit_bias(name: str, value: Any) -> dict[tuple[int, ...], float]:
    if not isinstance(value, Mapping):
        raise SamplingError(f"{name} must map token ids to floats; got {value!r:.80}.")
    return {(_token(name, token),): _bias(name, bias) for token, bias in value.items()}


def _bias(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not value < math.inf:  # NaN passes no comparison
        raise SamplingError(f"{name} must have finite numbers, or -inf; got {value!r}.")
    return float(value)


def _decay(name: str, value: Any) -> tuple[int, float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise SamplingError(f"{name} must be (first new token, factor); got {value!r:.80}.")
    return _count(name, value[0]), _POSITIVE(name, value[1])


def _function(name: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise SamplingError(f"{name} must be a function of (prompt's number, ids); got {type(value).__name__}.")
    return value


def _functions(name: str, value: Any) -> tuple[Processor, ...]:
    several = [value] if callable(value) and not isinstance(value, Sequence) else value
    if not isinstance(several, Sequence) or not all(callable(one) for one in several):
        raise SamplingError(
            f"{name} must be a LogitsProcessorList, or a sequence of functions of (ids, scores); got {value!r:.80}."
        )
    return tuple(several)


def _true(name: str, value: Any) -> bool:
    if value is not True:
        raise SamplingError(f"{name} must be True or False; got {value!r}.")
    return True


_POSITIVE = _number(0, math.inf, "a number above 0", inside=True)
_FINITE = _number(-math.inf, math.inf, "a finite number", inside=True)
_SHARE = _number(0, 1, "a number in (0, 1)", inside=True)

_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "sequence_bias": _sequence_bias,
    "logit_bias": _logit_bias,
    "encoder_repetition_penalty": _POSITIVE,
    "repetition_penalty": _POSITIVE,
    "frequency_penalty": _FINITE,
    "presence_penalty": _FINITE,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "bad_words_ids": _words,
    "min_length": _count,
    "min_new_tokens": _count,
    "prefix_allowed_tokens_fn": _function,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _one_or_more,
    "remove_invalid_values": _true,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _token_list,
    "begin_suppress_tokens": _token_list,
    "logits_processor": _functions,
    "top_h": _number(1e-9, 1, "a number in (0, 1]"),
    "typical_p": _SHARE,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
}
