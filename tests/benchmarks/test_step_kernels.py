"""The table of an iteration's kernels, of a trace that is made up."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_trace import Event
from step_kernels import by_kernel


def test_times_and_launches_are_those_of_a_mean_iteration():
    events = [
        Event(0.0, 4.0, False, "attention"),
        Event(5.0, 7.0, False, "product"),
        Event(7.0, 9.0, False, "product"),
        Event(10.0, 20.0, False, "attention"),
        Event(20.0, 23.0, False, "product"),
    ]
    attention, product = by_kernel(events, iterations=2)
    assert attention == {
        "kernel": "attention",
        "us_per_iteration": 7.0,
        "launches_per_iteration": 1.0,
        "least_us": 4.0,
        "median_us": 7.0,
        "longest_us": 10.0,
    }
    assert (product["kernel"], product["us_per_iteration"], product["launches_per_iteration"]) == ("product", 3.5, 1.5)
