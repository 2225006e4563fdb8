"""Memory that the programs of an attention launch meet in: parts of split units, and counters of them."""

import threading

import torch
from torch import Tensor

CAPTURED_CALLS = 4096
"""Calls in CUDA graphs that get counters of their own, for each device and number of programs; 4 to 9 MB."""

_lock = threading.Lock()
_of_stream: dict[tuple[torch.device, int, int], Tensor] = {}
_for_captures: dict[tuple[torch.device, int], list[Tensor]] = {}


def counters(device: torch.device, programs: int) -> Tensor:
    """int32 [programs], all 0 when the launch starts; the kernel leaves them so.

    Launches on one stream run one after the other and share theirs. A captured call may be replayed on any stream at
    any time, so it never shares: it takes counters that were set to 0 before and that nobody else will get. Should
    those run out, or a device see its first call within a capture, the graph clears its own: right, and a
    microsecond or two slower in each replay.
    """
    if device.type != "cuda":
        return torch.zeros(programs, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    with _lock:
        if capturing:
            free = _for_captures.get((device, programs))
            return free.pop() if free else torch.zeros(programs, dtype=torch.int32, device=device)
        key = (device, torch.cuda.current_stream(device).cuda_stream, programs)
        if key not in _of_stream:
            _of_stream[key] = torch.zeros(programs, dtype=torch.int32, device=device)
        if key[::2] not in _for_captures:
            stock = torch.zeros(CAPTURED_CALLS, programs, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
            _for_captures[key[::2]] = list(stock.unbind())
        return _of_stream[key]


def parts(device: torch.device, programs: int, part_elements: int) -> Tensor:
    """float32 [programs, 2, part_elements], uninitialised; belongs to the call."""
    return torch.empty(programs, 2, part_elements, dtype=torch.float32, device=device)
