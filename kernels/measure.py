"""Timing of calls as a captured step makes them: in a CUDA graph, each on its own inputs, medians of its replays."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]


def replay_ms(calls: Sequence[Call], repeats: int = 30, warm_up: int = 3) -> float:
    """Median milliseconds of one of ``calls``, which run one after the other in one graph.

    Give calls that do the same work on inputs of their own, together larger than the L2 cache, so that each finds
    nothing of its inputs there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(_timed(graph.replay, repeats, warm_up)) / len(calls)


def _timed(run: Callable[[], None], repeats: int, warm_up: int) -> list[float]:
    """Milliseconds of each run, by device events."""
    for _ in range(warm_up):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in marks]
