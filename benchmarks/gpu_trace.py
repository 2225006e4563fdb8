"""What a GPU runs and when it runs nothing, from a profiler's trace of its kernels and copies."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import sparsespec_compile as ss

Span = tuple[float, float]
"""Start and end, microseconds."""


class Event(NamedTuple):
    """A kernel or a copy: start and end, microseconds, whether it is a copy, and its name."""

    start: float
    end: float
    is_copy: bool
    name: str = ""


_KERNELS, _COPIES = ("kernel", "gpu_memset"), ("gpu_memcpy",)
"""Categories of a trace's events that keep a GPU busy."""


class NoTraceError(RuntimeError):
    """The profiler saw nothing run on a GPU."""


def advance(pieces: ss.TokenStream, fast: ss.OptimizedModel, iterations: int) -> None:
    """Go on with a stream until this many more iterations have ended; figures start with its first piece."""
    next(pieces)
    end = fast.stats.iterations + iterations
    while fast.stats.iterations < end:
        next(pieces)


def gpu_events(run: Callable[[], object]) -> list[Event]:
    """What ran on the GPU during `run`, in order of its start.

    Raises:
        NoTraceError: nothing did.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    ran = [one for one in events if one.get("cat") in _KERNELS + _COPIES]
    if not ran:
        raise NoTraceError("The profiler saw nothing run on the GPU; it needs access to the driver's tracing (CUPTI).")
    return sorted(Event(one["ts"], one["ts"] + one["dur"], one["cat"] in _COPIES, one["name"]) for one in ran)


def busy_spans(events: list[Event]) -> list[Span]:
    """Events in order of their start, joined where they overlap or touch."""
    merged: list[Span] = []
    for start, end, *_ in events:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def idle_share(events: list[Event]) -> float:
    """Share of the time between the first start and the last end in which nothing ran."""
    spans = busy_spans(events)
    busy = sum(end - start for start, end in spans)
    return 1.0 - busy / (spans[-1][1] - spans[0][0])


def idle_between_steps(events: list[Event]) -> float:
    """The part of `idle_share` before and after copies.

    A step is one graph between the copy of its inputs and that of its results. What is idle beside copies waits for the
    host, or for the start of a graph; the rest is the GPU's own passing from kernel to kernel, some 0.5 us each.
    """
    idle, last_end, last_copied = 0.0, events[0].end, events[0].is_copy
    for start, end, copied, _ in events[1:]:
        if start > last_end and (copied or last_copied):
            idle += start - last_end
        if end > last_end:
            last_end, last_copied = end, copied
    return idle / (last_end - events[0].start)
