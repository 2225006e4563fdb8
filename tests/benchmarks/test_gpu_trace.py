"""Idle times of a trace, of a made-up one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_trace import Event, busy_spans, idle_between_steps, idle_share

EVENTS = [
    Event(0.0, 1.0, True),  # inputs
    Event(3.0, 13.0, False),  # 2 us until the graph starts
    Event(14.0, 20.0, False),  # 1 us between its kernels
    Event(15.0, 18.0, True),  # beside it: a page on its way to the host
    Event(21.0, 22.0, True),  # results, 1 us later
    Event(22.0, 30.0, False),
]
"""26 us busy of 30; 3 of the idle 4 beside copies."""


def test_idle_shares():
    assert busy_spans(EVENTS) == [(0.0, 1.0), (3.0, 13.0), (14.0, 20.0), (21.0, 30.0)]
    assert idle_share(EVENTS) == pytest.approx(4 / 30)
    assert idle_between_steps(EVENTS) == pytest.approx(3 / 30)
