"""Many texts at once: as they finish, or token by token."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from sparsespec_compile.errors import EngineBusyError, PromptError
from sparsespec_compile.progress import Progress
from sparsespec_compile.requests.prompts import Prompt
from sparsespec_compile.requests.reader import RequestReader, Sampling
from sparsespec_compile.requests.sampling_params import Completion
from sparsespec_compile.runtime.host.client import BackgroundDriver, Output
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.request import FinishReason, Request


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

    Every method may be called from any thread. The thread that waits for a piece runs the model's iterations, unless
    another thread already does, or the stream has a thread of its own (`background=True`). Pieces that
    nobody has taken are kept until the stream is closed.
    """

    def __init__(
        self,
        engine: Engine,
        reader: RequestReader,
        check: Callable[[], None],
        *,
        progress: bool,
        background: bool,
        open_ended: bool,
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._check = check  # raises unless the model is as it was compiled; called for each `add`
        self._client = engine.client(open_ended=open_ended)
        self._adding = threading.Lock()  # one after the other, so that prompts are read with their numbers
        self._lock = threading.RLock()  # guards the two that follow
        self._names: dict[Request, tuple[int, int]] = {}
        self._prompts = 0
        self._ended = False
        self._progress = Progress(enabled=progress)
        # The engine holds no reference to the stream, so a dropped stream is collected and ends at once.
        weakref.finalize(self, engine.abandon, self._client)
        if background:
            BackgroundDriver(engine, self._client)

    def __iter__(self) -> Iterator[Tokens]:
        return self

    def __next__(self) -> Tokens:
        try:
            while True:
                for output in self._client:
                    piece = self._piece(output)
                    if piece is not None:
                        self._progress.took(len(output.tokens), output.request if output.ended else None)
                    self._show()
                    if piece is not None:
                        return piece
                if self._client.closed or self._engine.finish(self._client):  # or prompts were added meanwhile
                    break
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def unfinished(self) -> int:
        """Texts that were neither given out whole nor cancelled."""
        return len(self._names)

    def close(self) -> None:
        """End everything that is unfinished. Callable from any thread, and from callbacks of an iteration."""
        self._ended = True
        self._client.close()
        self._progress.close(len(self._names), self._engine.stats)

    def add(self, prompts: Sequence[Prompt], sampling: Sampling = None) -> list[int]:
        """Queue more prompts; returns their numbers, which continue those of earlier prompts.

        Raises:
            EngineBusyError: the stream has ended.
            As `OptimizedModel.generate_batch` for prompts and settings that are wrong or do not fit.
        """
        if self._ended or self._client.closed:
            raise EngineBusyError("This stream has ended; open another one for more prompts.")
        self._check()
        with self._adding:
            first = self._prompts
            read = self._reader.read(prompts, sampling, first)
            names = {
                request: (index, sample)
                for index, texts in enumerate(read, first)
                for sample, request in enumerate(texts)
            }
            with self._lock:
                self._prompts += len(read)
                self._names |= names
        try:
            self._client.submit(list(names))
        except BaseException:
            self._client.cancel(list(names))  # an interrupted submission may still be carried out
            with self._lock:
                for request in names:
                    self._names.pop(request, None)
            raise
        return list(range(first, first + len(read)))

    def cancel(self, index: int) -> list[Completion]:
        """End all texts of prompt `index`; returns them as they stand, tokens that were not given out yet included.

        Texts that were given out whole are left alone.

        Raises:
            PromptError: the stream has had no such prompt.
        """
        if type(index) is not int or not 0 <= index < self._prompts:
            raise PromptError(f"There is no prompt {index!r}; this stream has had {self._prompts}, numbered from 0.")
        with self._lock:
            unfinished = [request for request, (number, _) in self._names.items() if number == index]
        self._client.cancel(unfinished)
        completions = [self._complete(request) for request in unfinished]
        return [completion for completion in completions if completion is not None]

    def _piece(self, output: Output) -> Tokens | None:
        """None for a text that `cancel` gave out meanwhile."""
        with self._lock:
            name = self._names.get(output.request)
            if name is None:
                return None
            return Tokens(*name, output.tokens, self._complete(output.request) if output.ended else None)

    def _complete(self, request: Request) -> Completion | None:
        with self._lock:
            name = self._names.pop(request, None)
        if name is None:
            return None
        reason = request.finish_reason or FinishReason.CANCELLED  # cancelled before the engine had it
        return Completion(
            *name,
            list(request.output),
            reason,
            list(request.output_logprobs),
            request.stats,
            request.error,
            self._reader.tokenizer,
        )

    def _show(self) -> None:
        if self._progress.due():
            with self._lock:
                unfinished = list(self._names)
            self._progress.show(unfinished, self._engine.stats, self._engine.occupancy)
