"""Who leaves the device, who waits, and who comes back: pages counted without a step."""

import torch

from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.host.host_tier import HostTier
from sparsespec_compile.runtime.host.kv_cache import KVCacheManager, most_pages
from sparsespec_compile.runtime.host.page_pool import PagePool
from sparsespec_compile.runtime.host.request import Place, Request

PAGES, PROMPT, HELD = 40, 5, 8


def layout(*windows, page_size=1):
    """Equal layers with these windows; 0 = none, and negative ones are of chunks."""
    layers = [AttentionLayer(i, 1, 1, 1, 1, 1.0, abs(window), 0.0, window < 0) for i, window in enumerate(windows)]
    return KVLayout(tuple(layers), page_size)


def manager_of(pages, kinds=None, host_pages=0, **settings):
    tier = HostTier(CpuDevice().stream(), torch.zeros(pages, 1), host_pages)
    settings = {"updates": 100, "cycle_tokens": 2, "prefill_chunk": 64, **settings}
    return KVCacheManager(layout(0) if kinds is None else kinds, pages, tier, **settings)


def residents(count):
    """Requests of five tokens that hold eight pages of one token each, and would take eleven before long."""
    manager = manager_of(PAGES, host_pages=300)
    held = []
    for slot in range(count):
        request = Request([1] * PROMPT, 40, slot=slot, prefilled=PROMPT, output=[1])
        assert manager.admit(request, held)
        assert manager.cover(request, HELD)
        held.append(request)
    return manager, held


def test_no_more_leave_than_must():
    manager, held = residents(4)
    manager.begin_iteration(held)
    assert [request.place for request in held] == [Place.DEVICE] * 3 + [Place.LEAVING]
    assert manager.pages_offloaded == HELD


def test_each_group_of_layers_has_a_page_table_of_its_own():
    manager = manager_of(40, layout(0, 100, 200, page_size=4), updates=7)
    request = Request([1] * 8, 4, slot=1)
    assert manager.admit(request, [])
    manager.begin_iteration([request])
    assert manager.cover(request, 8)
    assert [(update.page, update.group) for update in manager.updates] == [(p, g) for g in range(3) for p in range(2)]
    assert len({update.physical for update in manager.updates}) == 6
    assert [update.physical for update in manager.updates] == request.all_pages()
    assert not manager.cover(request, 12), "one entry is left, and three groups need one"
    manager.begin_iteration([request])
    assert manager.cover(request, 12)


def decode(manager, request, chunk=8):
    """Prefill and decode a request, two tokens a verification; yields the pages that it holds for each iteration."""
    while request.prefilling:
        rows = min(chunk, len(request.prompt) - request.prefilled)
        manager.begin_iteration([request])
        assert manager.cover(request, request.prefilled + rows)
        yield request.pages_held
        request.prefilled += rows
    request.output = [1]
    while len(request.output) < request.max_new_tokens - 1:
        manager.begin_iteration([request])
        request.unread = 2
        assert manager.cover(request, min(request.reach + 1, request.max_length))
        yield request.pages_held
        request.unread, request.output = 0, [*request.output, 1, 1]


def test_layers_with_a_window_give_back_the_pages_behind_it():
    manager = manager_of(100, layout(0, 8, page_size=4), prefill_chunk=8)
    request = Request([1] * 30, 60, slot=0)
    assert manager.admit(request, [])
    for held in decode(manager, request):
        whole, windowed = request.page_tables
        assert held == len(whole.pages) + len(windowed.pages) <= manager.largest(request)
        assert whole.first == 0
        first_seen = request.cached - 8 + 1  # by the iteration's first row
        assert windowed.first * 4 <= max(first_seen, 0)
        assert windowed.end == whole.end
    assert len(whole.pages) == 23
    assert len(windowed.pages) <= 5
    manager.release(request)
    assert manager.pool.free == 100


def test_layers_with_chunks_give_back_the_pages_before_the_latest_start():
    manager = manager_of(100, layout(0, -8, page_size=4), prefill_chunk=8)
    request = Request([1] * 30, 60, slot=0)
    assert manager.admit(request, [])
    fewest = 100
    for held in decode(manager, request):
        whole, chunked = request.page_tables
        assert held == len(whole.pages) + len(chunked.pages) <= manager.largest(request)
        assert chunked.first * 4 <= request.cached // 8 * 8
        assert chunked.end == whole.end
        fewest = fewest if request.prefilling else min(fewest, len(chunked.pages))
    assert len(whole.pages) == 23
    assert fewest == 2, "those of the tokens to come, where a chunk begins"
    manager.release(request)
    assert manager.pool.free == 100


def test_windows_let_more_requests_run():
    """Without a host tier all of them fit at their largest."""
    kinds = layout(0, *[8] * 5, page_size=4)
    manager = manager_of(2 * most_pages(kinds, 90, 2, 8), kinds, prefill_chunk=8)
    held = []
    for slot in range(3):
        request = Request([1] * 30, 60, slot=slot)
        if manager.admit(request, held):
            held.append(request)
    assert len(held) == 2
    assert manager.pool.pages < 6 * 23, "one request of every position in every layer"
    for request in held:
        assert max(decode(manager, request)) <= manager.pool.pages // 2


def test_a_gemma_of_long_texts_takes_less_than_a_third():
    """Five layers with a window of 1,024 for each without one, as Gemma-3's 26, 32 requests of 32,768 tokens."""
    kinds = layout(*[0 if i % 6 == 5 else 1024 for i in range(26)], page_size=16)
    pages = 32 * most_pages(kinds, 32768, cycle_tokens=13, prefill_chunk=2048)
    layers_in_page = max(len(group.layers) for group in kinds.groups)
    assert pages * layers_in_page <= 0.30 * 32 * (32768 // 16) * 26


def test_a_request_with_windows_comes_back_from_host_memory_as_it_left():
    manager = manager_of(60, layout(0, 8, page_size=4), host_pages=200, prefill_chunk=8)
    requests = [Request([1] * 40, 60, slot=slot) for slot in range(3)]
    for request in requests:
        if not manager.admit(request, requests[: request.slot]):
            break
        for _ in decode(manager, request):
            pass
    left = requests[1]
    logical = [(table.first, len(table.pages)) for table in left.page_tables]
    assert manager._send_away(left)
    manager.begin_iteration([requests[0], left])
    manager.begin_iteration([requests[0], left])
    assert left.place is Place.DEVICE
    assert [(table.first, len(table.pages)) for table in left.page_tables] == logical
    assert manager.cover(left, left.cached + 1)
    tabled = {(update.page, update.group): update.physical for update in manager.updates}
    assert tabled == {
        (table.first + n, group): page
        for group, table in enumerate(left.page_tables)
        for n, page in enumerate(table.pages)
    }
    assert left.page_tables[1].first > logical[1][0], "the window went on meanwhile"


def test_a_page_is_free_when_its_last_holder_has_released_it():
    pool = PagePool(4)
    first = pool.allocate(3)
    pool.share(first[:2])
    pool.release(first)
    assert pool.free == 2
    assert pool.allocate(3) is None
    pool.release(first[:2])
    assert pool.free == 4
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_nobody_overtakes_a_request_that_waits_in_host_memory():
    manager, held = residents(4)
    manager.begin_iteration(held)
    manager.begin_iteration(held)
    assert held[3].place is Place.HOST
    for request in held[1:3]:
        manager.release(request)
    newcomer = Request([1], 2, slot=1)
    assert not manager.admit(newcomer, [held[0], held[3]])
    manager.begin_iteration([held[0], held[3]])
    assert held[3].place is Place.RETURNING
    assert manager.admit(newcomer, [held[0], held[3]])


def test_a_request_returns_when_there_is_room_for_it_to_go_on():
    manager, held = residents(4)
    manager.begin_iteration(held)
    manager.begin_iteration(held)
    assert manager.pool.free >= HELD, "its pages alone would fit"
    manager.begin_iteration(held)
    assert held[3].place is Place.HOST
    manager.release(held[2])
    manager.begin_iteration([*held[:2], held[3]])
    manager.begin_iteration([*held[:2], held[3]])
    assert held[3].place is Place.DEVICE
    assert manager.tier.held == 0
    assert manager.cover(held[3], HELD)
    assert [update.page for update in manager.updates] == list(range(HELD)), "its page table is written anew"


def test_a_request_that_ends_on_the_way_gives_back_the_pages_of_both_places():
    manager, held = residents(4)
    manager.begin_iteration(held)
    held[3].slot = -1
    manager.release(held[3])
    assert held[3].place is Place.LEAVING, "the copy still reads its pages"
    manager.begin_iteration(held[:3])
    assert held[3].place is Place.NOWHERE
    assert manager.tier.held == 0
    assert manager.pool.free == PAGES - 3 * HELD


def test_clearing_gives_back_what_is_on_the_way():
    manager, held = residents(4)
    manager.begin_iteration(held)
    manager.clear()
    for request in held[:3]:
        manager.release(request)
    assert manager.pool.free == PAGES
    assert not manager.moving


def test_a_request_that_ends_in_host_memory_keeps_nobody_waiting():
    manager, held = residents(4)
    manager.begin_iteration(held)
    manager.begin_iteration(held)
    manager.release(held[3])
    assert manager.tier.held == 0
    manager.release(held[2])
    assert manager.admit(Request([1], 2, slot=3), held[:2])


def test_room_is_kept_for_the_whole_of_a_prompt_that_is_under_way():
    manager, _ = residents(0)
    long = Request([1] * 25, 10, slot=0)
    assert manager.admit(long, [])
    assert not manager.admit(Request([1] * 10, 10, slot=1), [long])
