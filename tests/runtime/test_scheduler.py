"""What each request does in an iteration, asked of the scheduler alone: nothing runs, what is accepted is made up."""

import random
from collections import Counter

import pytest
import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.host.host_tier import HostTier
from sparsespec_compile.runtime.host.kv_cache import KVCacheManager
from sparsespec_compile.runtime.host.phases import Phases
from sparsespec_compile.runtime.host.request import Request
from sparsespec_compile.runtime.host.scheduler import Limits, Scheduler

DRAFTS, SCORED = 3, 2
CYCLES = cycles_of(SpecConfig(draft_tokens="auto", drafter="pillar"))


def scheduler(prefill_chunk=64, updates=100, slots=8, drafts=DRAFTS, schedule="balanced", scored=SCORED, pages=500):
    """At most two requests are scored in an iteration; the pool has room for all, and there is no host tier."""
    layout = KVLayout((AttentionLayer(0, 1, 1, 1, 1, 1.0, 0, 0.0),), page_size=1)
    tier = HostTier(CpuDevice().stream(), torch.zeros(pages, 1), 0)
    kv_cache = KVCacheManager(
        layout, pages, tier, updates=updates, cycle_tokens=drafts + 1, prefill_chunk=prefill_chunk
    )
    limits = Limits(slots=slots, cycle=CYCLES[drafts], prefill_chunk=prefill_chunk, scored=scored)
    return Scheduler(limits, kv_cache, Phases(limits.cycle, schedule, scored))


def roomy(drafts, schedule, prefill_chunk=64):
    """For 64 requests of up to a few hundred tokens."""
    settings = {"slots": 64, "scored": 64, "pages": 64 * 400, "updates": 64 * 400}
    return scheduler(prefill_chunk, drafts=drafts, schedule=schedule, **settings)


def admitted(made, *lengths):
    """Prompts of these lengths, no two alike."""
    known = len(made.running)
    made.waiting.extend(Request([known + nth] * length, 40) for nth, length in enumerate(lengths))
    return made.admit()


def decoding(made, drafted, phase):
    """Requests past their prompts, with so many drafts each, all due in iterations of `phase`."""
    requests = admitted(made, *[5] * len(drafted))
    for _ in requests:  # at least one prompt an iteration
        made.plan()
    for request, drafts in zip(requests, drafted, strict=True):
        request.output, request.unread, request.phase = [1], 0, phase
        request.passes = request.drafted = drafts
    return requests


def due_now(made, drafted):
    requests = decoding(made, drafted, phase=None)
    for request in requests:
        request.phase = made.iteration % (DRAFTS + 1)
    return requests


def planned(made):
    return dict(made.plan())


def test_prompts_end_though_verifications_could_fill_the_score_buffer():
    made = scheduler(slots=9)
    requests = decoding(made, drafted=[0] * 8, phase=None)
    for place, request in enumerate(requests):
        request.phase = place // 2
    (newcomer,) = admitted(made, 5)
    scored = []
    for _ in range(5):
        work = planned(made)
        scored.append(sum(item.scored > 0 for item in work.values()))
        for request in work:
            request.output, request.unread = [1], 0
    assert not newcomer.prefilling
    assert max(scored) <= SCORED


def test_no_more_are_scored_than_the_buffer_holds_and_the_others_keep_their_pillars():
    made = scheduler()
    requests = due_now(made, drafted=[DRAFTS] * 4)
    work = planned(made)
    assert [work[request].mode for request in requests] == [Mode.VERIFY] * 4
    assert [work[request].scored for request in requests] == [DRAFTS + 1] * SCORED + [0, 0]
    assert [item.mode for item in planned(made).values()] == [Mode.DRAFT] * 4, "old pillars serve for one cycle more"


def test_a_short_cycle_goes_on_while_the_score_buffer_is_full():
    made = scheduler()
    first, second, short = due_now(made, drafted=[DRAFTS, DRAFTS, 1])
    work = planned(made)
    assert (work[first].mode, work[second].mode, work[short].mode) == (Mode.VERIFY, Mode.VERIFY, Mode.DRAFT)
    made.cancel(first)
    made.cancel(second)
    assert planned(made)[short].mode == Mode.DRAFT
    assert planned(made)[short].mode == Mode.VERIFY, "its drafts are complete"


def test_prompts_that_would_be_scored_wait_while_the_score_buffer_is_full():
    made = scheduler()
    admitted(made, 5, 6, 7)
    assert [(item.slot, item.scored) for item in planned(made).values()] == [(0, DRAFTS + 1), (1, DRAFTS + 1)]
    assert [item.mode for item in planned(made).values()][-1] == Mode.PREFILL


def test_a_chunk_is_shared_by_all_prompts():
    made = scheduler(prefill_chunk=10)
    requests = admitted(made, 7, 30)
    assert [item.rows for item in planned(made).values()] == [7, 3]
    assert [request.prefilled for request in requests] == [7, 3]


def test_another_number_of_drafts_spreads_the_requests_over_its_phases():
    made = scheduler()
    requests = decoding(made, drafted=[0] * 4, phase=0)
    made.set_cycle(CYCLES[1])
    assert sorted(request.phase for request in requests) == [0, 0, 1, 1]
    made.iteration = 0
    assert [item.mode for item in planned(made).values()].count(Mode.VERIFY) == 2


def test_fewer_drafts_do_not_make_every_request_verify_at_once():
    """Two at each place of a cycle of three drafts: those with two drafts finish it, though two are a whole one now."""
    made = scheduler()
    requests = decoding(made, drafted=[0, 1, 2, 3] * 2, phase=None)
    for request in requests:
        request.phase = (made.iteration + DRAFTS - request.drafted) % (DRAFTS + 1)
    made.set_cycle(CYCLES[DRAFTS - 1])
    assert [item.mode for item in planned(made).values()].count(Mode.VERIFY) <= 2


def test_only_the_verification_of_as_many_drafts_as_a_cycle_has_is_a_whole_cycle():
    made = scheduler()
    short, whole = due_now(made, drafted=[1, DRAFTS])
    work = planned(made)
    assert (work[short].whole_cycle, work[whole].whole_cycle) == (False, True)


def test_a_request_whose_page_table_is_not_up_to_date_sits_out():
    """Eleven pages to enter, four entries an iteration: three iterations, and the prompt is sent in the third."""
    made = scheduler(updates=4)
    (request,) = admitted(made, 11)
    sent = []
    for _ in range(3):
        sent.append([item.rows for item in planned(made).values()])
        assert len(made.kv_cache.updates) <= 4
    assert sent == [[], [], [11]]
    assert [update.page for update in made.kv_cache.updates] == [8, 9, 10]
    assert request.prefilled == 11


def test_when_a_request_leaves_another_takes_its_phase():
    made = scheduler()
    requests = decoding(made, drafted=[0] * 3, phase=0)
    requests[2].phase = 1
    made.release(requests[2])
    made.plan()
    assert [request.phase for request in requests[:2]] == [1, 0]


def answered(made, accepted=lambda drafts: 0):
    """One iteration, and what came of it: each verification adds the drafts that were right, and one token."""
    work = made.plan()
    for request, item in work:
        if item.mode == Mode.VERIFY:
            request.unread -= item.rows
            request.output += [1] * (accepted(item.rows - 1) + 1)
        elif item.mode == Mode.PREFILL and not request.prefilling:
            request.output = [1]
    return work


def phases_of(made):
    return {request: request.phase for request in made.running}


def test_groups_of_requests_that_came_one_by_one_become_even():
    """Of 64 with 12 drafts, the fourth group has 2 when the last comes: nobody joins or leaves from then on."""
    made = roomy(12, "grouped", prefill_chunk=200)
    requests = admitted(made, *[200] * 64)
    while any(request.prefilling for request in requests):
        assert sum(item.mode == Mode.PREFILL for _, item in answered(made)) == 1
    counts = Counter(phases_of(made).values())
    assert max(counts.values()) - min(counts.values()) > 10
    for _ in range(20):
        answered(made)
    assert sorted(Counter(phases_of(made).values()).items()) == [(phase, 16) for phase in range(4)]
    verifying = [sum(item.mode == Mode.VERIFY for _, item in answered(made)) for _ in range(26)]
    assert sorted(verifying[13:]) == [0] * 9 + [16] * 4


@pytest.mark.parametrize("schedule", ["grouped", "balanced"])
@pytest.mark.parametrize(("drafts", "seed"), [(6, 0), (8, 1), (12, 2), (12, 3), (15, 4), (15, 5)])
def test_requests_of_unequal_lengths_stop_moving(drafts, seed, schedule):
    """Also while they grow at different speeds; when some leave, others move again, and stop again."""
    chance = random.Random(seed)
    made = roomy(drafts, schedule)
    requests = admitted(made, *[min(int(1 + chance.paretovariate(0.7)), 150) for _ in range(64)])

    def moves(iterations):
        moved = []
        for _ in range(iterations):
            before = phases_of(made)
            answered(made, accepted=lambda drafts: chance.randint(0, min(drafts, 1)))
            moved.append(sum(before[r] is not None and before[r] != phase for r, phase in phases_of(made).items()))
        return moved

    moved = moves(1)
    while any(request.prefilling for request in requests):
        moved += moves(1)
    for _ in range(3):
        moved += moves(60)
        assert not any(moved[-20:])
        for request in chance.sample(made.running, 15):
            made.release(request)
    assert max(moved) == 1


def test_requests_come_in_the_order_in_which_they_were_added():
    made = scheduler()
    requests = admitted(made, *range(1, 11))
    assert [len(request.prompt) for request in made.running] == list(range(1, 9))
    made.cancel(made.waiting[0])
    assert [len(request.prompt) for request in made.waiting] == [10]
    made.release(requests[3])
    assert [(len(request.prompt), request.slot) for request in made.admit()] == [(10, 3)]


def test_every_row_has_a_page():
    """With pages of one token, the table's entries are the positions that may be written."""
    made = scheduler()
    (request,) = admitted(made, 5)
    entered = 0
    for _ in range(12):
        verified = request.reach
        (item,) = planned(made).values()
        entered += len(made.kv_cache.updates)
        first = item.offset if item.mode == Mode.PREFILL else verified + item.offset
        assert entered == first + item.rows


def test_the_youngest_ends_when_nothing_else_can_move():
    made = scheduler()
    requests = admitted(made, 5, 6, 7)
    assert made.give_up() is requests[2]
    assert made.running == requests[:2]
