"""What is shown while texts are written: in a terminal of 80 columns, a notebook and a log."""

import io
import sys
import types
from dataclasses import dataclass, field

import pytest
import rich

from sparsespec_compile import progress
from sparsespec_compile.progress import Progress, holds, in_words, remaining
from sparsespec_compile.runtime.host.stats import CycleStats, Occupancy, Stats


@dataclass(eq=False)
class Text:
    written: int
    allowed: int = 100
    prompt: list[int] = field(default_factory=lambda: [1, 2, 3])

    @property
    def output(self) -> list[int]:
        return [7] * self.written

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.allowed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STATS = Stats(12, by_cycle={("pillar", 12): CycleStats(4, [4] * 6 + [0] * 6)})
FULL = Occupancy(running=1024, waiting=100_000, pool_share=1.0, host_bytes=999 * 2**30, cycle=("pillar", 12))


@pytest.mark.parametrize(
    ("lengths", "tokens", "certain"),
    [
        ([], 100 + 90 + 40, False),  # nothing has ended: as much as is allowed
        ([20, 30], 25 + 15 + 40, True),  # means of those beyond 0 and beyond 10; none ended beyond 60
        ([5, 20, 80], 35 + 40 + 20, True),
        ([900], 100 + 90 + 40, True),  # never beyond what is allowed
    ],
)
def test_texts_are_expected_to_become_as_long_as_those_that_were_longer(lengths, tokens, certain):
    assert remaining([Text(0), Text(10), Text(60)], lengths) == (tokens, certain)


def test_lines_fit_80_columns_at_the_largest_figures():
    line = in_words(1_234_567.0, STATS, ("pillar", 12))
    assert line == "1,234,567 tokens/s, 6.00 of 12.00 drafts accepted, now 12 by pillar"
    assert holds(FULL) == "1,024 running, 100,000 waiting, 100% of the KV pool, 999.0 GiB of host memory"
    assert max(len(line), len(holds(FULL))) < 80
    assert in_words(0, Stats(8), ("none", 0)) == "0 tokens/s, now no drafts"
    assert holds(Occupancy()) == "0 running, 0 waiting, 0% of the KV pool"


def shown(texts: list[Text]) -> None:
    picture = Progress(enabled=True)
    assert picture.due()
    picture._began -= 2.0
    picture.took(10, None)
    picture.show(texts, STATS, FULL)
    assert not picture.due()
    picture.took(5, texts[0])
    picture.close(1, STATS)
    picture.close(1, STATS)


def test_a_terminal_has_a_bar_and_two_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    shown([Text(15), Text(15)])
    text = terminal.getvalue()
    for wanted in ("0/2 texts", "at most ", "now 12 by pillar", "100,000 waiting", "999.0 GiB"):
        assert wanted in text
    assert text.rstrip().endswith("6.00 of 12.00 drafts accepted")
    assert "1/2 texts" in text


def test_a_log_has_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    shown([Text(15), Text(15)])
    first, last = log.getvalue().splitlines()
    assert first.startswith("0/2 texts, 00:02, at most ")
    assert last.startswith("1/2 texts, 00:02, ")
    assert "\r" not in log.getvalue()


def test_a_notebook_has_one_output_that_changes(monkeypatch):
    pictures = []
    handle = types.SimpleNamespace(update=pictures.append)
    display = types.SimpleNamespace(HTML=str, display=lambda first, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(rich, "get_console", lambda: types.SimpleNamespace(is_jupyter=True))
    shown([Text(15), Text(15)])
    assert len(pictures) == 2
    assert '<progress value="0" max="2">' in pictures[0]
    assert "now 12 by pillar" in pictures[0]
    assert '<progress value="1" max="2">' in pictures[1]


def test_a_picture_that_takes_long_is_shown_less_often(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 1.0])  # begun, shown from 0 to 1
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_outlet", lambda: (progress._Log(), 0.2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    picture = Progress(enabled=True)
    picture.show([], STATS, FULL)
    assert picture._next == pytest.approx(1.0 + 1.0 / progress._SHARE)


def test_nothing_is_counted_where_nothing_is_shown():
    picture = Progress(enabled=False)
    picture.took(3, None)
    assert not picture.due()
    picture.close(0, STATS)
