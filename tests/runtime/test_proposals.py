"""Draft iterations that judge proposals as well: fewer passes for the same drafts, and the same text."""

import pytest

from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.runtime.device.inputs import Work, promise_of
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.scheduler import Scheduler

from ..support.toy import Toy, prompts, requests_of, run

SETTINGS = {"draft_tokens": 6, "min_budget": 4, "max_requests": 3}


@pytest.mark.parametrize("proposals", [1, 2, 5])
@pytest.mark.parametrize("drafter", ["pillar", "window", "full"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}], ids=["greedy", "drawn"])
def test_texts_are_those_of_plain_decoding(drafter, proposals, params):
    toy, requests = Toy(), requests_of((1, 30, 12, 7, 21), 60, **params)
    engine = toy.engine(drafter=drafter, draft_proposals=proposals, **SETTINGS)
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    assert engine.stats.cycles > 5


def ahead(toy, proposals, **params):
    """Statistics of a text that another request has in its prompt, so that proposals are right."""
    (first,) = requests_of((30,), 80, **params)
    text = toy.decode(first)
    request, other = Request(first.prompt, 60, first.params), Request([*first.prompt, *text], 1)
    engine = toy.engine(drafter="full", draft_proposals=proposals, **SETTINGS)
    assert run(engine, [request, other])[0] == text[:60]
    return engine.stats


def test_right_proposals_are_drafts_at_once():
    toy = Toy()
    without, with_two = (ahead(toy, proposals, temperature=1.0) for proposals in (0, 2))
    assert without.accepted_per_cycle == 6
    assert with_two.accepted_per_cycle == with_two.drafts_per_cycle > 5.4, "drafts that read everything are all right"
    # 6 drafts take 6 iterations without proposals, and 4 are planned with two.
    assert with_two.iterations < 0.75 * without.iterations


def test_drafts_that_were_not_made_are_not_judged():
    """Proposals are seldom right in drawn texts. Cycles then have fewer drafts, all of which are right."""
    toy, requests = Toy(), [Request(prompt, 90, params.params) for prompt, params in zip(
        prompts(20, 33), requests_of((20, 33), 90, temperature=1.0), strict=True)]  # fmt: skip
    engine = toy.engine(drafter="full", draft_proposals=2, **SETTINGS)
    run(engine, requests)
    stats = engine.stats
    (kind,) = stats.by_cycle.values()
    assert kind.drafts < 6 * kind.cycles
    assert stats.accepted_per_cycle == stats.drafts_per_cycle
    assert kind.tried == kind.drafts
    assert stats.drafts_per_cycle >= 4, "as many as there are passes"


def test_proposals_are_judged_in_iterations_of_nothing_but_drafts(monkeypatch):
    """Where others verify, rows are not free, and weights are read as they are."""
    seen, proposed = [], []
    plan = Scheduler.plan

    def planned(scheduler):
        work = plan(scheduler)
        seen.append({(item.mode, item.rows) for _, item in work})
        proposed.append({item.proposes for _, item in work})
        return work

    monkeypatch.setattr(Scheduler, "plan", planned)
    toy = Toy()
    requests = requests_of((20, 33, 7), 60)
    engine = toy.engine(drafter="full", draft_proposals=2, schedule="balanced", **{**SETTINGS, "draft_tokens": 12})
    assert run(engine, requests) == [toy.decode(request) for request in requests]
    alone = [work for work in seen if {mode for mode, _ in work} == {Mode.DRAFT}]
    mixed = [work for work in seen if {mode for mode, _ in work} > {Mode.DRAFT}]
    assert alone
    assert mixed
    assert set().union(*alone) == {(Mode.DRAFT, 3)}
    assert {rows for work in mixed for mode, rows in work if mode == Mode.DRAFT} == {1}
    judged = [work == {(Mode.DRAFT, 3)} for work in seen[3:]]  # all prompts were read by then
    assert proposed[2:-1] == [{one} for one in judged], "and searched for in the iteration before"


def test_iterations_that_judge_proposals_take_small_tiles():
    """As drafts do that read pillars, whatever their rows: kernels with large tiles as well take twice as long."""
    drafts = [Work(slot, Mode.DRAFT, 3, offset=-1, logits=3, most=6) for slot in range(4)]
    plain = Work(4, Mode.VERIFY, 1, logits=1)
    assert promise_of(drafts, reads_scores=True) is Promise.SMALL_TILES
    assert promise_of([*drafts, plain], reads_scores=True) is Promise.ONLY_VERIFICATIONS_SCORED
    assert promise_of([*drafts, plain], reads_scores=False) is Promise.NO_SCORES


def test_a_text_ends_at_its_length_in_the_midst_of_proposals():
    toy = Toy()
    for new_tokens in range(1, 20):
        requests = requests_of((9, 14), new_tokens)
        engine = toy.engine(drafter="full", draft_proposals=5, **SETTINGS)
        assert run(engine, requests) == [toy.decode(request) for request in requests]
        assert all(len(request.output) == new_tokens for request in requests)
