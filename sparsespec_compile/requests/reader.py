"""Prompts and settings, as a caller gives them, read into requests or refused."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from sparsespec_compile.errors import ContextLengthError, ContextLengthWarning, PromptError, SamplingError
from sparsespec_compile.requests.generation_config import (
    Generation,
    Returned,
    default_sampling,
    merge_settings,
    require_supported,
    resolve_generation,
    strings,
    token_ids,
)
from sparsespec_compile.requests.processors import Context, place_processing
from sparsespec_compile.requests.prompts import Prompt, shape_of, token_list, unpad
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.requests.stop_strings import Decoder, StopStrings
from sparsespec_compile.runtime.device.sampling import DrawParams, derive_seed
from sparsespec_compile.runtime.host.request import Request

Sampling = SamplingParams | Sequence[SamplingParams | None] | None
"""How prompts are continued: all alike, or each in its own way; None = as the model's `generation_config` says."""


@dataclass(frozen=True)
class PaddedBatch:
    """A left-padded batch, read.

    Attributes:
        input_ids: the prompts, int64 or int32 [texts, width], each as often as it has texts.
        requests: one for each row.
        pad_token: fills the output behind a text; None = there is no such token.
        output: what is returned beside token ids; None = nothing.
    """

    input_ids: Tensor
    requests: list[Request]
    pad_token: int | None
    output: Returned | None = None


@dataclass(frozen=True)
class RequestReader:
    """What a model allows.

    Attributes:
        vocabulary: tokens lie in [0, vocabulary).
        device: where the model is, and padded batches are.
        positions: the model's nominal positions (`config.max_position_embeddings`), for sizing; None = it has none.
        limit: tokens of the longest text that the model can compute, prompt included; None = not limited. Learned
            positions end there; rotary ones go on past `positions`.
        defaults: the model's `generation_config`; None = it has none.
        tokenizer: encodes texts and chats, and decodes tokens for stop strings; None = there can be none of them.
        changes: whether `limit` is where rotary frequencies change, not where learned positions end.
    """

    vocabulary: int
    device: torch.device
    positions: int | None = None
    limit: int | None = None
    defaults: GenerationConfig | None = None
    tokenizer: Decoder | None = None
    changes: bool = False

    def read(self, prompts: Sequence[Prompt], sampling: Sampling, first: int = 0) -> list[list[Request]]:
        """For each prompt of any length, a request for each of its texts.

        Args:
            first: number of the first prompt, which errors and functions of the caller's are told.

        Raises:
            PromptError: not a sequence of prompts, an empty prompt, or tokens outside of the vocabulary.
            SamplingError: settings that do not fit the prompts, stop strings without a tokenizer, or a field of the
                model's `generation_config` that is not supported.
            ContextLengthError: prompt and new tokens exceed the model's learned positions.
        """
        if isinstance(prompts, str | Tensor) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"prompts must be a sequence of prompts, got {type(prompts).__name__}. Give a list, also for a single "
                "prompt: a prompt is a text, a list of chat messages or a sequence of token ids."
            )
        require_supported(self.defaults)
        settings = _sampling_of_each(sampling, len(prompts))
        tokens = [
            token_list(index, prompt, self.vocabulary, self.tokenizer) for index, prompt in enumerate(prompts, first)
        ]
        requests = [self._texts(*one) for one in zip(count(first), tokens, settings, strict=False)]
        self.check_context([request for texts in requests for request in texts])
        return requests

    def read_padded(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        generation_config: GenerationConfig | None,
        arguments: Mapping[str, Any],
        seed: int | Sequence[int] | None,
    ) -> PaddedBatch:
        """The arguments of `generate`, which are HuggingFace's.

        Args:
            input_ids: None = one prompt that is the beginning-of-sequence token, as in HuggingFace.

        Raises:
            As `OptimizedModel.generate`.
        """
        settings = merge_settings(self.defaults, generation_config, arguments)
        if input_ids is None:
            input_ids = self._beginning(settings)
        batch, width = shape_of(input_ids)
        generation = resolve_generation(settings, batch=batch, prompt_width=width, positions=self.positions, seed=seed)
        prompts = unpad(input_ids, attention_mask, generation.prompt_padding, self.device, self.vocabulary)
        requests = [
            self._of_batch(generation, params, prompts[nth // generation.texts], nth // generation.texts, width)
            for nth, params in enumerate(generation.params)
        ]
        self.check_context(requests)
        rows = input_ids.repeat_interleave(generation.texts, dim=0)
        return PaddedBatch(rows, requests, generation.pad_token, generation.output)

    def _of_batch(
        self, generation: Generation, params: DrawParams, prompt: list[int], index: int, width: int
    ) -> Request:
        context = Context(
            self.vocabulary,
            self.device,
            prompt,
            generation.max_new_tokens,
            generation.stop_tokens,
            index,
            width - len(prompt),
        )
        keep = generation.output is not None and (generation.output.logits or generation.output.scores)
        processing, processors, params = place_processing(generation.processing, params, context, keep=keep)
        return Request(
            prompt,
            generation.max_new_tokens,
            params,
            generation.stop_tokens,
            self._stop_check("generate", generation.stop_strings, prompt),
            processing=processing,
            processors=processors,
        )

    def check_context(self, requests: Sequence[Request]) -> None:
        """`check_length` for the longest of some texts."""
        self.check_length(max((request.max_length for request in requests), default=0))

    def check_length(self, longest: int) -> None:
        """Refuse a text of `longest` tokens, prompt included, that the model cannot compute; warn where it may be poor.

        Raises:
            ContextLengthError: it is longer than the model's learned positions, or than those up to which its rotary
                frequencies stay what they are.

        Warns:
            ContextLengthWarning: it may become longer than the model's nominal positions, which are rotary.
        """
        if self.limit is not None and longest > self.limit:
            why = (
                "beyond, its rotary frequencies change with the length of the text (rope type 'longrope' or 'dynamic')"
                if self.changes
                else "it has learned none beyond"
            )
            raise ContextLengthError(
                f"Prompt and max_new_tokens need {longest} positions, the model has {self.limit}: {why}. Lower "
                "max_new_tokens or shorten the prompt."
            )
        if self.positions is not None and longest > self.positions:
            warnings.warn(
                f"Prompt and max_new_tokens may need {longest} positions, the model is made for {self.positions} "
                "(config.max_position_embeddings). Its rotary positions go on, but texts may be poor beyond. Lower "
                "max_new_tokens, or set max_position_embeddings to what its rope_parameters are meant for.",
                ContextLengthWarning,
                stacklevel=2,
            )

    def _beginning(self, settings: Mapping[str, Any]) -> Tensor:
        tokens = token_ids("bos_token_id", settings.get("bos_token_id"))
        if len(tokens) != 1:
            raise PromptError(
                f"There is no input_ids, and bos_token_id, which would be the prompt, is {settings.get('bos_token_id')}"
                ". Pass input_ids, int64 [batch, width], or one bos_token_id."
            )
        return torch.tensor([tokens], device=self.device)

    def _texts(self, index: int, prompt: list[int], params: SamplingParams | None) -> list[Request]:
        if params is None:
            params = default_sampling(self.defaults, len(prompt), self.positions)
        seed = params.seed
        if seed is None:  # greedy texts need none, and must leave torch's generator alone
            seed = int(torch.randint(2**63 - 1, (), device="cpu")) if params.temperature > 0 else 0
        seeds = [seed] if params.n == 1 else [derive_seed(seed, sample) for sample in range(params.n)]
        stops, stop_strings = params.stop_token_ids, params.stop_strings
        if stops is None:
            stops = token_ids("eos_token_id", self._default("eos_token_id"))
        if stop_strings is None:
            stop_strings = strings("stop_strings", self._default("stop_strings"))
        asked = params.processing()
        context = Context(self.vocabulary, self.device, prompt, params.max_new_tokens, frozenset(stops), index)
        requests = []
        for own in seeds:
            processing, processors, draw = place_processing(asked, params.draw(own), context)
            stop_check = self._stop_check(f"Prompt {index}", tuple(stop_strings))
            settings = (params.max_new_tokens, draw, context.stop_tokens, stop_check, params.logprobs)
            requests.append(Request(prompt, *settings, processing, processors))
        return requests

    def _default(self, name: str) -> Any:
        return getattr(self.defaults, name, None)

    def _stop_check(self, who: str, stop_strings: tuple[str, ...], before: Sequence[int] = ()) -> StopStrings | None:
        """One for each text, since it keeps the end of the text."""
        if not stop_strings:
            return None
        if self.tokenizer is None or not callable(getattr(self.tokenizer, "decode", None)):
            raise SamplingError(
                f"{who} has stop_strings {list(stop_strings)}, which need a tokenizer with decode(token_ids), got "
                f"{type(self.tokenizer).__name__}: pass tokenizer=."
            )
        return StopStrings(stop_strings, self.tokenizer, before)


def generate_output(sequences: Tensor, batch: PaddedBatch) -> GenerateDecoderOnlyOutput:
    """What `generate` returns with return_dict_in_generate: `sequences` of finished requests, logits and scores."""
    wanted = batch.output or Returned(logits=False, scores=False)
    new_tokens = sequences.shape[1] - batch.input_ids.shape[1]
    kept: dict[str, Any] = {
        name: tuple(_kept(batch.requests, nth, which, sequences.device) for nth in range(new_tokens))
        for which, (name, asked) in enumerate((("logits", wanted.logits), ("scores", wanted.scores)))
        if asked
    }
    kept["sequences"] = sequences
    return GenerateDecoderOnlyOutput(**kept)


def _kept(requests: Sequence[Request], nth: int, which: int, device: torch.device) -> Tensor:
    """Logits (0) or scores (1) of new token `nth`, float32 [requests, V]; zeros behind the end of a text."""
    rows = [
        request.processors.kept[len(request.prompt) + nth][which]
        if request.processors is not None and nth < len(request.output)
        else None
        for request in requests
    ]
    zeros = torch.zeros_like(next(row for row in rows if row is not None))
    return torch.stack([zeros if row is None else row for row in rows]).to(device)


def _sampling_of_each(sampling: Sampling, prompts: int) -> Sequence[SamplingParams | None]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * prompts
    if not isinstance(sampling, Sequence) or not all(
        one is None or isinstance(one, SamplingParams) for one in sampling
    ):
        raise SamplingError(
            f"sampling must be SamplingParams, a sequence with one for each prompt, or None for the model's own "
            f"generation_config, got {sampling!r:.80}."
        )
    if len(sampling) != prompts:
        raise SamplingError(
            f"sampling has {len(sampling)} entries for {prompts} prompts. Give a list with one for each, or "
            "one SamplingParams for all, not in a list."
        )
    return sampling
