"""Many texts at once: as they finish, or token by token."""

import inspect
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm

from sparsespec_compile.errors import EngineBusyError, PoolTooSmallError, PromptError
from sparsespec_compile.requests.prompts import Prompt
from sparsespec_compile.requests.reader import RequestReader, Sampling
from sparsespec_compile.requests.sampling_params import Completion
from sparsespec_compile.runtime.engine import Engine
from sparsespec_compile.runtime.request import FinishReason, Request
from sparsespec_compile.runtime.session import Session


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
    """An iterator over `Tokens` of many texts, as they become final. Get it from `OptimizedModel.stream`.

    While it runs, prompts may be added and taken back. Closing it, by `close` or a `with` block, or dropping it ends
    what is unfinished and leaves the model usable; so does `OptimizedModel.stop`.
    """

    def __init__(self, engine: Engine, reader: RequestReader, max_length: int | None, *, progress: bool) -> None:
        # Whoever runs does not know the stream: a stream that is dropped in the middle ends at once.
        self._texts = _Texts(engine, reader, max_length, progress=progress)
        self._pieces = self._texts.run()

    def __iter__(self) -> Iterator[Tokens]:
        return self

    def __next__(self) -> Tokens:
        return next(self._pieces)

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def unfinished(self) -> int:
        """Texts that were neither given out whole nor cancelled."""
        return len(self._texts.names)

    def close(self) -> None:
        """End everything that is unfinished; also from what the stream calls, or from another thread."""
        self._texts.ended = True
        if inspect.getgeneratorstate(self._pieces) == inspect.GEN_RUNNING:
            self._texts.stop()
        else:
            self._pieces.close()

    def add(self, prompts: Sequence[Prompt], sampling: Sampling = None) -> list[int]:
        """Queue more prompts; returns their numbers, which count on from the earlier ones.

        Raises:
            EngineBusyError: the stream has ended.
            PoolTooSmallError: a text may become longer than the stream was opened for.
            As `OptimizedModel.generate_batch` for wrong prompts and settings.
        """
        return self._texts.add(prompts, sampling)

    def cancel(self, index: int) -> list[Completion]:
        """End all texts of prompt `index`; returns them as they stand, tokens that were not given out yet included.

        Texts that are complete are left alone.

        Raises:
            PromptError: the stream has had no such prompt.
        """
        return self._texts.cancel(index)


class _Texts:
    """The texts of a stream, and what carries them on."""

    def __init__(self, engine: Engine, reader: RequestReader, max_length: int | None, *, progress: bool) -> None:
        self._engine = engine
        self._reader = reader
        self._max_length = max_length
        self._progress = progress
        self.names: dict[Request, tuple[int, int]] = {}
        self._prompts = 0
        self._session: Session | None = None
        self.ended = False

    def add(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[int]:
        """`TokenStream.add`."""
        if self.ended or (self._session is not None and self._session.closed):
            raise EngineBusyError("This stream has ended; open another one for more prompts.")
        read = self._reader.read(prompts, sampling)
        longest = max((request.max_length for texts in read for request in texts), default=0)
        if self._session is not None and longest > self._session.longest:
            raise PoolTooSmallError(
                f"A text of {longest} tokens does not fit a stream opened for {self._session.longest}: pass "
                "max_length= to stream()."
            )
        first = self._prompts
        self._prompts += len(read)
        for index, texts in enumerate(read, first):
            for sample, request in enumerate(texts):
                self.names[request] = (index, sample)
                if self._session is not None:
                    self._session.add(request)
        return list(range(first, self._prompts))

    def cancel(self, index: int) -> list[Completion]:
        """`TokenStream.cancel`."""
        if type(index) is not int or not 0 <= index < self._prompts:
            raise PromptError(f"There is no prompt {index!r}; this stream has had {self._prompts}, numbered from 0.")
        unfinished = [request for request, (number, _) in self.names.items() if number == index]
        completions = []
        for request in unfinished:
            if self._session is not None:  # before the first piece there is nobody to tell
                self._session.cancel(request)
            completions.append(self._complete(request, request.finish_reason or FinishReason.CANCELLED))
        return completions

    def stop(self) -> None:
        """End the session, while `run` is at work."""
        if self._session is not None:
            self._session.close()

    def run(self) -> Generator[Tokens, None, None]:
        """Pieces of all texts until none is left."""
        lengths = [request.max_length for request in self.names]
        if self._max_length is not None:
            lengths += [self._max_length] * self._engine.config.max_requests
        try:
            if self.names:
                with self._engine.session(self._engine.needs(lengths)) as session, self._bar() as bar:
                    self._session = session
                    for request in self.names:
                        session.add(request)
                    yield from self._advance(session, bar)
        finally:
            self.ended, self._session = True, None

    def _advance(self, session: Session, bar: "tqdm[None]") -> Iterator[Tokens]:
        while session.busy:
            for request, tokens in session.advance():
                if session.closed:
                    return
                if request in self.names:  # `cancel` gave the others out
                    yield self._piece(request, tokens)
                self._show(bar, session)

    def _piece(self, request: Request, tokens: list[int]) -> Tokens:
        index, sample = self.names[request]
        reason = request.finish_reason
        return Tokens(index, sample, tokens, None if reason is None else self._complete(request, reason))

    def _complete(self, request: Request, reason: FinishReason) -> Completion:
        index, sample = self.names.pop(request)
        return Completion(index, sample, request.output, reason, request.output_logprobs, request.stats)

    def _bar(self) -> "tqdm[None]":
        return tqdm(total=len(self.names), unit="text", disable=not self._progress)

    def _show(self, bar: "tqdm[None]", session: Session) -> None:
        if bar.disable:
            return
        stats = self._engine.stats
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        postfix = {"tokens/s": f"{stats.tokens / seconds:,.0f}", "pool": f"{session.pool_share:.0%}"}
        if stats.cycles:
            postfix["accepted"] = f"{stats.accepted_per_cycle:.2f}/{stats.drafts_per_cycle:.3g}"
        bar.total = max(bar.total, bar.n + len(self.names))
        bar.set_postfix(postfix, refresh=False)
        bar.update(bar.total - len(self.names) - bar.n)
