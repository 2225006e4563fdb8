"""HuggingFace's generation arguments, read as HuggingFace reads them, or refused by name.

One rule holds for every way in: what `model.generate` would apply is applied or refused, never ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from sparsespec_compile.errors import ContextLengthError, SamplingError
from sparsespec_compile.requests.processors import NEUTRAL, OURS, asked_processing
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.runtime.device.sampling import DrawParams, derive_seed

# Values that `model.generate` falls back to when neither the call nor the model says anything.
_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_OFF: Mapping[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_DEFAULT_NEW_TOKENS = 20

_PER_PROMPT = ("temperature", "top_k", "top_p", "min_p")
_RETURNED = frozenset({"return_dict_in_generate", "output_scores", "output_logits"})
"""Fields that say what `generate` returns. As in HuggingFace, the others do nothing without the first."""

_READ = frozenset(
    {
        "max_length",
        "max_new_tokens",
        "do_sample",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "stop_strings",
        "num_return_sequences",
        *_PER_PROMPT,
        *(NEUTRAL.keys() - OURS),
        *_RETURNED,
    }
)

# Fields that cannot change the tokens of a decoder-only model's greedy or sampled text.
_NO_EFFECT = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "decoder_start_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "prefill_chunk_size",
        "low_memory",
        "early_stopping",
        "length_penalty",
        "renormalize_logits",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "assistant_ensemble_weight",
        "target_lookbehind",
        "max_matching_ngram_size",
        "trust_remote_code",
    }
)

# Fields that would change the text: allowed only with the value that switches them off.
_NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
}

_STOPS = (
    "End texts with eos_token_id, max_new_tokens or stop_strings (with tokenizer=), or read them with stream(), which "
    "can cancel() each."
)
_SPECULATION = "This model speculates by itself, as its SpecConfig says."
_FORWARD = "Call the HuggingFace model on the finished text for them."

# Arguments of `generate` that are not fields of `GenerationConfig`, and what to use instead. With a value that asks for
# nothing (None, False, an empty list) each is accepted, so that callers may pass HuggingFace's whole list.
_CALLS: Mapping[str, str] = {
    "stopping_criteria": _STOPS,
    "synced_gpus": "Each process decodes its own requests: gather the parameters first, then pass False.",
    "assistant_model": _SPECULATION,
    "assistant_tokenizer": _SPECULATION,
    "negative_prompt_ids": "Guidance needs the HuggingFace model's own generate.",
    "negative_prompt_attention_mask": "Guidance needs the HuggingFace model's own generate.",
    "custom_generate": "Pass the HuggingFace model to the custom function.",
    "inputs_embeds": "Prompts are token ids: input_ids.",
    "position_ids": "Positions follow from attention_mask.",
    "token_type_ids": "Leave them out: tokenizer(..., return_token_type_ids=False).",
    "cache": "The KV cache is kept here.",
    "past_key_values": "The KV cache is kept here.",
    "cache_params": "The KV cache is kept here.",
}

_INSTEAD: Mapping[str, str] = {
    "watermarking_config": "A watermark that is a function of (ids, scores) can be passed as logits_processor.",
    "output_attentions": _FORWARD,
    "output_hidden_states": _FORWARD,
    "max_time": "Read stream() for as long as there is time, then close() it.",
    "prompt_lookup_num_tokens": _SPECULATION,
    "speculation_type": _SPECULATION,
    "use_mtp": _SPECULATION,
}


@dataclass(frozen=True)
class Returned:
    """What `generate` returns beside token ids: the model's own logits, and the scores after everything."""

    logits: bool
    scores: bool


@dataclass(frozen=True)
class Generation:
    """The settings of one `generate` call, resolved.

    Attributes:
        max_new_tokens: new tokens of each request at most.
        texts: texts of each prompt (`num_return_sequences`).
        params: one for each text, those of a prompt beside each other.
        processing: what is done to logits, of `asked_processing`.
        output: `Returned`, where more than token ids is returned.
        stop_tokens: ids that end a text; may be empty.
        stop_strings: strings that end a text; may be empty.
        pad_token: fills the output behind a text: the padding token, or else a stop token; None when there is neither.
        prompt_padding: what stands for padding in prompts without a mask: the padding token, unless it also ends texts.
    """

    max_new_tokens: int
    texts: int
    params: list[DrawParams]
    processing: dict[str, Any]
    output: Returned | None
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    pad_token: int | None
    prompt_padding: int | None


def merge_settings(
    model_config: GenerationConfig | None, call_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The sources of settings as one: `arguments` over `call_config` over the model's own over HuggingFace's defaults.

    Args:
        model_config: the model's `generation_config`.
        call_config: the one given to the call.
        arguments: the call's keyword arguments. Those that are not `GenerationConfig` fields are checked and dropped.

    Raises:
        SamplingError: an argument is unknown, or asks for what is not supported.
    """
    known = _READ | _NO_EFFECT | _NEUTRAL.keys() | GenerationConfig().to_dict().keys()
    unknown = sorted(arguments.keys() - known - _CALLS.keys())
    if unknown:
        raise SamplingError(
            f"generate got unknown argument(s) {', '.join(unknown)}. It takes input_ids, attention_mask, "
            f"generation_config, seed, streamer, tokenizer, and from GenerationConfig {', '.join(sorted(_READ))}."
        )
    if call_config is not None and not isinstance(call_config, GenerationConfig):
        raise SamplingError(f"generation_config must be a GenerationConfig, got {type(call_config).__name__}.")
    for name in sorted(arguments.keys() & _CALLS.keys()):
        if not _asks_nothing(arguments[name]):
            raise _unsupported(name, arguments[name], None, _CALLS[name])
    settings = dict(_DEFAULTS)
    for source in (model_config, call_config):
        if source is not None:
            settings |= {name: value for name, value in source.to_dict().items() if value is not None}
    # A None in the arguments switches off what the configs say, as in HuggingFace.
    settings |= {name: value for name, value in arguments.items() if name not in _CALLS}
    settings |= {name: _OFF[name] for name in _OFF if settings[name] is None}
    refuse_unsupported(settings, "the HuggingFace model's own generate")
    if not isinstance(settings["do_sample"], bool):
        raise SamplingError(f"do_sample must be True or False, got {settings['do_sample']!r}.")
    return settings


def require_supported(model_config: GenerationConfig | None) -> None:
    """Refuse what the model's `generation_config` asks of every text and no request here can have.

    Raises:
        SamplingError: a field that would change the text, such as repetition_penalty.
    """
    settings = {} if model_config is None else model_config.to_dict()
    otherwise = "the HuggingFace model's own generate; set it if texts without this are wanted"
    refuse_unsupported(settings, otherwise, "model.generation_config.")


def resolve_generation(
    settings: Mapping[str, Any],
    *,
    batch: int,
    prompt_width: int,
    positions: int | None,
    seed: int | Sequence[int] | None,
) -> Generation:
    """What `settings` of `merge_settings` mean for a batch of prompts.

    Args:
        settings: temperature, top_k, top_p and min_p may be sequences with a value for each prompt.
        batch: number of prompts.
        prompt_width: columns of `input_ids`, padding included; `max_length` counts from there, as in HuggingFace.
        positions: the model's nominal positions, which end a text when nothing says how long it may be.
        seed: one for the batch, from which each text's own is derived; a sequence with each text's own; or None for one
            drawn from torch's global generator.

    Raises:
        SamplingError: a setting has a value that is not allowed.
        ContextLengthError: no length is given, and the prompts fill the model's positions.
    """
    sampled = settings["do_sample"]
    stop_tokens = token_ids("eos_token_id", settings.get("eos_token_id"))
    pad_tokens = token_ids("pad_token_id", settings.get("pad_token_id"))
    if len(pad_tokens) > 1:
        raise SamplingError(f"pad_token_id must be one token, got {pad_tokens}.")
    texts = _texts(settings)
    columns = {name: _each(name, settings[name], batch, "prompts") for name in _PER_PROMPT}
    if sampled and any(isinstance(value, Real) and value == 0 for value in columns["temperature"]):
        raise SamplingError(
            f"temperature must be above 0 when do_sample=True, got {settings['temperature']!r}. Use do_sample=False "
            "for greedy texts; to mix both, give generate_batch SamplingParams for each prompt."
        )
    seeds = _seeds(seed, batch * texts, needed=sampled)
    params = [
        DrawParams(**{name: columns[name][nth // texts] for name in _PER_PROMPT}, seed=own) if sampled else DrawParams()
        for nth, own in enumerate(seeds)
    ]
    return Generation(
        _new_tokens(settings, prompt_width, positions),
        texts,
        params,
        asked_processing(settings, sampled=sampled),
        _returned(settings),
        frozenset(stop_tokens),
        strings("stop_strings", settings.get("stop_strings")),
        next(iter(pad_tokens + stop_tokens), None),
        next((token for token in pad_tokens if token not in stop_tokens), None),
    )


def default_sampling(
    model_config: GenerationConfig | None, prompt_length: int, positions: int | None
) -> SamplingParams:
    """How a prompt is continued that comes without `SamplingParams`: as the model's `generation_config` says.

    Sampling, length and number of texts are read as `generate` reads them, with one difference: where no length is
    said, it is that of `SamplingParams`, within the model's nominal positions, instead of HuggingFace's 20 new tokens.

    Raises:
        SamplingError: a field has a value that is not allowed or not supported.
        ContextLengthError: no length is given, and the prompt fills the model's positions.
    """
    settings = merge_settings(model_config, None, {})
    new_tokens = _new_tokens(settings, prompt_length, positions, SamplingParams().max_new_tokens)
    return SamplingParams(max_new_tokens=new_tokens, n=_texts(settings), **plain_sampling(settings))


def plain_sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `settings` of `merge_settings` say of drawing and of logits, as arguments of `SamplingParams`."""
    sampled = settings["do_sample"]
    draw = {name: settings[name] for name in _PER_PROMPT} if sampled else {}
    return draw | asked_processing(settings, sampled=sampled)


def token_ids(name: str, value: Any) -> list[int]:
    """The token ids that a setting of HuggingFace's names: None, one or several."""
    if value is None:
        return []
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.flatten().tolist()
    ids = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    if not all(isinstance(token, int | np.integer) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise SamplingError(f"{name} must be a token id of at least 0, or several, got {value!r}.")
    return [int(token) for token in ids]


def strings(name: str, value: Any) -> tuple[str, ...]:
    """The strings that a setting of HuggingFace's names: None, one or several."""
    if value is None:
        return ()
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, Sequence) or not all(isinstance(one, str) and one for one in several):
        raise SamplingError(f"{name} must be a non-empty string or a sequence of them, got {value!r}.")
    return tuple(several)


def _asks_nothing(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    return value is None or value is False or (hasattr(value, "__len__") and len(value) == 0)


def refuse_unsupported(settings: Mapping[str, Any], otherwise: str, where: str = "") -> None:
    """Refuse settings that would change the text and are not supported.

    Args:
        settings: fields of a `GenerationConfig`, by name.
        otherwise: what else has them.
        where: stands before a field's name in the error, such as "model.generation_config.".

    Raises:
        SamplingError: the first such field.
    """
    for name, value in settings.items():
        # An empty watermarking_config asks for a watermark with the default settings.
        asks = value is not None if name == "watermarking_config" else not _asks_nothing(value)
        if name in _READ or name in _NO_EFFECT or not asks:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None or isinstance(value, torch.Tensor) or value != neutral:
            raise _unsupported(where + name, value, neutral, _INSTEAD.get(name, ""), otherwise)
    if settings.get("cache_implementation") == "quantized":
        raise SamplingError(
            f"{where}cache_implementation='quantized' would change the text and is not supported. Pass None."
        )


def _unsupported(name: str, value: Any, neutral: Any, instead: str, otherwise: str = "") -> SamplingError:
    allowed = f"Allowed: {name}={neutral!r}" + (f", or {otherwise}." if otherwise else ".")
    got = f"tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.200}"
    text = f"{name}={got} is not supported, and nothing that is asked for is ignored. {allowed}"
    return SamplingError(f"{text} {instead}".rstrip())


def _new_tokens(
    settings: Mapping[str, Any], prompt_width: int, positions: int | None, default: int = _DEFAULT_NEW_TOKENS
) -> int:
    new_tokens, length = settings.get("max_new_tokens"), settings.get("max_length")
    if new_tokens is None and length is None:
        room = default if positions is None else positions - prompt_width
        if room < 1:
            raise ContextLengthError(
                f"Prompts of {prompt_width} tokens fill the {positions} positions of the model, and no length is "
                "given. Pass max_new_tokens, or shorten the prompts."
            )
        return min(default, room)
    name, value, least = (
        ("max_length", length, prompt_width + 1) if new_tokens is None else ("max_new_tokens", new_tokens, 1)
    )
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SamplingError(f"{name} must be an integer of at least {least} here, got {value!r}.")
    return int(value) - least + 1


def _returned(settings: Mapping[str, Any]) -> Returned | None:
    if not settings.get("return_dict_in_generate"):
        return None
    return Returned(bool(settings.get("output_logits")), bool(settings.get("output_scores")))


def _texts(settings: Mapping[str, Any]) -> int:
    value: Any = settings.get("num_return_sequences")
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise SamplingError(f"num_return_sequences must be an integer of at least 1, got {value!r}.")
    if value > 1 and not settings["do_sample"]:
        raise SamplingError(
            f"num_return_sequences={value} needs do_sample=True, since greedy texts of a prompt are equal. Pass "
            "do_sample=True, or num_return_sequences=1."
        )
    return int(value)


def _each(name: str, value: Any, count: int, of: str) -> list[Any]:
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise SamplingError(f"{name} has {len(value)} values for {count} {of}: give one for each, or a single one.")
    return list(value)


def _seeds(seed: Any, texts: int, *, needed: bool) -> list[int]:
    if seed is None:
        if not needed:
            return [0] * texts
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    own = seed.tolist() if isinstance(seed, torch.Tensor | np.ndarray) else seed
    if isinstance(own, Sequence) and not isinstance(own, str):
        return _each("seed", own, texts, "texts")
    base = DrawParams(seed=own).seed  # checks its range
    return [derive_seed(int(base), index) for index in range(texts)]
