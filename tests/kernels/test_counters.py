"""Counters outlive every launch and every captured call that knows their address."""

import pytest
import torch

from sparsespec_compile.kernels import launch as module
from sparsespec_compile.kernels.launch import SharedCounters, counters

CPU = torch.device("cpu")


def test_launches_that_never_overlap_share_theirs(monkeypatch):
    shared, other = SharedCounters(), SharedCounters()
    with shared.in_use():
        mine = counters(CPU, 7)
        assert counters(CPU, 7) is mine
        assert counters(CPU, 8) is not mine
        with other.in_use():
            assert counters(CPU, 7) is not mine
        monkeypatch.setattr(module, "_capturing", lambda device: True)
        assert counters(CPU, 7) is mine, "a capture takes what the run before it took"
        assert counters(CPU, 9) is not counters(CPU, 9), "memory of a graph belongs to that graph alone"
    assert counters(CPU, 7) is not mine


@pytest.mark.gpu
def test_counters_of_captured_calls_are_never_given_back(monkeypatch):
    """Also when all of them were given out: graphs know their addresses, and nobody else does."""
    monkeypatch.setattr(module, "CAPTURED_CALLS", 2)
    device, programs = torch.device("cuda", torch.cuda.current_device()), 12345
    counters(device, programs)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    addresses = []
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(2):
            taken = counters(device, programs)
            addresses.append(taken.data_ptr())
            taken.add_(1)
            del taken
    fresh = [torch.empty(2, programs, dtype=torch.int32, device=device) for _ in range(64)]
    taken_again = {tensor.data_ptr() for tensor in fresh}
    assert not taken_again & set(addresses)
    graph.replay()
