"""Iterations in flight: their uploaded inputs, and the buffers for their results.

The host enqueues an iteration before it knows the results of the one before. So each has its own pinned buffers, which
are free again once its results were read.
"""

from collections import deque

import numpy as np
from torch import Tensor

from sparsespec_compile.runtime.device.drafters import Cycle
from sparsespec_compile.runtime.device.inputs import Work
from sparsespec_compile.runtime.device.interface import Stream
from sparsespec_compile.runtime.device.step import Results
from sparsespec_compile.runtime.host.request import Request


class Frame:
    """One iteration's buffers in host memory.

    Attributes:
        work: the requests of the iteration, and what each does.
        cycle: the cycle that was in use when the iteration was planned.
        logprobs: whether its results hold log-probabilities.
        draft_weights: whether it ran with 8-bit weights.
    """

    def __init__(self, stream: Stream, inputs: Tensor, results: Results) -> None:
        self.work: list[tuple[Request, Work]] = []
        self.cycle: Cycle
        self.logprobs = False
        self.draft_weights = False
        self._stream = stream
        self._upload, self._tokens, self._logprobs = (
            stream.device.host_buffer(tuple(tensor.shape), tensor.dtype)
            for tensor in (inputs, results.tokens, results.logprobs)
        )
        self._drafted = stream.device.host_buffer(tuple(results.drafted.shape), results.drafted.dtype)
        self._arrived = stream.record()

    def upload(self, packed: np.ndarray, inputs: Tensor) -> None:
        """Enqueue the copy of `packed` to the device's inputs."""
        self._upload.numpy()[:] = packed
        self._stream.copy((inputs, self._upload))

    def download(self, results: Results, *, logprobs: bool, drafted: bool) -> None:
        """Enqueue the copy of the results to the host."""
        pairs = [(self._tokens, results.tokens)]
        if drafted:
            pairs.append((self._drafted, results.drafted))
        if logprobs:
            pairs.append((self._logprobs, results.logprobs))
        self._stream.copy(*pairs)
        self._arrived = self._stream.record()

    def drafted(self) -> list[int]:
        """`Results.drafted`, once the results were read; meaningless unless it was downloaded."""
        return self._drafted.tolist()

    def read(self, *, logprobs: bool) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for the results; a row of tokens and one of log-probabilities (empty unless wanted) for each slot."""
        self._arrived.wait()
        return self._tokens.tolist(), self._logprobs.tolist() if logprobs else []


class Flight:
    """Frames in the order in which they were enqueued.

    Args:
        stream: what the steps run on.
        inputs, results: the step's own tensors.
        depth: frames that may be enqueued and unread.
    """

    def __init__(self, stream: Stream, inputs: Tensor, results: Results, depth: int) -> None:
        self.depth = depth
        self._free = [Frame(stream, inputs, results) for _ in range(depth)]
        self._enqueued: deque[Frame] = deque()

    def __len__(self) -> int:
        return len(self._enqueued)

    def take(self) -> Frame:
        """A free frame; there is one while fewer than `depth` are enqueued."""
        frame = self._free.pop()
        self._enqueued.append(frame)
        return frame

    def land(self) -> Frame:
        """The oldest enqueued frame; give it to `give_back` once it was read."""
        return self._enqueued.popleft()

    def give_back(self, frame: Frame) -> None:
        """Return a frame to the free ones."""
        frame.work = []
        self._free.append(frame)
