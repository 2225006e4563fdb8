"""A manager of requests with the methods of transformers' `ContinuousBatchingManager`, over this engine."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from sparsespec_compile.errors import EngineBusyError, EngineFailedError, PromptError, SparseSpecError
from sparsespec_compile.integrations.results import Results, finished, text_name
from sparsespec_compile.requests.continuous_batching import BatchSettings
from sparsespec_compile.requests.prompts import integers
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.stream import Tokens, TokenStream

if TYPE_CHECKING:
    from sparsespec_compile.integrations.transformers import Installation

logger = logging.get_logger(__name__)

_PUT_SECONDS = 10.0
"""So long `add_request` waits for room in a queue of limited size, as transformers does."""


@dataclass(eq=False)
class _Text:
    """One text of a request, as far as it was written."""

    name: str
    tokens: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)


@dataclass(eq=False)
class _Asked:
    """A request that was added."""

    name: str
    prompt: list[int]
    sampling: SamplingParams
    streaming: bool
    timestamps: bool
    created: float = field(default_factory=time.perf_counter)
    number: int | None = None  # of its prompt in the stream; None = it has not reached it yet
    texts: dict[int, _Text] = field(default_factory=dict)
    left: int = 0  # texts that are unfinished

    def __post_init__(self) -> None:
        self.left = self.sampling.n
        names = [text_name(self.name, sample, self.sampling.n) for sample in range(self.sampling.n)]
        self.texts = {sample: _Text(name) for sample, name in enumerate(names)}


class ThreadStatus:
    """What transformers' server reads of its manager's thread.

    Attributes:
        fatal_error: what ended the thread before it was stopped; None = nothing has.
    """

    def __init__(self) -> None:
        self.fatal_error: BaseException | None = None


class Manager:
    """Takes requests at any time, from any thread, and gives results as they come. Get it from an equipped model.

    `start` begins a thread that hands requests to the engine, and one that runs it and delivers. Requests may be added
    before. `stop` lets those that were added finish, unless it is told not to.

    Results of a request go to its handler, if one is registered, or else into one queue, which iterating and
    `get_result` read. A streaming request has a result for each step in which tokens became final, with all tokens so
    far. Several tokens may do so at once.

    Every method may be called from any thread. Handlers run in the event loop in which they were registered.

    Attributes:
        background_thread_status: has `fatal_error`.
        batch_processor: None; transformers' own has its engine there.
        warmed_up: True; steps are captured before they are needed.
    """

    def __init__(self, installation: "Installation", settings: BatchSettings, queue_size: int, start: Any) -> None:
        self._installation = installation
        self._settings = settings
        self._open: Callable[[], TokenStream] = start
        self._asked: queue.Queue[_Asked | None] = queue.Queue(queue_size)
        self._named: dict[str, _Asked] = {}
        self._numbered: dict[int, _Asked] = {}
        self._lock = threading.RLock()  # guards requests; never held while waiting for the engine
        self._numbering = threading.Lock()  # held until the numbers of the prompts that the engine gets are known
        self._cancelled: list[int] = []
        self._results = Results()
        self._own: dict[str, BatchSettings] = {}
        self._count = 0
        self._stream: TokenStream | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._hard = False
        self.background_thread_status = ThreadStatus()
        self.batch_processor = None
        self.warmed_up = True

    @property
    def fatal_error(self) -> BaseException | None:
        """What ended the thread before it was stopped; None = nothing has."""
        return self.background_thread_status.fatal_error

    def is_running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def warmup(self) -> None:
        """Compile the model now, if it was not."""
        _ = self._installation.fast

    def start(self) -> None:
        """Begin to serve requests; does nothing while it does."""
        if self.is_running():
            return
        self.background_thread_status.fatal_error = None
        self._stopping = self._hard = False
        self._thread = threading.Thread(target=self._serve, name="sparsespec-manager", daemon=True)
        self._thread.start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End the thread once every request is finished.

        Args:
            block: whether to wait for that.
            timeout: seconds to wait at most; None = as long as it takes.
            keep_for_next_session: whether the model's next `init_continuous_batching` gives this manager again, and
                the engine keeps its memory.
            hard_stop: whether to end what is unfinished; its results have status FAILED.
        """
        asked = time.perf_counter()
        with self._lock:
            self._stopping = True
            self._hard = self._hard or hard_stop
        self._installation.keep(self if keep_for_next_session and self.is_running() else None, self)
        self._wake()
        if hard_stop and self._stream is not None:
            self._stream.close()
        if block:
            self.join(asked, timeout)

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait for the thread to end, `timeout` seconds at most."""
        thread = self._thread
        if thread is None:
            return
        thread.join(timeout)
        if thread.is_alive():
            logger.warning(f"The manager's thread has not ended within {timeout} s; requests are unfinished.")
        else:
            logger.info(f"The manager's thread ended after {time.perf_counter() - stop_trigger_time:.2f} s.")
            self._thread = None

    def destroy(self) -> None:
        """Stop, if it is running."""
        if self.is_running():
            self.stop()

    def pause(self) -> None:
        """Refused: this engine does not wait in the middle of texts.

        Raises:
            EngineBusyError: always.
        """
        raise EngineBusyError("This manager cannot pause. Stop it, change the model in place, and start it again.")

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        **draw: float,
    ) -> str:
        """Queue a request; returns its name.

        Args:
            input_ids: its prompt.
            request_id: its name; None = "req_0", "req_1" and so on.
            max_new_tokens, eos_token_id: over those of the manager's `generation_config`.
            streaming: whether results come as tokens become final.
            record_timestamps: whether results tell when each token became final.
            **draw: temperature, top_k, top_p and min_p, over those of the manager's `generation_config`.

        Raises:
            EngineBusyError: the manager is stopping, or its thread has died.
            PromptError: another request of this name is unfinished, or `input_ids` are not token ids.
            SamplingError, ContextLengthError: settings that are not allowed.
            queue.Full: there was no room in a queue of limited size for ten seconds.
        """
        prompt = integers("input_ids", input_ids, texts=False)
        with self._lock:
            if self._stopping or self.fatal_error is not None:
                why = "is stopping" if self.fatal_error is None else f"has died ({self.fatal_error})"
                raise EngineBusyError(f"The manager takes no requests, since its thread {why}. Call start() first.")
            number, self._count = self._count, self._count + 1
            name = f"req_{number}" if request_id is None else request_id
            if name in self._named:
                raise PromptError(f"Request {name!r} is unfinished; give the new one another request_id.")
            settings = self._own.pop(name, self._settings)
            sampling = settings.sampling(number, len(prompt), max_new_tokens, eos_token_id, draw)
            asked = _Asked(name, prompt, sampling, streaming, record_timestamps)
            self._named[name] = asked
        try:
            self._asked.put(asked, timeout=_PUT_SECONDS)
        except queue.Full:
            self._forget(asked)
            raise
        return name

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **draw: float,
    ) -> list[str]:
        """`add_request` for each prompt; returns their names."""
        return [
            self.add_request(one, None, max_new_tokens, streaming, record_timestamps, None, **draw) for one in inputs
        ]

    def configure(self, request_id: str, generation_config: GenerationConfig) -> None:
        """Give the request that will be added by this name a `generation_config` of its own.

        Raises:
            SamplingError: as `generate_batch` of the model.
        """
        settings, _ = self._installation.read(generation_config, None)
        with self._lock:
            self._own[request_id] = settings

    def cancel_request(self, request_id: str) -> None:
        """End a request where it stands; no more results of it come. Does nothing if there is none of this name."""
        with self._lock:
            asked = self._named.get(request_id)
            if asked is None:
                return
            self._forget(asked)
            if asked.number is not None:
                self._cancelled.append(asked.number)
        self._wake()

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], object]) -> None:
        """Deliver a request's results to `callback`, in the event loop that runs now, until the request is finished.

        Those that have come already, if it was added before, are delivered first.

        Raises:
            RuntimeError: no event loop is running.
        """
        self._results.register(request_id, callback, asyncio.get_running_loop())

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The oldest result, or the oldest of a request; None after `timeout` seconds, or when none will come."""
        return self._results.get(request_id, timeout, self.is_running)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until the thread has ended and none is left."""
        while True:
            result = self.get_result(timeout=0.1)
            if result is not None:
                yield result
            elif not self.is_running():
                return

    def request_id_iter(self, request_id: str) -> Generator[GenerationOutput, None, None]:
        """A request's results as they come; ends with its last, or when it was cancelled."""
        while True:
            result = self.get_result(request_id, timeout=0.1)
            if result is not None:
                yield result
                if result.status >= RequestStatus.FINISHED:
                    return
            elif not self.is_running() or request_id not in self._named:
                return

    # The threads.

    def _serve(self) -> None:
        try:
            stream = self._stream = self._open()
        except Exception as error:  # the model cannot be compiled, and no caller is waiting: the manager fails
            self._die(error)
            return
        reader = threading.Thread(target=self._read, args=(stream,), name="sparsespec-results", daemon=True)
        reader.start()
        try:
            while self._take(stream):
                pass
        finally:
            self._wait_for_all(stream, reader)
            stream.close()
            reader.join()
            with self._lock:
                left, self._stream = list(self._named.values()), None
            for asked in left:
                self._fail(asked, EngineFailedError("The manager was stopped before this request was finished."))
            self._installation.manager_ended(self)
            self._results.wake()

    def _take(self, stream: TokenStream, *, wait: bool = True) -> bool:
        """Hand on to the engine what has come in; False once there will be no more."""
        batch: list[_Asked | None] = [self._asked.get()] if wait else []
        with suppress(queue.Empty):
            while True:
                batch.append(self._asked.get_nowait())
        asked = [one for one in batch if one is not None]
        if asked and not self._hard and self.fatal_error is None:
            self._submit(stream, asked)
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            over = self._stopping or self.fatal_error is not None
        for number in cancelled:
            stream.cancel(number)
        return not over

    def _submit(self, stream: TokenStream, asked: list[_Asked]) -> None:
        asked = [one for one in asked if self._named.get(one.name) is one]  # the others were cancelled
        if not asked:
            return
        try:
            with self._numbering:
                numbers = stream.add([one.prompt for one in asked], [one.sampling for one in asked])
                for one, number in zip(asked, numbers, strict=True):
                    one.number = number
                    self._numbered[number] = one
        except SparseSpecError as error:
            if len(asked) == 1:
                self._fail(asked[0], error)
            else:
                for one in asked:  # which of them is refused?
                    self._submit(stream, [one])
            return
        with self._lock:  # those that were cancelled meanwhile
            self._cancelled += [
                number for one, number in zip(asked, numbers, strict=True) if self._named.get(one.name) is not one
            ]

    def _wake(self) -> None:
        """Let the thread that hands on see what there is to do; if the queue is full it does so anyway."""
        with suppress(queue.Full):
            self._asked.put_nowait(None)

    def _read(self, stream: TokenStream) -> None:
        try:
            for piece in stream:
                self._piece(piece)
        except Exception as error:  # an iteration failed, and all requests with it
            self._die(error)

    def _piece(self, piece: Tokens) -> None:
        with self._numbering:
            asked = self._numbered.get(piece.index)
        with self._lock:
            if asked is None or self._named.get(asked.name) is not asked:
                return
            text = asked.texts[piece.sample]
            text.tokens += piece.token_ids
            text.stamps += [time.perf_counter()] * len(piece.token_ids)
            stamps = list(text.stamps) if asked.timestamps else None
            if piece.completion is not None:
                asked.left -= 1
                if asked.left == 0:
                    self._forget(asked)
                result = finished(piece.completion, asked.created, stamps)
            elif asked.streaming:
                result = GenerationOutput(
                    text.name,
                    generated_tokens=list(text.tokens),
                    status=RequestStatus.DECODING,
                    created_time=asked.created,
                    timestamps=stamps,
                )
            else:
                return
            result.request_id, result.prompt_ids = text.name, asked.prompt
        self._deliver(result)

    def _deliver(self, result: GenerationOutput) -> None:
        if not self._results.deliver(result):
            self.cancel_request(result.request_id)

    def _forget(self, asked: _Asked) -> None:
        with self._lock:
            if self._named.get(asked.name) is asked:
                del self._named[asked.name]
            if asked.number is not None:
                self._numbered.pop(asked.number, None)

    def _fail(self, asked: _Asked, error: BaseException) -> None:
        self._forget(asked)
        for text in asked.texts.values():
            self._deliver(
                GenerationOutput(
                    text.name,
                    asked.prompt,
                    text.tokens,
                    error=f"{type(error).__name__}: {error}",
                    status=RequestStatus.FAILED,
                    created_time=asked.created,
                )
            )

    def _wait_for_all(self, stream: TokenStream, reader: threading.Thread) -> None:
        """Until every request is finished, or none will be."""
        while reader.is_alive() and not self._hard:
            self._take(stream, wait=False)  # what was added while `stop` was called, and cancelled since
            with self._lock:
                if not self._named:
                    return
            reader.join(0.01)

    def _die(self, error: Exception) -> None:
        logger.error(f"Error in generation: {error}", exc_info=error)
        with self._lock:
            self.background_thread_status.fatal_error = error
            left = list(self._named.values())
        for asked in left:
            self._fail(asked, error)
        self._wake()
