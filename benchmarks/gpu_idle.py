"""When a GPU runs nothing, from a profiler's trace of its kernels and copies."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import sparsespec_compile as ss

Span = tuple[float, float]
"""Start and end, microseconds."""


_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that keep a GPU busy."""


class NoTraceError(RuntimeError):
    """The profiler saw nothing run on a GPU."""


def advance(pieces: ss.TokenStream, fast: ss.OptimizedModel, iterations: int) -> None:
    """Go on with a stream until this many more iterations have ended; figures start with its first piece."""
    next(pieces)
    end = fast.stats.iterations + iterations
    while fast.stats.iterations < end:
        next(pieces)


def busy_spans(run: Callable[[], object]) -> list[Span]:
    """Spans of `run` in which kernels or copies ran, in order, without overlaps.

    Raises:
        NoTraceError: there are none.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    spans = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one.get("cat") in _GPU_WORK)
    if not spans:
        raise NoTraceError("The profiler saw nothing run on the GPU; it needs access to the driver's tracing (CUPTI).")
    return merge(spans)


def merge(events: list[Span]) -> list[Span]:
    """Spans in order of their start, joined where they overlap or touch."""
    merged: list[Span] = []
    for start, end in events:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def idle_share(spans: list[Span]) -> float:
    """Share of the time between the first start and the last end that no span covers."""
    busy = sum(end - start for start, end in spans)
    return 1.0 - busy / (spans[-1][1] - spans[0][0])
