"""How much of the time a GPU runs nothing, from a profiler's trace of its kernels and copies."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def idle_share(run: Callable[[], object]) -> float:
    """Share of the time between the first and the last kernel of `run` in which no kernel and no copy ran."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - busy / (reached - spans[0][0])
