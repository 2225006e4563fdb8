"""Prompts and settings, as a caller gives them, read into requests or refused."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsespec_compile.errors import ContextLengthError, PromptError, SamplingError
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.requests.stop_strings import Decoder, StopStrings
from sparsespec_compile.runtime.request import Request
from sparsespec_compile.runtime.sampling import derive_seed

Prompt = Sequence[int] | Tensor
"""Token ids: a sequence of integers, or an int64 tensor [tokens]."""


@dataclass(frozen=True)
class RequestReader:
    """What a model allows.

    Attributes:
        vocabulary: tokens lie in [0, vocabulary).
        positions: tokens of the longest text, prompt included; None = not limited.
        stop_tokens: the model's own end-of-sequence tokens.
        tokenizer: decodes tokens for stop strings; None = there can be none.
    """

    vocabulary: int
    positions: int | None
    stop_tokens: frozenset[int]
    tokenizer: Decoder | None = None

    def read(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[list[Request]]:
        """For each prompt, a request for each of its texts.

        Raises:
            PromptError: not a sequence of prompts, an empty prompt, or tokens outside of the vocabulary.
            SamplingError: settings that do not fit the prompts, or stop strings without a tokenizer.
            ContextLengthError: prompt and new tokens exceed the model's positions.
        """
        if isinstance(prompts, str | Tensor) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"prompts must be a sequence of prompts, each a sequence of token ids, got {type(prompts).__name__}. "
                "Encode texts with the model's tokenizer: tokenizer(texts).input_ids."
            )
        settings = read_sampling(sampling, len(prompts))
        tokens = [self._tokens(index, prompt) for index, prompt in enumerate(prompts)]
        requests = [self._requests(*one) for one in zip(range(len(prompts)), tokens, settings, strict=True)]
        self.check_context([request for texts in requests for request in texts])
        return requests

    def check_context(self, requests: Sequence[Request]) -> None:
        """Refuse texts that are longer than the model's positions."""
        self.check_length(max((request.max_length for request in requests), default=0))

    def check_length(self, longest: int) -> None:
        """Refuse a text of `longest` tokens, prompt included, if it is longer than the model's positions."""
        if self.positions is not None and longest > self.positions:
            raise ContextLengthError(
                f"Prompt and max_new_tokens need {longest} positions, the model has {self.positions} "
                "(config.max_position_embeddings). Lower max_new_tokens or shorten the prompt."
            )

    def _tokens(self, index: int, prompt: Prompt) -> list[int]:
        tokens = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(type(t) is int for t in tokens):
            raise PromptError(
                f"Prompt {index} must be a sequence of token ids, got {prompt!r:.80}. Encode texts with the model's "
                "tokenizer: tokenizer(text).input_ids."
            )
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            raise PromptError(
                f"Prompt {index} is empty or holds tokens outside 0 to {self.vocabulary - 1}, the model's. Use its own "
                "tokenizer; for an empty prompt give its bos_token_id."
            )
        return list(tokens)

    def _requests(self, index: int, prompt: list[int], params: SamplingParams) -> list[Request]:
        check = None
        if params.stop_strings:
            if self.tokenizer is None or not callable(getattr(self.tokenizer, "decode", None)):
                raise SamplingError(
                    f"Prompt {index} has stop_strings {list(params.stop_strings)}, which need a tokenizer with decode, "
                    f"got {type(self.tokenizer).__name__}: pass tokenizer=."
                )
            check = StopStrings(params.stop_strings, self.tokenizer)
        seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
        seeds = [seed] if params.n == 1 else [derive_seed(seed, sample) for sample in range(params.n)]
        stops = self.stop_tokens if params.stop_token_ids is None else frozenset(params.stop_token_ids)
        return [
            Request(prompt, params.max_new_tokens, params.draw(own), stops, check, params.logprobs) for own in seeds
        ]


def read_sampling(sampling: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """One `SamplingParams` for each prompt."""
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * prompts
    if not isinstance(sampling, Sequence) or not all(isinstance(one, SamplingParams) for one in sampling):
        raise SamplingError(f"sampling must be SamplingParams or a sequence of them, got {sampling!r:.80}.")
    if len(sampling) != prompts:
        raise SamplingError(f"sampling has {len(sampling)} entries for {prompts} prompts: give one for each, or one.")
    return list(sampling)
