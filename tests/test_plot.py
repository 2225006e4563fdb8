"""`plot` draws what was counted."""

import sys

import pytest

import sparsespec_compile as ss
from sparsespec_compile.errors import MissingPackageError, PlotError
from sparsespec_compile.runtime.host.stats import LATEST

from .support.models import tiny


@pytest.fixture(scope="module")
def fast():
    fast = ss.optimize(tiny("qwen3"), ss.SpecConfig(draft_tokens=3))
    fast.generate_batch([[5, 6, 7], [8, 9]], ss.SamplingParams(max_new_tokens=40))
    return fast


@pytest.fixture(autouse=True)
def without_a_screen(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


def test_every_iteration_has_its_time_and_tokens(fast):
    stats = fast.stats
    assert sum(stats.tokens_by_iteration) == stats.tokens == 80
    assert len(stats.seconds_by_iteration) == len(stats.rows_by_iteration) == stats.iterations
    assert list(stats.seconds_by_iteration) == sorted(stats.seconds_by_iteration)
    assert stats.seconds_by_iteration.maxlen == stats.tokens_by_iteration.maxlen == LATEST


def test_charts_show_the_counts(fast, tmp_path):
    stats = fast.stats
    figure = ss.plot(stats)
    acceptance, speed, choice, schedule = figure.axes[:4]
    assert acceptance.lines[0].get_ydata().tolist() == pytest.approx(stats.accepted_by_position)
    heights, edges, _ = speed.patches[0].get_data()
    after_the_first = stats.tokens - stats.tokens_by_iteration[0]
    assert (heights * (edges[1:] - edges[:-1])).sum() == pytest.approx(after_the_first)
    assert set(choice.lines[-1].get_ydata()) == {3.0}
    assert [text.get_text() for text in choice.get_legend().get_texts()] == ["pillar"]
    assert schedule.lines[0].get_ydata().max() <= max(stats.rows_by_iteration)
    figure.savefig(tmp_path / "stats.png")


def test_plain_decoding_has_no_acceptance_to_draw(fast, tmp_path):
    plain = ss.optimize(tiny("qwen3"), ss.SpecConfig(draft_tokens=0))
    plain.generate_batch([[5]], ss.SamplingParams(max_new_tokens=3))
    figure = ss.plot(plain.stats)
    assert figure.axes[0].texts[0].get_text() == "no full cycle with drafts"
    figure.savefig(tmp_path / "stats.png")


def test_what_cannot_be_drawn_is_named(fast, monkeypatch):
    with pytest.raises(PlotError, match=r"plot\(fast.stats\), got OptimizedModel"):
        ss.plot(fast)
    with pytest.raises(PlotError, match="generate first"):
        ss.plot(ss.Stats(8))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        ss.plot(fast.stats)


def test_stats_are_short_in_a_terminal_and_a_table_in_a_notebook(fast):
    assert len(repr(fast.stats)) < 700
    shown = fast.stats._repr_mimebundle_((), ())["text/html"]
    assert "tokens for each target pass" in shown
    assert "pillar" in shown
