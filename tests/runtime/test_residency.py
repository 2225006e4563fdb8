"""Who leaves the device, who waits, and who comes back: pages counted without a step."""

import torch

from sparsespec_compile.runtime.device.cpu import CpuDevice
from sparsespec_compile.runtime.host_tier import HostTier
from sparsespec_compile.runtime.pool import PageAllocator
from sparsespec_compile.runtime.request import Place, Request
from sparsespec_compile.runtime.residency import Residency

PAGES, PROMPT, HELD = 40, 5, 8


def residents(count):
    """Requests of five tokens that hold eight pages of one token each, and would take eleven before long."""
    residency = Residency(
        PageAllocator(PAGES),
        HostTier(CpuDevice().stream(), torch.zeros(PAGES, 1), 300),
        page_size=1,
        updates=100,
        cycle_tokens=2,
    )
    held = []
    for slot in range(count):
        request = Request([1] * PROMPT, 40, slot=slot, prefilled=PROMPT, output=[1])
        assert residency.admits(request, held)
        assert residency.covers(request, HELD)
        held.append(request)
    return residency, held


def test_no_more_leave_than_must():
    residency, held = residents(4)
    residency.begin_iteration(held)
    assert [request.place for request in held] == [Place.DEVICE] * 3 + [Place.LEAVING]
    assert residency.pages_offloaded == HELD


def test_each_group_of_layers_gets_a_page_of_a_set():
    tier = HostTier(CpuDevice().stream(), torch.zeros(8, 1), 0)
    residency = Residency(PageAllocator(8), tier, page_size=4, updates=7, cycle_tokens=2, groups=3)
    request = Request([1] * 8, 4, slot=1)
    assert residency.admits(request, [])
    residency.begin_iteration([request])
    assert residency.covers(request, 8)
    first, second = request.pages[:2]
    wanted = [(1, page, 3 * number + group, group) for page, number in enumerate((first, second)) for group in range(3)]
    assert [tuple(update) for update in residency.updates] == wanted
    assert not residency.covers(request, 12), "one entry is left, and a page needs three"
    residency.begin_iteration([request])
    assert residency.covers(request, 12)


def test_nobody_overtakes_a_request_that_waits_in_host_memory():
    residency, held = residents(4)
    residency.begin_iteration(held)
    residency.begin_iteration(held)
    assert held[3].place is Place.HOST
    for request in held[1:3]:
        residency.release(request)
    newcomer = Request([1], 2, slot=1)
    assert not residency.admits(newcomer, [held[0], held[3]])
    residency.begin_iteration([held[0], held[3]])
    assert held[3].place is Place.RETURNING
    assert residency.admits(newcomer, [held[0], held[3]])


def test_a_request_returns_when_there_is_room_for_it_to_go_on():
    residency, held = residents(4)
    residency.begin_iteration(held)
    residency.begin_iteration(held)
    assert residency.allocator.free >= HELD, "its pages alone would fit"
    residency.begin_iteration(held)
    assert held[3].place is Place.HOST
    residency.release(held[2])
    residency.begin_iteration([*held[:2], held[3]])
    residency.begin_iteration([*held[:2], held[3]])
    assert held[3].place is Place.DEVICE
    assert residency.tier.held == 0
    assert residency.covers(held[3], HELD)
    assert [update.page for update in residency.updates] == list(range(HELD)), "its page table is written anew"


def test_a_request_that_ends_on_the_way_gives_back_the_pages_of_both_places():
    residency, held = residents(4)
    residency.begin_iteration(held)
    held[3].slot = -1
    residency.release(held[3])
    assert held[3].place is Place.LEAVING, "the copy still reads its pages"
    residency.begin_iteration(held[:3])
    assert held[3].place is Place.NOWHERE
    assert residency.tier.held == 0
    assert residency.allocator.free == PAGES - 3 * HELD


def test_clearing_gives_back_what_is_on_the_way():
    residency, held = residents(4)
    residency.begin_iteration(held)
    residency.clear()
    for request in held[:3]:
        residency.release(request)
    assert residency.allocator.free == PAGES
    assert not residency.moving


def test_a_request_that_ends_in_host_memory_keeps_nobody_waiting():
    residency, held = residents(4)
    residency.begin_iteration(held)
    residency.begin_iteration(held)
    residency.release(held[3])
    assert residency.tier.held == 0
    residency.release(held[2])
    assert residency.admits(Request([1], 2, slot=3), held[:2])


def test_room_is_kept_for_the_whole_of_a_prompt_that_is_under_way():
    residency, _ = residents(0)
    long = Request([1] * 25, 10, slot=0)
    assert residency.admits(long, [])
    assert not residency.admits(Request([1] * 10, 10, slot=1), [long])
