"""Cycles that are chosen more often than they would be, and by chance."""

import numpy as np

from sparsespec_compile.runtime.host.cycle_chooser import Pace


def choose_every(monkeypatch, iterations):
    """Let sessions choose in each of so many iterations, measured or not."""

    class Often(Pace):
        def due(self, iteration, requests):
            return (iteration - 1) % iterations == 0 or self.other_load(requests)

    monkeypatch.setattr("sparsespec_compile.runtime.host.session.Pace", Often)


def random_times(chance):
    """Predictions of any size, another one for each cycle and each time."""
    return lambda cycles, length, requests: np.array([chance.uniform(0.5, 1.5) for _ in cycles])
