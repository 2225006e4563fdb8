"""HuggingFace's generation arguments, read as HuggingFace reads them, or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.runtime.sampling import DrawParams, derive_seed

# Values that `model.generate` falls back to when neither the call nor the model says anything.
_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_OFF: Mapping[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_DEFAULT_NEW_TOKENS = 20

_PER_REQUEST = ("temperature", "top_k", "top_p", "min_p")
_READ = frozenset({"max_length", "max_new_tokens", "do_sample", "eos_token_id", "pad_token_id", *_PER_REQUEST})

# Fields that cannot change the tokens of a decoder-only model's single greedy or sampled text.
_NO_EFFECT = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "bos_token_id",
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
    }
)

# Fields that would change the text: allowed only with the value that switches them off.
_NEUTRAL: Mapping[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True)
class Generation:
    """The settings of one `generate` call, resolved.

    Attributes:
        max_new_tokens: new tokens of each request at most.
        params: one for each request.
        stop_tokens: ids that end a text; may be empty.
        pad_token: fills the output behind a text: the padding token, or else a stop token; None when there is neither.
        prompt_padding: what stands for padding in prompts without a mask: the padding token, unless it also ends texts.
    """

    max_new_tokens: int
    params: list[DrawParams]
    stop_tokens: frozenset[int]
    pad_token: int | None
    prompt_padding: int | None


def resolve_generation(
    model_config: GenerationConfig | None,
    call_config: GenerationConfig | None,
    arguments: Mapping[str, Any],
    *,
    batch: int,
    prompt_width: int,
    seed: int | Sequence[int] | None,
) -> Generation:
    """Merge the sources of settings: `arguments` over `call_config` over the model's own over HuggingFace's defaults.

    Args:
        model_config: the model's `generation_config`.
        call_config: the one given to the call.
        arguments: the call's keyword arguments, named as in `GenerationConfig`. temperature, top_k, top_p and min_p
            may be sequences with a value for each request.
        batch: number of requests.
        prompt_width: columns of `input_ids`, padding included; `max_length` counts from there, as in HuggingFace.
        seed: one for the batch, from which each request's own is derived; a sequence with each request's own; or None
            for one drawn from torch's global generator.

    Raises:
        SamplingError: an argument is unknown, not supported, or has a value that is not allowed.
    """
    settings = _merge(model_config, call_config, arguments)
    _refuse_unsupported(settings)
    if not isinstance(settings["do_sample"], bool):
        raise SamplingError(f"do_sample must be True or False, got {settings['do_sample']!r}.")
    stop_tokens = token_ids("eos_token_id", settings.get("eos_token_id"))
    pad_tokens = token_ids("pad_token_id", settings.get("pad_token_id"))
    if len(pad_tokens) > 1:
        raise SamplingError(f"pad_token_id must be one token, got {pad_tokens}.")
    seeds = _seeds(seed, batch, needed=settings["do_sample"])
    if settings["do_sample"] and isinstance(settings["temperature"], Real) and settings["temperature"] == 0:
        raise SamplingError("temperature must be above 0 when do_sample=True, got 0. Use do_sample=False for greedy.")
    columns = {name: _per_request(name, settings[name], batch) for name in _PER_REQUEST}
    params = [_params(settings["do_sample"], {n: columns[n][i] for n in _PER_REQUEST}, seeds[i]) for i in range(batch)]
    return Generation(
        _new_tokens(settings, prompt_width),
        params,
        frozenset(stop_tokens),
        next(iter(pad_tokens + stop_tokens), None),
        next((token for token in pad_tokens if token not in stop_tokens), None),
    )


def _merge(
    model_config: GenerationConfig | None, call_config: GenerationConfig | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    known = _READ | _NO_EFFECT | _NEUTRAL.keys() | GenerationConfig().to_dict().keys()
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise SamplingError(
            f"generate got unknown argument(s) {', '.join(unknown)}. It takes input_ids, attention_mask, "
            f"generation_config, seed, streamer, and from GenerationConfig {', '.join(sorted(_READ))}."
        )
    if call_config is not None and not isinstance(call_config, GenerationConfig):
        raise SamplingError(f"generation_config must be a GenerationConfig, got {type(call_config).__name__}.")
    settings = dict(_DEFAULTS)
    for source in (model_config, call_config):
        if source is not None:
            settings |= {name: value for name, value in source.to_dict().items() if value is not None}
    settings |= arguments  # a None switches off what the configs say, as in HuggingFace
    return settings | {name: _OFF[name] for name in _OFF if settings[name] is None}


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name in _READ or name in _NO_EFFECT or value is None or value is False:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None or isinstance(value, torch.Tensor) or value != neutral:
            raise SamplingError(
                f"{name}={value!r} is not supported, and nothing that is asked for is ignored. Pass "
                f"{name}={neutral!r}, or use the HuggingFace model's own generate."
            )
    if settings.get("cache_implementation") == "quantized":
        raise SamplingError("cache_implementation='quantized' would change the text and is not supported. Pass None.")


def _new_tokens(settings: Mapping[str, Any], prompt_width: int) -> int:
    new_tokens, length = settings.get("max_new_tokens"), settings.get("max_length")
    if new_tokens is None and length is None:
        return _DEFAULT_NEW_TOKENS
    name, value, least = (
        ("max_length", length, prompt_width + 1) if new_tokens is None else ("max_new_tokens", new_tokens, 1)
    )
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SamplingError(f"{name} must be an integer of at least {least} here, got {value!r}.")
    return int(value) - least + 1


def _params(do_sample: bool, values: dict[str, Any], seed: int) -> DrawParams:
    if not do_sample:
        return DrawParams()
    return DrawParams(**values, seed=seed)


def _per_request(name: str, value: Any, batch: int) -> list[Any]:
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * batch
    if len(value) != batch:
        raise SamplingError(f"{name} has {len(value)} values for {batch} requests: give one for each, or a single one.")
    return list(value)


def _seeds(seed: Any, batch: int, *, needed: bool) -> list[int]:
    if seed is None:
        if not needed:
            return [0] * batch
        seed = int(torch.randint(2**63 - 1, ()))
    own = seed.tolist() if isinstance(seed, torch.Tensor | np.ndarray) else seed
    if isinstance(own, Sequence) and not isinstance(own, str):
        return _per_request("seed", own, batch)
    base = DrawParams(seed=own).seed  # checks its range
    return [derive_seed(int(base), index) for index in range(batch)]


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
