"""What each policy writes into the pillar index."""

import pytest
import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.drafters import SINK_TOKENS, budgets, choose_policy
from sparsespec_compile.runtime.state import Capacity, State

HEADS, TOKENS, BUDGET = 2, 64, 12


@pytest.fixture
def state():
    layout = KVLayout((AttentionLayer(0, 2, HEADS, 4, 4, 1.0, 0, 0.0),), page_size=4)
    made = State(
        layout,
        Capacity(slots=3, tokens=TOKENS, pages=16, pillars=BUDGET, score_slots=3),
        torch.float32,
        torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    made.scores.copy_(torch.rand(made.scores.shape, generator=generator))
    for tensor in (made.pillar_index, made.pillar_count, made.recent_start):
        tensor.fill_(77)
    return made


def apply(state, lengths, **settings):
    policy = choose_policy(SpecConfig(min_budget=BUDGET, budget_ratio=0.01, **settings))
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)
    policy.renew(state, slots, torch.tensor(lengths, dtype=torch.int32))


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


def test_full_and_plain_need_no_policy():
    assert choose_policy(SpecConfig(drafter="full")) is None
    assert choose_policy(SpecConfig(draft_tokens=0)) is None


def test_budgets_on_the_device_are_the_configs():
    lengths = torch.arange(0, 140_000, 7, dtype=torch.int32)
    for ratio in (0.05, 0.1, 0.33):
        config = SpecConfig(budget_ratio=ratio)
        assert budgets(lengths, config).tolist() == [config.budget(length) for length in lengths.tolist()]
