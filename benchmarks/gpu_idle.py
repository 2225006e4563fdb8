"""When a GPU runs nothing, from a profiler's trace of its kernels and copies."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]
"""Start and end, microseconds."""


def busy_spans(run: Callable[[], object]) -> list[Span]:
    """Spans of `run` in which kernels or copies ran, in order, without overlaps."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return merge(events)


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
