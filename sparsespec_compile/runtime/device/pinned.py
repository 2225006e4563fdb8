"""Host memory that the device copies from and to by itself, taken without holding up who enqueues steps.

While the driver gets memory and pins it (cudaHostAlloc) nobody else gets through to it, such as who enqueues a step:
for 12 ms at worst on an H200, with 16 MB at a time. Where a thread has touched the pages before, pinning them
(cudaHostRegister) held nobody up for longer than 0.2 ms (benchmarks/LOG.md).
"""

import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory of their own, pinned for all devices as long as the tensor itself lives, its views aside.

    Raises:
        RuntimeError: the driver pins no more memory.
        OSError, MemoryError: the system gives no more memory.
    """
    count = math.prod(size) * dtype.itemsize
    memory = mmap.mmap(-1, count)  # it shares no page with other memory, and a fork copies none
    tensor = torch.frombuffer(memory, dtype=dtype).view(*size)
    tensor.zero_()
    address = tensor.data_ptr()
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, count, 0)))
    # The memory is an argument so that it outlives the pinning.
    weakref.finalize(tensor, _unpin, address, memory).atexit = False  # by then there may be no driver
    return tensor


def _unpin(address: int, memory: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
