"""Cycles that are chosen more often than they would be."""

from sparsespec_compile.runtime.host.cycle_chooser import Pace


def choose_every(monkeypatch, iterations):
    """Let sessions choose in each of so many iterations, measured or not."""

    class Often(Pace):
        def due(self, iteration, requests):
            return (iteration - 1) % iterations == 0 or self.other_load(requests)

    monkeypatch.setattr("sparsespec_compile.runtime.host.session.Pace", Often)
