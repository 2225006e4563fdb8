"""Iterations on their way: what was uploaded for them, and where their results arrive.

The host enqueues an iteration before it knows the results of the one before. So each has its own pinned buffers, which
are free again once its results were read.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.runtime.drafters import Cycle
from sparsespec_compile.runtime.request import Request
from sparsespec_compile.runtime.step import Results
from sparsespec_compile.runtime.work import Work


class Frame:
    """One iteration's buffers in host memory.

    Attributes:
        work: the requests that take part, and what they do.
        cycle: the cycle as of its planning.
    """

    def __init__(self, inputs: Tensor, results: Results) -> None:
        pinned = inputs.is_cuda
        self.work: list[tuple[Request, Work]] = []
        self.cycle: Cycle
        with torch.inference_mode(False):  # an iterator may be advanced inside of inference mode and outside
            self._upload, self._tokens, self._logprobs = (
                torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
                for tensor in (inputs, results.tokens, results.logprobs)
            )
        self._arrived = torch.cuda.Event() if pinned else None

    def upload(self, packed: np.ndarray, inputs: Tensor) -> None:
        """Enqueue the copy of `packed` to the device's inputs."""
        self._upload.numpy()[:] = packed
        inputs.copy_(self._upload, non_blocking=True)

    def download(self, results: Results, *, logprobs: bool) -> None:
        """Enqueue the copy of the results to the host."""
        self._tokens.copy_(results.tokens, non_blocking=True)
        if logprobs:
            self._logprobs.copy_(results.logprobs, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(results.tokens.device))

    def read(self, *, logprobs: bool) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for the results; a row of tokens and one of log-probabilities (empty unless wanted) for each slot."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tokens.tolist(), self._logprobs.tolist() if logprobs else []


class Flight:
    """Frames in the order in which they were enqueued.

    Args:
        inputs, results: the step's own tensors.
        depth: frames that may be enqueued and unread.
    """

    def __init__(self, inputs: Tensor, results: Results, depth: int) -> None:
        self.depth = depth
        self._free = [Frame(inputs, results) for _ in range(depth)]
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
        """Make a frame free."""
        frame.work = []
        self._free.append(frame)
