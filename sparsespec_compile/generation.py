"""HuggingFace's generation arguments, read as HuggingFace reads them, or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.runtime.noise import derive_seed
from sparsespec_compile.runtime.sampling import SamplingParams

# Values that `model.generate` falls back to when neither the call nor the model says anything.
_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
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
        pad_token: fills the output behind a text; None when no text can end early and no padding is needed.
    """

    max_new_tokens: int
    params: list[SamplingParams]
    stop_tokens: frozenset[int]
    pad_token: int | None


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
    stop_tokens = _token_ids(settings.get("eos_token_id"))
    pad_token = settings.get("pad_token_id")
    if pad_token is None and stop_tokens:
        pad_token = stop_tokens[0]
    seeds = _seeds(seed, batch, needed=bool(settings["do_sample"]))
    columns = {name: _per_request(name, settings[name], batch) for name in _PER_REQUEST}
    params = [_params(settings["do_sample"], {n: columns[n][i] for n in _PER_REQUEST}, seeds[i]) for i in range(batch)]
    return Generation(_new_tokens(settings, prompt_width), params, frozenset(stop_tokens), pad_token)


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
    settings = dict(_DEFAULTS)
    for source in (model_config, call_config):
        if source is not None:
            settings |= {name: value for name, value in source.to_dict().items() if value is not None}
    return settings | {name: value for name, value in arguments.items() if value is not None}


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name in _READ or name in _NO_EFFECT or value is None or value is False:
            continue
        neutral = _NEUTRAL.get(name)
        if neutral is None or value != neutral:
            off = f"{name}={neutral}" if neutral is not None else f"{name}=None in the generation_config"
            raise SamplingError(
                f"{name}={value!r} is not supported: it would change the text, and it is never ignored. Set {off}, or "
                "use the HuggingFace model's own generate."
            )


def _new_tokens(settings: Mapping[str, Any], prompt_width: int) -> int:
    value = settings.get("max_new_tokens")
    if value is None:
        length = settings.get("max_length")
        value = _DEFAULT_NEW_TOKENS if length is None else length - prompt_width
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SamplingError(
            f"max_new_tokens must be an integer of at least 1, got {value!r}. Without it, max_length (prompt included) "
            f"minus the {prompt_width} columns of input_ids is used."
        )
    return value


def _params(do_sample: bool, values: dict[str, Any], seed: int) -> SamplingParams:
    if not do_sample:
        return SamplingParams()
    if values["temperature"] == 0:
        raise SamplingError("temperature must be above 0 when do_sample=True, got 0. Use do_sample=False for greedy.")
    return SamplingParams(**values, seed=seed)


def _per_request(name: str, value: Any, batch: int) -> list[Any]:
    if isinstance(value, torch.Tensor):
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
    own = seed.tolist() if isinstance(seed, torch.Tensor) else seed
    if isinstance(own, Sequence) and not isinstance(own, str):
        return _per_request("seed", own, batch)
    base = SamplingParams(seed=own).seed  # checks its range
    return [derive_seed(base, index) for index in range(batch)]


def _token_ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return list(value) if isinstance(value, Sequence) else [int(value)]
