"""What transformers' continuous batching is asked for, read as it reads it, or refused by name.

`generate_batch` and the manager of continuous batching read a `GenerationConfig` in another way than `generate`: the
one given replaces the model's own as a whole, and a filter that it does not name is off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError, ContextLengthError, SamplingError
from sparsespec_compile.requests.generation_config import refuse_unsupported, strings, token_ids
from sparsespec_compile.requests.processors import NEUTRAL, asked_processing, is_neutral
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.runtime.device.sampling import derive_seed

_PLAIN: Mapping[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The values with which a token is drawn from the model's own distribution."""

_APPLIED = frozenset({"return_logprobs", "seed", "max_queue_size", "per_request_processors"})
"""Fields of `ContinuousBatchingConfig` that do here what they do in transformers."""

_LIMITS: Mapping[str, str] = {"max_memory_percent": "memory_fraction", "max_requests_per_batch": "max_requests"}
"""Fields that bound what the engine may take, and the settings of `SpecConfig` that do."""

_NO_EFFECT = frozenset(
    {
        "page_size",
        "block_size",
        "num_blocks",
        "max_batch_tokens",
        "max_blocks_per_request",
        "allow_block_sharing",
        "use_async_batching",
        "use_cuda_graph",
        "q_padding_interval_size",
        "kv_padding_interval_size",
        "max_cached_graphs",
        "varlen_compile_config",
        "decode_compile_config",
        "default_compile_level",
        "use_default_compile_configs",
        "scheduler_type",
        "safety_margin",
        "auto_switch_to_flash",
        "cpu_offload_space",
        "cpu_offload_space_safety_threshold",
        "drop_unsupported_processors",
        "disable_nccl_graph_mixing",
        "cpu_group_timeout",
    }
)
"""Fields that say how transformers' own engine is built and can change no text. `SpecConfig` says it of this one."""

_NO_PLACE = frozenset(
    {"output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate"}
)
"""Fields of `GenerationConfig` for what `generate` returns beside texts. Results of continuous batching have no place
for it, in transformers neither, and callers such as lighteval set them for both."""


@dataclass(frozen=True)
class BatchSettings:
    """How the requests of one `generate_batch`, or of one manager, are continued unless they say otherwise.

    Attributes:
        draw: temperature, top_k, top_p and min_p; empty = greedy.
        texts: texts of each prompt.
        stop_tokens: ids that end a text; may be empty.
        max_new_tokens: of each text; None = not said.
        max_length: prompt and new tokens of each text, where `max_new_tokens` is not said; None = not said either.
        positions: the model's nominal positions, which end a text when nothing says how long it may be.
        logprobs: whether log-probabilities are wanted.
        seed: from which each request's own is derived; None = drawn from torch's global generator.
        processing: what is done to logits, as fields of `SamplingParams`.
    """

    draw: Mapping[str, Any]
    texts: int = 1
    stop_tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    positions: int | None = None
    logprobs: bool = False
    seed: int | None = None
    processing: Mapping[str, Any] = field(default_factory=dict)

    def sampling(
        self,
        number: int,
        prompt_length: int,
        max_new_tokens: int | None = None,
        eos_token_id: Any = None,
        draw: Mapping[str, Any] | None = None,
    ) -> SamplingParams:
        """How one request is continued.

        Args:
            number: of the request, counted from 0: what its seed is derived with.
            prompt_length: tokens of its prompt.
            max_new_tokens, eos_token_id: its own; None = as the settings say. Negative ids stand for none.
            draw: its own temperature, top_k, top_p and min_p, and what is done to logits, over that of the settings.

        Raises:
            SamplingError: a value that is not allowed, or settings of drawing for greedy texts.
            ContextLengthError: no length is said, and the prompt fills the model's positions.
        """
        given = dict(draw or {})
        unknown = sorted(given.keys() - _PLAIN.keys() - NEUTRAL.keys())
        if unknown:
            raise SamplingError(
                f"A request asks for {', '.join(unknown)}, which is not supported, and nothing that is asked for is "
                f"ignored. Of its own a request may have: max_new_tokens, eos_token_id, {', '.join(_PLAIN)}, "
                f"{', '.join(NEUTRAL)}."
            )
        own = {name: value for name, value in given.items() if name in _PLAIN}
        processing = {**self.processing, **{name: value for name, value in given.items() if name in NEUTRAL}}
        if own and not self.draw:
            raise SamplingError(
                f"A request asks for {', '.join(sorted(own))}, but its texts are greedy: set do_sample=True in the "
                "generation_config of the batch."
            )
        chosen = {name: self.draw[name] if own.get(name) is None else own[name] for name in self.draw}
        if chosen.get("temperature") == 0:
            raise SamplingError("temperature must be above 0 when do_sample=True, got 0. Use do_sample=False.")
        if self.logprobs and any(chosen.get(name, plain) != plain for name, plain in _PLAIN.items()):
            raise SamplingError(
                f"return_logprobs=True with {chosen} is not supported: transformers gives the log-probability of a "
                "token after these, this engine that under the model itself. Allowed: greedy texts, or "
                f"{dict(_PLAIN)}; SamplingParams(logprobs=True) of optimize(model) gives the model's own in any case."
            )
        if self.logprobs and not all(is_neutral(name, value) for name, value in processing.items()):
            raise SamplingError(
                f"return_logprobs=True with {', '.join(processing)} is not supported: transformers gives the "
                "log-probability of a token after these, this engine that under the model itself. "
                "SamplingParams(logprobs=True) of optimize(model) gives the model's own in any case."
            )
        stops = self.stop_tokens if eos_token_id is None else _stop_tokens(eos_token_id)
        return SamplingParams(
            max_new_tokens=self._new_tokens(prompt_length, max_new_tokens),
            stop_token_ids=stops,
            stop_strings=(),
            logprobs=self.logprobs,
            n=self.texts,
            seed=self._seed(number) if chosen else None,
            **chosen,  # none for greedy texts
            **{name: value for name, value in processing.items() if not is_neutral(name, value)},
        )

    def _seed(self, number: int) -> int:
        if self.seed is None:
            return int(torch.randint(2**63 - 1, (), device="cpu"))
        return derive_seed(self.seed, number)

    def _new_tokens(self, prompt_length: int, asked: int | None) -> int:
        if asked is not None:
            return asked
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        longest = self.positions if self.max_length is None else self.max_length
        if longest is None:
            raise SamplingError("Nothing says how long texts may be: pass max_new_tokens.")
        if longest <= prompt_length:
            raise ContextLengthError(
                f"A prompt of {prompt_length} tokens fills the {longest} that its text may have, and no other length "
                "is given. Pass max_new_tokens, or shorten the prompt."
            )
        return longest - prompt_length


@dataclass(frozen=True)
class EngineLimits:
    """What a `ContinuousBatchingConfig` allows the engine to take.

    Attributes:
        settings: of `SpecConfig`, by name; each an upper bound.
    """

    settings: Mapping[str, float] = field(default_factory=dict)

    def bounded(self, config: SpecConfig) -> dict[str, Any]:
        """The settings of `config` that are above the bounds, with the bounds."""
        return {name: most for name, most in self.settings.items() if getattr(config, name) > most}

    def require(self, config: SpecConfig) -> None:
        """Raises ConfigError where the engine, built with `config`, may take more."""
        for name, most in self.bounded(config).items():
            asked = next(theirs for theirs, ours in _LIMITS.items() if ours == name)
            raise ConfigError(
                f"{asked}={most} is asked for, and the model was compiled with SpecConfig({name}="
                f"{getattr(config, name)}). Call install(model, SpecConfig({name}={most})) again, or ask for no less."
            )


def read_batch_settings(
    generation_config: GenerationConfig, batching: ContinuousBatchingConfig | None, positions: int | None
) -> BatchSettings:
    """The settings that a `GenerationConfig` and a `ContinuousBatchingConfig` ask of every text.

    Args:
        generation_config: the one in force; the model's own is not looked at beside it.
        batching: None = defaults.
        positions: the model's nominal positions; None = it has none.

    Raises:
        SamplingError: a field that would change the text and is not supported, or a value that is not allowed.
    """
    if not isinstance(generation_config, GenerationConfig):
        raise SamplingError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}.")
    # Some callers, lighteval among them, set fields of ContinuousBatchingConfig on the GenerationConfig.
    without = _NO_EFFECT | _NO_PLACE
    settings = {name: value for name, value in generation_config.to_dict().items() if name not in without}
    refuse_unsupported(settings, "generate of the HuggingFace model", "generation_config.")
    stops = strings("stop_strings", settings.get("stop_strings"))
    if stops:
        raise SamplingError(
            f"stop_strings={list(stops)} needs a tokenizer, which continuous batching is not given. End texts with "
            "eos_token_id, or use optimize(model).generate_batch(..., tokenizer=tokenizer)."
        )
    draw: dict[str, Any] = {}
    if generation_config.do_sample:
        given = {name: getattr(generation_config, name, None) for name in _PLAIN}
        draw = {name: plain if given[name] is None else given[name] for name, plain in _PLAIN.items()}
    return BatchSettings(
        draw,
        generation_config.num_return_sequences or 1,
        _stop_tokens(generation_config.eos_token_id),
        generation_config.max_new_tokens,
        generation_config.max_length,
        positions,
        batching is not None and batching.return_logprobs,
        None if batching is None else getattr(batching, "seed", None),
        asked_processing(settings, sampled=bool(generation_config.do_sample)),
    )


def read_limits(batching: ContinuousBatchingConfig | None) -> EngineLimits:
    """What a `ContinuousBatchingConfig` lets the engine take.

    Raises:
        ConfigError: a field with another value than its default that is not known here.
    """
    if batching is None:
        return EngineLimits()
    if not isinstance(batching, ContinuousBatchingConfig):
        raise ConfigError(f"continuous_batching_config must be a ContinuousBatchingConfig, got {batching!r:.80}.")
    default = ContinuousBatchingConfig()
    for name in batching_fields() - _APPLIED - _LIMITS.keys() - _NO_EFFECT:
        if getattr(batching, name) != getattr(default, name):
            raise ConfigError(
                f"continuous_batching_config has {name}={getattr(batching, name)!r}, which this version does not "
                f"know, and nothing that is asked for is ignored. Allowed: {getattr(default, name)!r}."
            )
    asked = {ours: getattr(batching, theirs, None) for theirs, ours in _LIMITS.items()}
    if asked["memory_fraction"] == getattr(default, "max_memory_percent", None):
        asked["memory_fraction"] = None  # as it is where nobody has said anything
    return EngineLimits({name: value for name, value in asked.items() if value is not None})


def batching_fields() -> frozenset[str]:
    """Names of the fields of `ContinuousBatchingConfig` in the transformers that is installed."""
    return frozenset(one.name for one in fields(ContinuousBatchingConfig))


def _stop_tokens(value: Any) -> tuple[int, ...]:
    """The ids that end a text; negative ones, which transformers takes for none, left out."""
    several = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(token_ids("eos_token_id", [token for token in several if not _is_negative(token)]))


def _is_negative(token: Any) -> bool:
    return isinstance(token, int) and token < 0
