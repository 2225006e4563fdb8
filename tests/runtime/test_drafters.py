"""What each drafter writes into the pillar index, and a drafter of another kind in the whole engine."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.kernels.ops import Mode, propose_ngrams
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.device import drafters
from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.device.drafters import SINK_TOKENS, NgramDrafter, budgets, cycles_of, drafters_of
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.inputs import Work
from sparsespec_compile.runtime.device.state import Capacity, State
from sparsespec_compile.runtime.host.cycle_chooser import Foresight, Texts
from sparsespec_compile.runtime.host.request import Request

from ..support.choices import choose_every
from ..support.toy import Toy, requests_of, run

HEADS, TOKENS, BUDGET = 2, 64, 12


@pytest.fixture
def state():
    layout = KVLayout((AttentionLayer(0, 2, HEADS, 4, 4, 1.0, 0, 0.0),), page_size=4)
    made = State(
        layout,
        Capacity(slots=3, tokens=TOKENS, pages=16, pillars=BUDGET, score_slots=3),
        torch.float32,
        CpuDevice(),
    )
    generator = torch.Generator().manual_seed(0)
    made.scores.copy_(torch.rand(made.scores.shape, generator=generator))
    for tensor in (made.pillar_index, made.pillar_count, made.recent_start):
        tensor.fill_(77)
    return made


def apply(state, lengths, **settings):
    (drafter,) = drafters_of(SpecConfig(min_budget=BUDGET, budget_ratio=0.01, **settings))
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)
    final = torch.zeros(3, dtype=torch.int32)
    drafter.update(state, final, slots, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("local_ratio", [0.0, 0.25, 1.0])
def test_pillars_are_the_highest_scores_and_the_latest_positions(state, local_ratio):
    apply(state, [40, 5, -1], drafter="pillar", local_ratio=local_ratio)
    local = int(BUDGET * local_ratio)
    assert state.recent_start.tolist() == [40 - local, 5 - min(local, 5), 77]
    assert state.pillar_count.tolist() == [BUDGET - local, 5 - min(local, 5), 77]
    for head in range(HEADS):
        expected = state.scores[2, head, : 40 - local].topk(BUDGET - local).indices.sort().values
        assert state.pillar_index[0, head, : BUDGET - local].tolist() == expected.tolist()
    assert (state.pillar_index[2] == 77).all()


def test_window_is_the_first_and_the_latest_positions(state):
    apply(state, [40, 5, -1], drafter="window")
    expected = [*range(SINK_TOKENS), *range(40 - (BUDGET - SINK_TOKENS), 40)]
    assert state.pillar_index[0].tolist() == [expected] * HEADS
    assert state.pillar_index[1].tolist() == [[0, 1, 2, 3, 4] + [-1] * (BUDGET - 5)] * HEADS
    assert (state.pillar_index[2] == 77).all()
    assert state.pillar_count.tolist() == [BUDGET, 5, 77]
    assert state.recent_start.tolist() == [40, 5, 77]


def kinds(cycles):
    return [(cycle.name, cycle.drafts) for cycle in cycles]


def test_what_auto_chooses_among():
    cycles = cycles_of(SpecConfig(draft_tokens="auto", max_draft_tokens=3, drafter="window"))
    assert kinds(cycles) == [("none", 0), ("window", 1), ("window", 2), ("window", 3)]
    both = kinds(cycles_of(SpecConfig(draft_tokens="auto", max_draft_tokens=5)))
    assert both == [
        ("none", 0),
        *(("ngram", drafts) for drafts in (1, 2, 3, 4, 5)),
        *(("pillar+ngram", drafts) for drafts in (2, 3, 5, 5)),  # what 1 to 4 passes are expected to make
        ("pillar+ngram", 4),  # in 3 passes, where few proposals are right
        *(("pillar+ngram", drafts) for drafts in (2, 4, 5, 5) * 2),
        *(("pillar+ngram", drafts) for drafts in (3, 5, 5, 5)),
        *(("pillar", drafts) for drafts in (1, 2, 3, 4, 5)),
    ]
    alone = SpecConfig(draft_tokens="auto", max_draft_tokens=5, draft_proposals=0)
    assert kinds(cycles_of(alone)) == [kind for kind in both if kind[0] != "pillar+ngram"]
    (judged,) = cycles_of(SpecConfig(draft_tokens=12, draft_proposals=2))
    assert (judged.drafts, judged.passes, judged.pass_rows) == (12, 7, 3)
    ngrams = kinds(cycles_of(SpecConfig(draft_tokens="auto", drafter="ngram")))
    assert ngrams == [("none", 0), *(("ngram", drafts) for drafts in (1, 2, 3, 4, 6, 8, 12, 15))]
    assert kinds(cycles_of(SpecConfig(draft_tokens=5))) == [("pillar", 5)]
    assert kinds(cycles_of(SpecConfig(draft_tokens=0))) == [("none", 0)]
    assert drafters_of(SpecConfig(draft_tokens=0)) == ()


def test_budgets_on_the_device_are_the_configs():
    lengths = torch.arange(0, 140_000, 7, dtype=torch.int32)
    for ratio in (0.05, 0.1, 0.33):
        config = SpecConfig(budget_ratio=ratio)
        assert budgets(lengths, config).tolist() == [config.budget(length) for length in lengths.tolist()]


@pytest.mark.parametrize("overlap", [True, False])
def test_drafts_from_the_text_itself(overlap):
    """Every iteration verifies; nothing but the drafter knows of it."""
    toy = Toy()
    requests = requests_of((1, 23, 40, 5), 100)
    engine = toy.engine(draft_tokens=4, drafter="ngram", max_requests=3, overlap=overlap)
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    assert set(engine.stats.by_cycle) == {("ngram", 4)}
    assert engine.stats.tokens > 1.2 * engine.stats.target_passes


def test_drafts_are_looked_up_in_the_prompt_too():
    """A text that repeats its prompt is drafted from the first pass on."""
    toy = Toy()
    (first,) = requests_of((6,), 60)
    text = toy.decode(first)
    again = Request([*first.prompt, *text, *first.prompt], 40)
    engine = toy.engine(draft_tokens=6, drafter="ngram")
    assert run(engine, [again]) == [toy.decode(Request(again.prompt, 40))]
    assert engine.stats.target_passes < engine.stats.tokens


def test_only_texts_that_have_grown_are_looked_up(state):
    """A slot that drafted nothing in the iteration, or holds no text, keeps its tokens."""
    (drafter,) = drafters_of(SpecConfig(drafter="ngram", draft_tokens=3))
    state.tokens[:] = torch.tensor([4, 5, 6, 4, 5, 6, 4] + [0] * (TOKENS - 7))
    state.length.fill_(6)
    drafter.update(state, torch.tensor([1, 0, 2], dtype=torch.int32), state.length, state.length)
    assert state.tokens[:, 6:11].tolist() == [[4, 5, 6, 4, 0], [4, 0, 0, 0, 0], [4, 5, 6, 4, 0], [4, 0, 0, 0, 0]]


def test_prompts_stand_among_the_tokens():
    """Where drafters find them, each token at its position, whichever chunk it came with."""
    step = Toy().engine(draft_tokens=2).capture(2, 64)
    prompt = [5, 9, 30, 2, 7]
    step.begin(1, 20)
    step.fill([Work(1, Mode.PREFILL, rows=3, tokens=prompt[:3])])
    step.replay()
    step.fill([Work(1, Mode.PREFILL, rows=2, offset=3, tokens=prompt[3:], logits=1)])
    count, first, *_ = step.replay().tokens[1].tolist()
    assert count == 1
    assert step.state.tokens[1, :6].tolist() == [*prompt, first]


class Order:
    """Stands where the chooser does: takes cycles in a given order, and notes what it is told."""

    def __init__(self, order):
        self.order, self.current, self.told = list(order), order[0], {}

    def began(self):
        pass

    def verified(self, drafter, drafts, accepted):
        self.told.setdefault(drafter.name, []).append((drafts, accepted))

    def took(self, seconds, lengths):
        pass

    def choose(self, lengths):
        self.order.append(self.order.pop(0))
        return self.order[0]


def in_order(monkeypatch, order, requests, every=3, **settings):
    """An engine that ran requests in cycles of this order, what it told, and how many rows were verified by kind."""
    choose_every(monkeypatch, every)
    toy = Toy()
    engine = toy.engine(draft_tokens="auto", max_draft_tokens=4, min_budget=4, max_requests=3, **settings)
    engine._chooser = Order(order(cycles_of(engine.config)))
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    return engine, engine._chooser.told


def test_drafts_are_counted_for_who_made_them(monkeypatch):
    """Whatever cycle verifies them; what stands behind the newest token before the first lookup is nobody's.

    Drafts that read everything are all right, in cycles that change in the midst of them; those from the text are not.
    """

    def order(cycles):
        cycles = [cycle for cycle in cycles if cycle.drafts in (0, 2, 4)]
        return [cycle for first in cycles for second in cycles for cycle in (first, second)]

    monkeypatch.setattr(drafters, "_AUTO", ("full", "ngram"))
    _, told = in_order(monkeypatch, order, requests_of((1, 5, 23, 40, 11), 150))
    assert all(drafts == accepted for drafts, accepted in told["full"])
    assert max(drafts for drafts, _ in told["full"]) == 4
    assert any(drafts > accepted for drafts, accepted in told["ngram"])


def test_texts_that_have_ended_are_searched_until_they_are_forgotten():
    """A request writes what an earlier one wrote, which stands in another slot."""
    toy, (request, longer) = Toy(), requests_of((30, 9), 60, temperature=1.0)
    engine = toy.engine(draft_tokens=4, drafter="ngram", max_requests=3)

    def again():
        """Iterations of the request, after one in which another outlives it and keeps the first slot from it."""
        assert run(engine, [Request(request.prompt, 60, request.params)]) == [toy.decode(request)]
        return engine.stats.iterations

    def beside_another():
        run(engine, [Request(longer.prompt, 90, longer.params), Request(request.prompt, 60, request.params)])

    alone = again()
    beside_another()
    assert again() < 0.6 * alone
    beside_another()
    engine.forget_texts()
    assert again() == alone


def test_the_first_verification_after_plain_decoding_tells_nothing_of_drafts_from_the_text(monkeypatch):
    """Nothing was looked up before it."""
    monkeypatch.setattr(Foresight, "look", lambda foresight, requests: iter(()))
    requests = requests_of((20, 30), 60)

    engine, told = in_order(monkeypatch, lambda cycles: [cycles[0], cycles[4]], requests, every=6)
    planned = list(engine.stats.cycle_by_iteration)
    switches = sum(pair == (("none", 0), ("ngram", 4)) for pair in pairwise(planned))
    assert switches > 1
    # Two requests verify in an iteration at most; of the first one after a change neither tells anything.
    assert 0 < len(told["ngram"]) <= 2 * (planned.count(("ngram", 4)) - switches)


def test_nobody_scores_while_drafts_come_from_the_text(monkeypatch):
    """One verification renews the pillars when the model drafts again; proposals are looked up only in between."""
    promised, looked_up = [], []
    step, lookup = StepRunner.__call__, NgramDrafter.update

    def note(runner, rows, logits, variant, *functions):
        promised.append(variant.promise)
        step(runner, rows, logits, variant, *functions)

    def look_up(drafter, *given):
        looked_up.append(len(promised) - 1)
        lookup(drafter, *given)

    monkeypatch.setattr(StepRunner, "__call__", note)
    monkeypatch.setattr(NgramDrafter, "update", look_up)

    requests = requests_of((20, 30), 80)
    engine, _ = in_order(monkeypatch, lambda cycles: [cycles[-1], cycles[2]], requests, every=12)
    kinds = [name for name, _ in engine.stats.cycle_by_iteration]
    scored, unscored = Promise.ONLY_VERIFICATIONS_SCORED, Promise.NO_SCORES
    assert {promise for promise, kind in zip(promised, kinds, strict=True) if kind == "ngram"} == {unscored}
    assert unscored not in {promise for promise, kind in zip(promised, kinds, strict=True) if kind == "pillar"}
    assert set(looked_up) == {at for at, promise in enumerate(promised) if promise in (unscored, Promise.NOTHING)}
    changes = [at for at, pair in enumerate(pairwise(kinds), 1) if pair == ("ngram", "pillar")]
    assert changes
    assert all(promised[at] is scored for at in changes), "pillars are renewed at once"


def test_a_text_is_drafted_from_another_that_has_it():
    """The second prompt is the first one with the beginning of its text, which is drawn, so that it repeats little."""
    toy = Toy()
    (first,) = requests_of((30,), 60, temperature=1.0)
    text = toy.decode(first)
    accepted = []
    for slots in (1, 2):  # in one slot the second text replaces the first
        request, other = Request(first.prompt, 40, first.params), Request([*first.prompt, *text], 1)
        engine = toy.engine(draft_tokens=4, drafter="ngram", max_requests=slots)
        assert run(engine, [request, other])[0] == text[:40]
        accepted.append(request.stats.accepted)
    assert accepted[1] >= 28, "of 32"
    assert accepted[0] < 20


def test_what_drafts_from_the_text_would_achieve_is_what_they_achieve():
    """Looked up on the host in whole texts, and on the device as they are written."""
    toy, requests = Toy(), requests_of((7, 30), 200)
    run(toy.engine(draft_tokens=4, drafter="ngram", max_requests=1), requests)  # whose next text replaces the last
    for request in requests:
        text, at, cycles = np.array([*request.prompt, *request.output]), len(request.prompt), []
        while at + 4 < len(text) - 1:
            cycles.append(Texts([text]).right_ngrams(0, at, 4))
            at += cycles[-1] + 1
        assert sum(cycles) == pytest.approx(request.stats.accepted, abs=4)
        assert len(cycles) == pytest.approx(request.stats.cycles, abs=1)
    assert sum(request.stats.accepted for request in requests) > 20


@pytest.mark.parametrize("vocabulary", [2, 5, 40])
def test_the_host_looks_up_what_the_device_does(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    lengths, drafts = (40, 1, 33, 64, 12), 3
    tokens = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=generator)
    tokens[3, 10:50] = tokens[0, :40]
    tokens[3, [14, 21, 22, 30, 37, 44]] = vocabulary  # lines that differ in single tokens
    tokens[4] = vocabulary + 1  # of which nothing is known at the first token: it repeats
    texts = Texts([row[:count].numpy() for row, count in zip(tokens, lengths, strict=True)])
    right = []
    for own, count in enumerate(lengths):
        for newest in range(count - drafts):
            known, wanted = torch.tensor(lengths, dtype=torch.int32) - 1, torch.zeros(len(lengths), dtype=torch.int32)
            known[own], wanted[own] = newest, drafts
            proposed = tokens.clone()
            proposed[own, newest + 1 :] = -1
            propose_ngrams(proposed, known, wanted, drafts)
            ahead = slice(newest + 1, newest + 1 + drafts)
            expected = int((proposed[own, ahead] == tokens[own, ahead]).int().cumprod(0).sum())
            assert texts.right_ngrams(own, newest, drafts) == expected
            right.append(expected)
        again = [texts.right_ngrams(own, newest, drafts) for newest in reversed(range(count - drafts))]
        assert again == right[: -len(again) - 1 : -1]
    assert {0, drafts} <= set(right)


def test_foresight_looks_at_each_new_token_once_and_searches_the_prompt_and_other_texts():
    request = Request([1, 2, 3, 4, 5], 100)
    foresight = Foresight(4)
    request.output = [1, 2, 3, 4, 5, 1]  # behind the first token, of which nothing was known
    assert list(foresight.look([request])) == [(4, 4)]
    assert list(foresight.look([request])) == []
    request.output += [2, 3, 9, 9]
    assert list(foresight.look([request])) == [(4, 2), (1, 0)]
    other = Request([1], 100, output=[1] * 50)
    seen = [list(foresight.look([request, other])) for _ in range(2)]
    assert sorted(map(len, seen)) == [0, 5], "requests take turns; of a long text the end counts"
    other.output += [7, 2, 3, 9]
    request.output += [8]
    seen = [list(foresight.look([request, other])) for _ in range(2)]
    assert [(4, 0), (3, 0), (2, 2)] in seen, "what the first text goes on with after 2"
