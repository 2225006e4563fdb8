"""Thousands of ragged prompts through the engine: as they finish, or token by token."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from tqdm import tqdm

from sparsespec_compile.errors import PromptError, SamplingError
from sparsespec_compile.runtime.engine import Engine
from sparsespec_compile.runtime.noise import derive_seed
from sparsespec_compile.runtime.request import FinishReason, Request
from sparsespec_compile.runtime.session import Session
from sparsespec_compile.sampling_params import Completion, SamplingParams
from sparsespec_compile.stop_strings import Decoder, StopStrings

Prompt = Sequence[int] | Tensor
"""Token ids: a sequence of integers, or an int64 tensor [tokens]."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one text that are final.

    Attributes:
        index, sample: which text, as in `Completion`.
        token_ids: the new ones since the last such piece; may be empty in the last one.
        completion: the whole text, once it is complete; None before.
    """

    index: int
    sample: int
    token_ids: list[int]
    completion: Completion | None


class TokenStream:
    """An iterator over `Tokens` of many texts, as they become final.

    Closing it (`close`, a `with` block, or dropping it) ends what is unfinished and leaves the model usable.
    """

    def __init__(self, engine: Engine, requests: Sequence[tuple[int, int, Request]], *, progress: bool) -> None:
        self._engine = engine
        self._names = {request: (index, sample) for index, sample, request in requests}
        self._progress = progress
        self._session: Session | None = None
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Tokens]:
        return self

    def __next__(self) -> Tokens:
        return next(self._pieces)

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End everything that is unfinished."""
        self._pieces.close()

    def cancel(self, index: int) -> list[Completion]:
        """End all texts of prompt `index`; returns them as they stand. Texts that are complete are left alone."""
        mine = [request for request, (number, _) in self._names.items() if number == index]
        if not mine:
            raise PromptError(f"There is no prompt {index}; this stream has prompts 0 to {self._last_index()}.")
        unfinished = [request for request in mine if not request.finished]
        for request in unfinished:
            if self._session is None:
                request.finish_reason = FinishReason.CANCELLED
            else:
                self._session.cancel(request)
        return [self._completion(request) for request in unfinished]

    def _last_index(self) -> int:
        return max(index for index, _ in self._names.values())

    def _run(self) -> Generator[Tokens, None, None]:
        requests = [request for request in self._names if not request.finished]
        if not requests:
            return
        needs = self._engine.needs([request.max_length for request in requests])
        with self._engine.session(needs) as session, self._bar(len(requests)) as bar:
            self._session = session
            for request in requests:
                session.add(request)
            while session.busy:
                for request, tokens in session.advance():
                    if request.finish_reason is FinishReason.CANCELLED:
                        continue  # `cancel` gave these tokens out
                    yield self._piece(request, tokens)
                    self._show(bar, session, request, len(tokens))
            bar.update(len(requests) - bar.n)

    def _piece(self, request: Request, tokens: list[int]) -> Tokens:
        index, sample = self._names[request]
        return Tokens(index, sample, tokens, self._completion(request) if request.finished else None)

    def _completion(self, request: Request) -> Completion:
        index, sample = self._names[request]
        reason = request.finish_reason or FinishReason.CANCELLED
        return Completion(index, sample, request.output, reason, request.output_logprobs, request.stats)

    def _bar(self, total: int) -> "tqdm[None]":
        return tqdm(total=total, unit="text", disable=not self._progress)

    def _show(self, bar: "tqdm[None]", session: Session, request: Request, tokens: int) -> None:
        stats = self._engine.stats
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        postfix = {"tokens/s": f"{stats.tokens / seconds:,.0f}", "pool": f"{session.pool_share:.0%}"}
        if stats.cycles:
            postfix["accepted"] = f"{stats.accepted_per_cycle:.2f}/{stats.draft_tokens}"
        bar.set_postfix(postfix, refresh=False)
        bar.update(int(request.finished))


def make_requests(
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    model_stop_tokens: frozenset[int],
    tokenizer: Decoder | None,
) -> list[tuple[int, int, Request]]:
    """(prompt number, sample number, request) for every text of a batch, in order.

    Raises:
        SamplingError: stop strings without a tokenizer.
    """
    requests = []
    for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        if params.stop_strings and tokenizer is None:
            raise SamplingError(
                f"Prompt {index} has stop_strings {list(params.stop_strings)}, which need a tokenizer: pass tokenizer=."
            )
        seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
        stops = model_stop_tokens if params.stop_token_ids is None else frozenset(params.stop_token_ids)
        for sample in range(params.n):
            check = StopStrings(params.stop_strings, tokenizer) if params.stop_strings and tokenizer else None
            draw = params.draw(seed if params.n == 1 else derive_seed(seed, sample))
            request = Request(prompt, params.max_new_tokens, draw, stops, check, params.logprobs)
            requests.append((index, sample, request))
    return requests


def read_prompts(prompts: Sequence[Prompt], vocabulary: int) -> list[list[int]]:
    """Prompts as lists of token ids.

    Raises:
        PromptError: not a sequence of prompts, an empty prompt, or tokens outside of the vocabulary.
    """
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Sequence):
        raise PromptError(
            f"prompts must be a sequence of prompts, each a sequence of token ids, got {type(prompts).__name__}. "
            "Encode texts with the model's tokenizer: tokenizer(texts).input_ids."
        )
    read = []
    for index, prompt in enumerate(prompts):
        tokens = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(type(t) is int for t in tokens):
            raise PromptError(
                f"Prompt {index} must be a sequence of token ids, got {prompt!r:.80}. Encode texts with the model's "
                "tokenizer: tokenizer(text).input_ids."
            )
        if not tokens or not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise PromptError(
                f"Prompt {index} is empty or holds tokens outside 0 to {vocabulary - 1}, the model's. Use its own "
                "tokenizer; for an empty prompt give its bos_token_id."
            )
        read.append(list(tokens))
    return read


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
