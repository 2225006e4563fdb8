"""The number of drafts that changes while requests run: what the engine tells its chooser, and that the texts stay."""

import dataclasses
import random
import time
from collections import Counter

import numpy as np
import pytest

import sparsespec_compile as ss
from sparsespec_compile.compile import target
from sparsespec_compile.errors import CeilingsError, ConfigError, CostModelError
from sparsespec_compile.runtime.build import capacity_for
from sparsespec_compile.runtime.device.drafters import cycles_of, drafters_of
from sparsespec_compile.runtime.host.cycle_chooser import chooser_for
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.stats import Stats

from ..support.choices import choose_every
from ..support.models import left_padded, tiny
from ..support.toy import Toy, requests_of, run


def steady(cycles, length, requests):
    """Predicted seconds of any iteration."""
    return np.full(len(cycles), 4e-3)


def test_a_score_buffer_for_the_shortest_cycles():
    """Where the buffer is full, requests draft on or verify without scores, unlike what was predicted."""
    slots = {}
    for most in (4, 8, 12, 64):
        config = ss.SpecConfig(draft_tokens="auto", max_draft_tokens=most)
        slots[most] = capacity_for(config, drafters_of(config), 64, 4096, 2048).score_slots
    assert set(slots.values()) == {64}
    config = ss.SpecConfig(draft_tokens="auto")
    for number, rows in ((128, 128), (200, 160), (300, 160), (400, 200)):
        assert capacity_for(config, drafters_of(config), number, 4096, 2048).score_slots == rows
    fixed = ss.SpecConfig(draft_tokens=12)
    assert capacity_for(fixed, drafters_of(fixed), 64, 4096, 2048).score_slots == 24


class Changing:
    """Changes its mind at every choice, in an order that meets every change."""

    def __init__(self, cycles):
        self.order = [cycle for first in cycles for second in cycles for cycle in (first, second)]
        self.told = set()
        self.current = cycles[-1]

    def began(self):
        self.told.add("session")

    def verified(self, drafter, drafts, accepted):
        self.told.add("drafts")
        assert 0 <= accepted <= drafts

    def took(self, seconds, lengths):
        self.told.add("times")
        assert seconds > 0

    def choose(self, lengths):
        self.order.append(self.order.pop(0))
        return self.order[-1]


@pytest.mark.parametrize("drafter", ["auto", "pillar", "window", "full", "ngram"])
def test_texts_do_not_depend_on_the_changes(monkeypatch, drafter):
    toy = Toy()
    choose_every(monkeypatch, 3)
    requests = requests_of((1, 5, 23, 40, 11, 60), 120, temperature=0.9)
    settings = {"draft_tokens": "auto", "max_draft_tokens": 4, "drafter": drafter, "min_budget": 4}
    engine = toy.engine(**settings, max_requests=5)
    chooser = engine._chooser = Changing(cycles_of(engine.config))
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    names = ("ngram", "pillar") if drafter == "auto" else (drafter,)
    kinds = {("none", 0), *((name, drafts) for name in names for drafts in range(1, 5))}
    assert set(engine.stats.cycle_by_iteration) == kinds
    whole = set(engine.stats.by_cycle)
    assert whole <= kinds - {("none", 0)}
    assert drafter == "auto" or len(whole) == 4
    assert chooser.told == {"session", "drafts", "times"}
    assert engine.stats.iterations_by_cycle == Counter(engine.stats.cycle_by_iteration)
    assert engine.stats.cycles > 0


class Any:
    """Takes any of the cycles at every choice."""

    def __init__(self, cycles, seed):
        self._chance, self._cycles = random.Random(seed), cycles
        self.current = cycles[-1]

    def began(self):
        pass

    def verified(self, drafter, drafts, accepted):
        assert 0 <= accepted <= drafts

    def took(self, seconds, lengths):
        pass

    def choose(self, lengths):
        return self._chance.choice(self._cycles)


@pytest.mark.parametrize("schedule", ["grouped", "balanced"])
@pytest.mark.parametrize("seed", range(6))
def test_texts_do_not_depend_on_whether_proposals_are_judged(monkeypatch, seed, schedule):
    """In cycles that change to others with proposals, without, from the text, and to plain decoding, in their midst."""
    toy, chance = Toy(), random.Random(seed)
    choose_every(monkeypatch, chance.choice([2, 3, 5]))
    requests = requests_of((1, 5, 23, 40, 11, 60), 90, temperature=chance.choice([0.0, 0.9]))
    engine = toy.engine(
        draft_tokens="auto", max_draft_tokens=6, min_budget=4, max_requests=5, iteration_time=steady, schedule=schedule
    )
    engine._chooser = Any(cycles_of(engine.config), seed)
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    names = {name for name, _ in engine.stats.cycle_by_iteration} - {"none"}
    assert names == {"pillar", "pillar+ngram", "ngram"}


def test_another_number_of_requests_is_chosen_for_at_once():
    """The choice for the few that are left at the end of a batch is none for the many of the next one."""
    asked = []

    class Asked(Changing):
        def choose(self, lengths):
            asked.append((engine.stats.iterations, len(lengths)))
            return self.current

    # A prompt in each of the first iterations.
    engine = Toy().engine(draft_tokens="auto", max_draft_tokens=2, drafter="full", max_requests=8, prefill_chunk=9)
    engine._chooser = Asked(cycles_of(engine.config))
    run(engine, requests_of((9,) * 6, 30))
    soon = [requests for at, requests in asked if at < 17]
    assert soon[0] <= 2
    assert soon[-1] >= 6
    assert len(soon) == 2, "and not again before it is time"


def test_few_requests_that_come_and_go_leave_time_to_measure():
    """Two at a time: one more or less is no other load."""
    asked = []

    class Asked(Changing):
        def choose(self, lengths):
            asked.append(len(lengths))
            return self.current

    engine = Toy().engine(draft_tokens="auto", max_draft_tokens=2, drafter="full", max_requests=2)
    engine._chooser = Asked(cycles_of(engine.config))
    prompts = [request.prompt for request in requests_of([5] * 25, 1)]
    run(engine, [Request(prompt, 3 + 5 * (nth % 4)) for nth, prompt in enumerate(prompts)])
    assert len(asked) <= engine.stats.iterations // 16 + 1


def test_proposals_that_were_judged_tell_how_many_are_right(monkeypatch):
    """Those of draft iterations, of all requests; but not those for which a text or a cycle has no room."""
    told = []

    class Told(Changing):
        def verified(self, drafter, drafts, accepted):
            told.append((drafter.name, drafts, accepted))

        def choose(self, lengths):
            return self.current

    monkeypatch.setattr("sparsespec_compile.runtime.host.session.Foresight.look", lambda self, requests: [])
    engine = Toy().engine(draft_tokens="auto", max_draft_tokens=6, min_budget=4, max_requests=4, iteration_time=steady)
    engine._chooser = Told([c for c in cycles_of(engine.config) if (c.passes, c.proposals) == (2, 3)])
    run(engine, requests_of((9, 23, 31, 12), 90))
    judged = [(drafts, right) for name, drafts, right in told if name == "ngram"]
    assert {drafts for drafts, _ in judged} <= {1, 2, 3}
    assert all(0 <= right <= drafts for drafts, right in judged)
    made = sum(drafts for name, drafts, _ in told if name == "pillar")
    assert sum(1 + right for _, right in judged) == pytest.approx(made, rel=0.1), "but for cycles that were cut off"
    assert sum(right for _, right in judged) > 8


def test_looks_at_texts_take_little_of_the_time(monkeypatch):
    """A look takes as long as an iteration of one request on a GPU, which waits for it."""
    looks = []

    def look(self, requests):
        looks.append(len(requests))
        time.sleep(0.02)
        return []

    monkeypatch.setattr("sparsespec_compile.runtime.host.session.Foresight.look", look)
    engine = Toy().engine(draft_tokens="auto", max_draft_tokens=2, min_budget=4, max_requests=2)
    engine._chooser = Any(cycles_of(engine.config)[:1], 0)  # plain decoding: 16 iterations from choice to choice
    run(engine, requests_of((5, 9), 200))
    assert 2 <= len(looks) < 5, "of 13 choices"


def test_without_predictions_nothing_is_proposed():
    """Rows of proposals are taken for nearly free, as they are on a GPU."""
    settings = {"draft_tokens": "auto", "min_budget": 4}
    proposals = [max(c.proposals for c in cycles_of(engine.config)) for engine in (
        Toy().engine(**settings), Toy().engine(iteration_time=steady, **settings),
        Toy().engine(iteration_time=steady, draft_proposals=0, **settings),
        Toy().engine(iteration_time=steady, **{**settings, "drafter": "pillar"}),
    )]  # fmt: skip
    assert proposals == [0, 5, 0, 0]


def test_what_was_learnt_is_kept_from_call_to_call(monkeypatch):
    made = []

    def make(config, predicted):
        made.append(chooser_for(config, predicted))
        return made[-1]

    monkeypatch.setattr("sparsespec_compile.runtime.host.engine.chooser_for", make)
    engine = Toy().engine(draft_tokens="auto", max_draft_tokens=3, drafter="pillar", min_budget=4)
    engine.target = dataclasses.replace(engine.target, iteration_time=steady)
    run(engine, requests_of((30, 12), 40))
    made[0].current = cycles_of(engine.config)[1]
    run(engine, requests_of((30, 12), 12))
    assert len(made) == 1
    assert engine.stats.cycle_by_iteration[0] == ("pillar", 1)


@pytest.mark.parametrize("overlap", [True, False])
def test_times_are_heard_of_whether_the_host_waits_or_not(overlap):
    engine = Toy().engine(draft_tokens="auto", max_draft_tokens=4, drafter="full", overlap=overlap)
    chooser = engine._chooser = Changing(cycles_of(engine.config))
    run(engine, requests_of((5, 9), 40))
    assert "times" in chooser.told


def test_the_end_of_a_text_is_not_taken_for_a_wrong_draft():
    """Drafts that read everything are all right; texts of 14 tokens end in the middle of cycles of 4."""
    toy, told = Toy(), []

    class Told(Changing):
        def verified(self, drafter, drafts, accepted):
            told.append((drafts, accepted))

        def choose(self, lengths):
            return self.current

    engine = toy.engine(draft_tokens="auto", max_draft_tokens=4, drafter="full", max_requests=3)
    engine._chooser = Told(cycles_of(engine.config))
    run(engine, requests_of((5, 9, 30, 12), 14))
    assert max(drafts for drafts, _ in told) == 4
    assert all(accepted == drafts for drafts, accepted in told)


def test_drafts_after_plain_decoding_begin_with_fresh_pillars():
    """Pillars of long ago would leave drafts to read everything since: no draft before a verification renews them."""
    toy = Toy()
    engine = toy.engine(draft_tokens="auto", max_draft_tokens=3, min_budget=4)
    forward, reads = engine.target.forward, []

    def spy(*inputs):
        mode, _, rows, cached, _, _, _, _, recent = inputs[6:]
        reads.append(int(((cached + 1 - recent) * ((mode == 1) & (rows > 0))).max()))
        return forward(*inputs)

    class Late(Changing):
        def choose(self, lengths):
            self.asked = getattr(self, "asked", 0) + 1
            return cycles[0] if self.asked < 3 else cycles[3]

    cycles = cycles_of(engine.config)
    engine.target = dataclasses.replace(engine.target, forward=spy)
    engine._chooser = Late(cycles)
    requests = requests_of((30, 12), 80)
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    assert max(reads) <= 4 + 3 + 1  # verified, drafted, and the budget's local quarter


def test_auto_on_a_model():
    model = tiny("qwen3")
    input_ids, mask = left_padded(3, 20)
    expected = model.generate(input_ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens="auto", min_budget=8, ceilings=ss.H200))
    assert (fast.generate(input_ids, attention_mask=mask, max_new_tokens=60, do_sample=False) == expected).all()


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_auto_is_the_default_where_nothing_can_be_predicted(family):
    """On a CPU, and where no shape tells what a step reads."""
    model = tiny(family)
    input_ids, mask = left_padded(3, 20)
    expected = model.generate(input_ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    fast = ss.optimize(model)
    assert fast.spec_config.draft_tokens == "auto"
    assert (fast.generate(input_ids, attention_mask=mask, max_new_tokens=40, do_sample=False) == expected).all()
    kinds = list(fast.stats.cycle_by_iteration)
    assert kinds[0] == ("none", 0)
    assert {drafter for drafter, _ in kinds} <= {"none", "ngram"}, "the cache is too short for drafts by the model"


def test_drafts_are_tried_where_nothing_is_predicted_and_the_cache_is_long(monkeypatch):
    """The text stays, and what was tried is known in the next call."""
    toy = Toy()
    choose_every(monkeypatch, 8)
    engine = toy.engine(draft_tokens="auto", min_budget=4)
    requests = requests_of((40, 60), 80)
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    kinds = set(engine.stats.cycle_by_iteration)
    assert ("none", 0) in kinds
    assert any(drafts for _, drafts in kinds)


def test_stats_say_what_was_chosen():
    stats = Stats(12, tokens=90, target_passes=60, iterations=50)
    stats.iterations_by_cycle.update({("pillar", 12): 25, ("none", 0): 10, ("ngram", 3): 15})
    assert str(stats).endswith("drafts: 12 pillar 50%, 3 ngram 30%, none 20%")
    stats.iterations_by_cycle.update({("ngram", drafts): 1 for drafts in (1, 2, 4, 6)})
    assert str(stats).endswith("1 ngram 2%, 2 ngram 2%, 2 more")
    assert "drafts" not in str(Stats(8, iterations=5, iterations_by_cycle=Counter({("pillar", 8): 5})))


@pytest.mark.parametrize("error", [CostModelError, CeilingsError])
def test_auto_never_raises(monkeypatch, error):
    """A model whose cost is not known, or a device that could not be measured."""

    def refuse(*arguments):
        raise error("as it may happen")

    monkeypatch.setattr(target, "graph_cost" if error is CostModelError else "ceilings_of", refuse)
    fast = ss.optimize(tiny("qwen3", num_hidden_layers=1), ss.SpecConfig(ceilings=ss.H200))
    assert fast._engine.target.iteration_time is None
    assert fast.generate(left_padded(5)[0], max_new_tokens=4).shape == (1, 9)


def test_settings_of_auto_are_checked():
    with pytest.raises(ConfigError, match="ceilings must be"):
        ss.SpecConfig(ceilings="H200")
    for wrong in ("Auto", 1.5, None, -1):
        with pytest.raises(ConfigError, match="draft_tokens must be an integer from 0 to 64"):
            ss.SpecConfig(draft_tokens=wrong)
