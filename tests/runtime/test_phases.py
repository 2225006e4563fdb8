"""Which request verifies when: even bytes, even after requests leave, and the schedules it is compared with."""

import random
import statistics
from collections import Counter

import pytest

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.runtime.device.drafters import Cycle, PillarDrafter
from sparsespec_compile.runtime.host.phases import GROUPED_ROWS, Phases, most_together, phases_in_use
from sparsespec_compile.runtime.host.request import Request

from ..support.toy import Toy, requests_of, run, stepping


def cycle_of(drafts, passes=None):
    return Cycle(PillarDrafter(SpecConfig()), drafts, drafts if passes is None else passes)


def resident(length, phase=None):
    request = Request([0] * length, 100)
    request.prefilled, request.phase = length, phase
    return request


def joined(phases, lengths):
    """Requests that came one by one, of which one may move each time."""
    requests = []
    for now, length in enumerate(lengths):
        newcomer = resident(length)
        newcomer.phase = phases.choose(requests, now)
        requests.append(newcomer)
        phases.rebalance(requests)
    return requests


def settle(phases, requests):
    """Let requests move until nothing does; they must not go on for ever."""
    for _ in range(2 * len(requests)):
        if not phases.rebalance(requests):
            return
    pytest.fail("requests still move")


def sizes(phases, requests):
    """Requests of each phase."""
    return [sum(request.phase == phase for request in requests) for phase in range(phases.count)]


def test_a_new_request_joins_the_phase_that_reads_least():
    phases = Phases(cycle_of(2), "balanced", most=8)
    others = [resident(100, 0), resident(10, 1), resident(10, 1), resident(40, 2)]
    assert phases.choose(others, now=0) == 1


def test_among_equals_the_longest_first_cycle_is_chosen():
    phases = Phases(cycle_of(3), "balanced", most=8)
    assert phases.choose([], now=2) == 2  # verifies again only after a whole round
    assert phases.choose([resident(5, 2)], now=2) == 1


def test_a_full_phase_is_left_alone():
    phases = Phases(cycle_of(1), "balanced", most=2)
    others = [resident(1, 0), resident(1, 0), resident(1000, 1)]
    assert phases.choose(others, now=0) == 1


def test_a_request_moves_when_others_have_left():
    phases = Phases(cycle_of(2), "balanced", most=8)
    left_over = [resident(50, 0), resident(60, 0), resident(40, 0), resident(10, 1), resident(50, 2)]
    assert phases.rebalance(left_over)
    assert [request.phase for request in left_over] == [0, 1, 0, 1, 2]


def test_nothing_moves_for_a_small_gain():
    phases = Phases(cycle_of(1), "balanced", most=8)
    balanced = [resident(100, 0), resident(5, 0), resident(98, 1)]
    assert not phases.rebalance(balanced)
    assert [request.phase for request in balanced] == [0, 0, 1]


def test_nothing_moves_into_a_full_phase():
    phases = Phases(cycle_of(1), "balanced", most=2)
    uneven = [resident(100, 0), resident(100, 0), resident(1, 1), resident(1, 1)]
    assert not phases.rebalance(uneven)
    assert [request.phase for request in uneven] == [0, 0, 1, 1]


def test_a_new_number_of_drafts_spreads_the_longest_requests_first():
    requests = [resident(length, 0) for length in (10, 20, 30, 60)]
    Phases(cycle_of(3), "balanced", most=8).spread(cycle_of(1), requests, now=0)
    loads = [sum(r.reach for r in requests if r.phase == phase) for phase in range(2)]
    assert loads == [60, 60]


@pytest.mark.parametrize("number", [1, 3, 27])
@pytest.mark.parametrize(("former", "drafts"), [(8, 7), (8, 5), (4, 8), (8, 8)])
def test_a_new_number_of_drafts_leaves_most_cycles_whole(number, former, drafts):
    """Requests in the middle of cycles: as many drafts follow as the former or the new number leaves."""
    requests = [resident(100, 0) for _ in range(number)]
    for place, request in enumerate(requests):
        request.passes = place % (former + 1)
    phases = Phases(cycle_of(former), "balanced", most=8)
    phases.spread(cycle_of(drafts), requests, now=40)
    ends = [request.passes + (request.phase - phases.at(40)) % (drafts + 1) for request in requests]
    counts = [sum(request.phase == phase for request in requests) for phase in range(drafts + 1)]
    whole = [min(former, drafts) <= end <= max(former, drafts) for end in ends]
    assert sum(whole) >= 0.6 * number
    assert max(counts) <= -(-number // (drafts + 1)) + 1


@pytest.mark.parametrize("drafts", [1, 4, 8, 12])
@pytest.mark.parametrize("requests", [1, 7, 20, 64, 130, 255, 256, 1000])
def test_groups_are_as_large_as_rows_allow(requests, drafts):
    def rows(phases):
        return requests + drafts * -(-requests // phases)

    phases = phases_in_use("grouped", cycle_of(drafts), requests)
    assert 1 <= phases <= drafts + 1
    assert rows(phases) <= GROUPED_ROWS or phases == drafts + 1
    assert phases == 1 or rows(phases - 1) > GROUPED_ROWS
    assert -(-requests // phases) <= most_together("grouped", cycle_of(drafts), requests)


def test_groups_are_as_large_as_the_rows_of_all_drafts_allow():
    """With proposals a cycle has fewer iterations than drafts, and verifies as many drafts as others."""
    assert phases_in_use("grouped", cycle_of(12, passes=7), 64) == phases_in_use("grouped", cycle_of(12), 64) == 4
    assert phases_in_use("grouped", cycle_of(12, passes=2), 64) == 3, "of which there are no more"


def test_requests_join_the_phases_in_use_and_leave_others():
    phases = Phases(cycle_of(12), "grouped", most=32)
    requests = joined(phases, [100] * 64)
    settle(phases, requests)
    assert sizes(phases, requests) == [16] * 4 + [0] * 9
    while len(requests) > 6:
        del requests[0]
        phases.rebalance(requests)
    assert {r.phase for r in requests} == {0}


@pytest.mark.parametrize(("number", "drafts"), [(24, 15), (48, 12), (64, 12), (64, 15), (100, 15), (128, 8)])
def test_groups_of_equal_requests_that_came_one_by_one_become_even(number, drafts):
    """Phases are filled one after the other as rows allow: of 64 with 12 drafts the fourth holds 2."""
    phases = Phases(cycle_of(drafts), "grouped", most=number)
    requests = joined(phases, [100] * number)
    settle(phases, requests)
    used = phases_in_use("grouped", cycle_of(drafts), number)
    counts = sizes(phases, requests)
    assert sum(counts[:used]) == number
    assert max(counts) - min(counts[:used]) <= 1


@pytest.mark.parametrize("schedule", ["grouped", "balanced"])
@pytest.mark.parametrize("seed", range(40))
def test_moves_come_to_an_end(schedule, seed):
    """From any phases, whatever the lengths, in hardly more moves than there are requests."""
    chance = random.Random(seed)
    drafts, number = chance.choice([1, 3, 8, 12, 15, 64]), chance.choice([2, 5, 16, 64, 130])
    cycle = cycle_of(drafts)
    phases = Phases(cycle, schedule, most=chance.choice([number, most_together(schedule, cycle, number), 8]))
    length = chance.choice(
        [
            lambda: 100,
            lambda: chance.randint(1, 3000),
            lambda: min(int(chance.paretovariate(0.6)), 30_000),
            lambda: chance.choice([1, 1, 1, 2000]),
        ]
    )
    settle(phases, [resident(length(), chance.randrange(drafts + 1)) for _ in range(number)])


@pytest.mark.parametrize("drafts", [4, 8, 12])
@pytest.mark.parametrize("number", [24, 64, 128])
def test_unequal_requests_do_not_exceed_the_rows(number, drafts):
    """Phases are balanced by bytes, and many short requests have as many as a long one."""
    phases = Phases(cycle_of(drafts), "grouped", most=number)
    requests = joined(phases, [100 if nth % 8 else 3000 for nth in range(number)])
    for _ in range(2):
        counts = sizes(phases, requests)
        assert sum(count > 0 for count in counts) == phases_in_use("grouped", cycle_of(drafts), number)
        assert number + drafts * max(counts) <= GROUPED_ROWS + drafts
        settle(phases, requests)


def test_a_full_phase_does_not_keep_left_over_requests_from_moving():
    requests = [resident(10, 0) for _ in range(10)] + [resident(9000, 1), resident(10, 2)]
    ten_together = cycle_of((GROUPED_ROWS - len(requests)) // 10)
    phases = Phases(ten_together, "grouped", most=10)
    assert phases_in_use("grouped", ten_together, len(requests)) == 2
    phases.rebalance(requests)
    assert requests[-1].phase == 1


def test_one_request_off_the_beat_does_not_cut_the_others_cycles():
    requests = [resident(100, 0) for _ in range(64)]
    used = phases_in_use("grouped", cycle_of(11), 64)
    for place, request in enumerate(requests):
        request.passes = 4 + place % used
    requests[-1].passes = 11
    phases = Phases(cycle_of(12), "grouped", most=32)
    phases.spread(cycle_of(11), requests, now=40)
    assert all(request.phase < used for request in requests)
    ends = [request.passes + (request.phase - phases.at(40)) % 12 for request in requests[:-1]]
    assert sum(11 <= end <= 12 for end in ends) >= 60


def test_a_phase_that_is_not_in_use_is_better_than_a_full_one():
    phases = Phases(cycle_of(8), "grouped", most=2)
    assert phases.choose([resident(10, 0), resident(10, 0)], now=0) == 8


def test_a_new_number_of_drafts_begins_with_the_first_group_to_finish():
    requests = [resident(100, 0) for _ in range(64)]
    phases = Phases(cycle_of(12), "grouped", most=32)
    for place, request in enumerate(requests):
        request.passes = 5 + place % 4
    phases.spread(cycle_of(11), requests, now=40)
    assert phases.at(44) == 0  # the eighth draft is read in iteration 40, the twelfth in 44
    ends = [request.passes + (request.phase - phases.at(40)) % 12 for request in requests]
    assert sum(11 <= end <= 12 for end in ends) >= 48


@pytest.mark.parametrize(("drafts", "number"), [(1, 5), (3, 64), (8, 64), (12, 64), (12, 3)])
def test_after_plain_decoding_cycles_are_as_whole_as_can_be(drafts, number):
    """All verify in iteration 40, for their first pillars; the last group has a whole cycle until it verifies again."""
    requests = [resident(100, 0) for _ in range(number)]
    phases = Phases(cycle_of(0), "grouped", most=64)
    phases.spread(cycle_of(drafts), requests, now=40)
    used = phases_in_use("grouped", cycle_of(drafts), number)
    first = {request: next(at for at in range(41, 60) if phases.at(at) == request.phase) for request in requests}
    assert max(first.values()) == 40 + drafts + 1
    assert min(first.values()) == 40 + drafts + 2 - used


def test_schedules_for_comparison():
    assert Phases(cycle_of(8), "in_phase", most=8).choose([], now=3) == 0
    drawn = {Phases(cycle_of(8), "random", most=64).choose([], now=3) for _ in range(3)}
    assert len(drawn) == 1  # the same requests get the same phases every time
    phases = Phases(cycle_of(8), "random", most=64)
    assert len({phases.choose([], now=3) for _ in range(60)}) == 9


@pytest.fixture(scope="module")
def spread():
    """Standard deviation of bytes read by an iteration, over the mean, for each schedule; and the texts."""
    toy, result = Toy(), {}
    for schedule in ("grouped", "balanced", "random", "in_phase"):
        engine = toy.engine(draft_tokens=3, min_budget=4, schedule=schedule, max_requests=16)
        texts = run(engine, requests_of([100, 10, 60, 5, 90, 20, 80, 30] * 2, 60))
        steady = list(engine.stats.kv_read_by_iteration)[8:60]
        result[schedule] = (statistics.pstdev(steady) / statistics.mean(steady), texts)
    return result


def test_balanced_iterations_read_evenly(spread):
    assert spread["balanced"][0] < 0.2
    assert spread["random"][0] > 1.5 * spread["balanced"][0]
    assert spread["in_phase"][0] > 5 * spread["balanced"][0]


def test_moves_change_neither_texts_nor_counts():
    """64 requests whose prompts end eight at a time: groups are uneven at first, and even soon after."""
    toy, length, new_tokens = Toy(), 60, 40
    engine = toy.engine(draft_tokens=12, min_budget=4, max_requests=64, prefill_chunk=8 * length)
    requests = requests_of([length] * 64, new_tokens)
    with stepping(engine, requests) as session:
        while any(request.phase is None for request in requests):
            session.advance()
        counts = Counter(request.phase for request in requests)
        for _ in range(20):
            session.advance()
        assert len(session._scheduler.running) == 64
        evened = Counter(request.phase for request in requests)
        while session.busy:
            session.advance()
    assert max(counts.values()) - min(counts.values()) > 10
    assert max(evened.values()) - min(evened.values()) <= 4, "texts have grown at different speeds"
    plain = run(toy.engine(draft_tokens=0, max_requests=64), requests_of([length] * 64, new_tokens))
    assert [request.output for request in requests] == plain
    stats = engine.stats
    assert stats.tokens == sum(stats.tokens_by_iteration) == 64 * new_tokens
    assert stats.cycles == sum(request.stats.cycles for request in requests)
    assert stats.target_passes == sum(request.stats.target_passes for request in requests)
    assert (stats.drafts_per_cycle, stats.pages_held) == (12, 0)


def test_schedules_do_not_change_texts(spread):
    assert spread["grouped"][1] == spread["balanced"][1] == spread["random"][1] == spread["in_phase"][1]
