"""Texts as transformers' continuous batching gives them, and their delivery to handlers and queues."""

import asyncio
import threading
import time
from collections.abc import Callable

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from sparsespec_compile.requests.sampling_params import Completion
from sparsespec_compile.runtime.host.request import FinishReason


def text_name(request: str, sample: int, texts: int) -> str:
    """transformers' name for one of the texts of a request: the last has the request's own."""
    return request if sample == texts - 1 else f"{request}__child#{sample}"


def finished(completion: Completion, created: float, timestamps: list[float] | None) -> GenerationOutput:
    """A text as transformers gives it; its name and prompt are still to be filled in.

    Args:
        created: when it was submitted, in seconds of `time.perf_counter`.
        timestamps: when each token became final, on the same clock; None = not wanted.
    """
    error = completion.error
    if completion.finish_reason is FinishReason.MEMORY:
        error = MemoryError("neither the KV pool nor host memory could hold the text any longer")
    stats = completion.stats
    return GenerationOutput(
        "",
        generated_tokens=completion.token_ids,
        logprobs=completion.logprobs,
        error=None if error is None else f"{type(error).__name__}: {error}",
        status=RequestStatus.FINISHED if error is None else RequestStatus.FAILED,
        created_time=created,
        lifespan=(created + stats.admitted_seconds, created + stats.seconds),
        timestamps=timestamps,
    )


class Results:
    """Results on their way: to a request's handler, in its event loop, or else into one queue. From any thread."""

    def __init__(self) -> None:
        self._waiting: list[GenerationOutput] = []
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], object], asyncio.AbstractEventLoop]] = {}
        self._arrived = threading.Condition()  # guards both

    def register(
        self, request_id: str, callback: Callable[[GenerationOutput], object], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Deliver a request's results, those that wait first, to `callback` in `loop`, until it is finished."""
        with self._arrived:
            missed = [result for result in self._waiting if result.request_id == request_id]
            self._waiting = [result for result in self._waiting if result.request_id != request_id]
            if not missed or missed[-1].status < RequestStatus.FINISHED:
                self._handlers[request_id] = callback, loop
            for result in missed:
                loop.call_soon_threadsafe(callback, result)

    def deliver(self, result: GenerationOutput) -> bool:
        """Send a result on its way; False if it has a handler whose event loop is closed."""
        with self._arrived:
            handler = self._handlers.get(result.request_id)
            if result.status >= RequestStatus.FINISHED:
                self._handlers.pop(result.request_id, None)
            if handler is None:
                self._waiting.append(result)
                self._arrived.notify_all()
                return True
            callback, loop = handler
            try:
                loop.call_soon_threadsafe(callback, result)
            except RuntimeError:
                self._handlers.pop(result.request_id, None)
                return False
            return True

    def get(
        self, request_id: str | None, timeout: float | None, expected: Callable[[], bool]
    ) -> GenerationOutput | None:
        """The oldest result that waits, or the oldest of a request; None after `timeout`, or when none is expected."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._arrived:
            while True:
                for nth, result in enumerate(self._waiting):
                    if request_id is None or result.request_id == request_id:
                        return self._waiting.pop(nth)
                left = None if until is None else until - time.monotonic()
                if not expected() or (left is not None and left <= 0):
                    return None
                self._arrived.wait(0.1 if left is None else min(left, 0.1))

    def wake(self) -> None:
        """Wake waiting threads, so that they check whether results are still expected."""
        with self._arrived:
            self._arrived.notify_all()
