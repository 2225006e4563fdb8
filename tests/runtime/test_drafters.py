"""What each drafter writes into the pillar index, and a drafter of another kind in the whole engine."""

import pytest
import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.device import drafters
from sparsespec_compile.runtime.device.cpu import CpuDevice
from sparsespec_compile.runtime.device.drafters import SINK_TOKENS, Cycle, NgramDrafter, budgets, cycles_of, drafters_of
from sparsespec_compile.runtime.device.state import Capacity, State
from sparsespec_compile.runtime.device.work import Work
from sparsespec_compile.runtime.host.request import Request

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
    return [(cycle.drafter.name, cycle.drafts) for cycle in cycles]


def test_what_auto_chooses_among():
    cycles = cycles_of(SpecConfig(draft_tokens="auto", max_draft_tokens=3, drafter="window"))
    assert kinds(cycles) == [("none", 0), ("window", 1), ("window", 2), ("window", 3)]
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


def test_the_text_stays_while_drafters_change(monkeypatch):
    """From plain decoding to drafts by sparse attention to drafts from the text, in every order."""
    toy, config = Toy(), SpecConfig(draft_tokens="auto", max_draft_tokens=4, min_budget=4, max_requests=3)
    pillar = cycles_of(config)
    cycles = [*pillar[::2], *(Cycle(NgramDrafter(config), drafts) for drafts in (1, 4))]
    monkeypatch.setattr(drafters, "cycles_of", lambda config: cycles)
    monkeypatch.setattr("sparsespec_compile.runtime.host.session._CHOICE_EVERY", 3)

    order = [cycle for first in cycles for second in cycles for cycle in (first, second)]

    class Changing:
        current = pillar[-1]

        def began(self):
            pass

        def verified(self, cycle, drafts, accepted):
            assert cycle in cycles

        def took(self, seconds, lengths):
            pass

        def choose(self, lengths):
            order.append(order.pop(0))
            return order[-1]

    requests = requests_of((1, 5, 23, 40, 11), 90, temperature=0.9)
    engine = toy.engine(draft_tokens="auto", max_draft_tokens=4, min_budget=4, max_requests=3)
    engine._chooser = Changing()
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    assert set(engine.stats.cycle_by_iteration) == set(kinds(cycles))
