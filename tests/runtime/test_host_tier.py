"""Requests that leave the device and come back: nothing is lost, nothing is recomputed, whatever fails on the way."""

import random
import threading
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.device.inputs import InputPacker
from sparsespec_compile.runtime.host.host_tier import HostTier, available_host_bytes
from sparsespec_compile.runtime.host.request import FinishReason, Place, Request

from ..support.adversary import AdversarialDevice
from ..support.toy import Toy, requests_of, run, stepping

LENGTHS = (3, 9, 30, 2, 17, 8, 25, 12)


@pytest.fixture(scope="module")
def toy():
    return Toy()


def small(toy, pool_tokens=96, host_pool_tokens=4096, **settings):
    """An engine whose pool holds two of eight requests of 70 to 100 tokens."""
    settings = {"draft_tokens": 4, "min_budget": 4, "page_size": 4, **settings}
    return toy.engine(pool_tokens=pool_tokens, host_pool_tokens=host_pool_tokens, **settings)


@pytest.fixture
def moves(monkeypatch):
    """Counts pages that begin to move, in each direction."""
    counts = {True: 0, False: 0}
    begin = HostTier._begin

    def counted(tier, device_pages, host_pages, *, to_host):
        counts[to_host] += len(device_pages)
        return begin(tier, device_pages, host_pages, to_host=to_host)

    monkeypatch.setattr(HostTier, "_begin", counted)
    return counts


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9}])
@pytest.mark.parametrize("draft_tokens", [0, 4, 8])
def test_texts_are_plain_decodings(toy, moves, draft_tokens, params):
    requests = requests_of(LENGTHS, 60, **params)
    engine = small(toy, draft_tokens=draft_tokens)
    assert run(engine, requests) == [toy.decode(request) for request in requests_of(LENGTHS, 60, **params)]
    assert moves[True] > 30
    assert moves[True] == moves[False] == engine.stats.pages_offloaded
    assert engine.stats.pages_held == 0
    assert sum(engine.stats.rows_by_iteration) >= engine.stats.tokens


def test_pages_of_every_group_of_layers_move_together(moves):
    toy = Toy(windows=(6, 0, 17, 6))
    requests = requests_of(LENGTHS, 60)
    engine = small(toy)
    texts = run(engine, requests)
    assert len(engine.target.layout.groups) == 4
    assert texts == [toy.decode(request) for request in requests]
    assert moves[True] == moves[False] > 30


def test_prompts_are_sent_once(toy, moves):
    """Nothing is computed again: the rows of prompts add up to the prompts."""
    requests = requests_of(LENGTHS, 60)
    engine = small(toy, draft_tokens=0)
    run(engine, requests)
    assert moves[True] > 0
    decoded = sum(len(request.output) - 1 for request in requests)
    dropped = 2 * len(requests)  # iterations enqueued before the end of a text was read
    assert 0 <= sum(engine.stats.rows_by_iteration) - sum(LENGTHS) - decoded <= dropped


def test_everything_is_free_afterwards(toy):
    engine = small(toy, max_requests=8)
    with stepping(engine, requests_of(LENGTHS, 60)) as session:
        seen = []
        while session.busy:
            session.advance()
            seen.append(session.occupancy)
        assert (seen[0].running, seen[0].waiting) == (3, 5)
        assert 0.9 < max(one.pool_share for one in seen) <= 1.0
        page_bytes = session.state.pool.shape[1] * session.state.pool.itemsize
        assert max(one.host_bytes for one in seen) >= 10 * page_bytes
        assert session.occupancy == (0, 0, 0.0, 0, ("pillar", 4))
        scheduler = session._scheduler
        assert scheduler.kv_cache.pool.free == scheduler.kv_cache.pool.pages == 24
        assert scheduler.kv_cache.tier.held == 0
        assert sorted(scheduler._free_slots) == list(range(8))


def test_requests_return_in_the_order_in_which_they_left(toy, monkeypatch):
    left, returned = [], []
    engine = small(toy)
    with stepping(engine, requests_of(LENGTHS, 60)) as session:
        kv_cache = session._scheduler.kv_cache
        send_away, arrive = kv_cache._send_away, kv_cache._arrive

        def note_leaving(request):
            sent = send_away(request)
            left.extend([request] * sent)
            return sent

        def note_arrival(transfer):
            request = kv_cache._moving[transfer]
            arrive(transfer)
            returned.extend([request] * (request.place is Place.DEVICE))

        monkeypatch.setattr(kv_cache, "_send_away", note_leaving)
        monkeypatch.setattr(kv_cache, "_arrive", note_arrival)
        while session.busy:
            session.advance()
    assert len(left) > 3
    assert returned == left


def test_no_request_starves(toy):
    """First in, first out: the oldest request never leaves, and ends first among equals."""
    ended = []
    engine = small(toy)
    requests = requests_of([10] * 8, 60)
    for output in engine.run(requests):
        if output.ended:
            ended.append(requests.index(output.request))
    assert ended[0] == 0
    assert sorted(ended) == list(range(8))


class Threaded(CpuDevice):
    """Gets host memory by a thread, as CUDA, where pinning a block takes as long as several iterations."""

    asynchronous = True

    def __init__(self, seconds=0.0, error=None):
        self.threads = set()
        self._seconds = seconds
        self._error = error
        self._executor = ThreadPoolExecutor(1)

    def host_block(self, shape, dtype):
        return self._executor.submit(self._get, shape, dtype)

    def _get(self, shape, dtype):
        self.threads.add(threading.current_thread())
        time.sleep(self._seconds)
        if self._error is not None:
            raise self._error
        return self.host_buffer(shape, dtype)


class Refusing(CpuDevice):
    """Has no host memory for pages."""

    def __init__(self, error):
        self._error = error

    def host_block(self, shape, dtype):
        block = Future()
        block.set_exception(self._error)
        return block


def tier_of(pool, pages, device=None):
    return HostTier((device or CpuDevice()).stream(), pool, pages)


def test_steps_go_on_while_a_thread_gets_host_memory(toy, monkeypatch):
    reserve, waited = HostTier._reserve, []

    def note(tier, count):
        pages = reserve(tier, count)
        waited.extend([count] * (pages is None and tier.growing))
        return pages

    monkeypatch.setattr(HostTier, "_reserve", note)
    monkeypatch.setattr("sparsespec_compile.runtime.host.host_tier._BLOCK_BYTES", 2**12)
    requests, device = requests_of(LENGTHS, 60), Threaded(seconds=0.02)
    engine = small(toy, device=device)
    assert run(engine, requests) == [toy.decode(request) for request in requests_of(LENGTHS, 60)]
    assert waited, "host memory was not waited for"
    assert device.threads
    assert threading.current_thread() not in device.threads
    assert engine.stats.pages_offloaded > 0
    assert all(request.finish_reason is FinishReason.LENGTH for request in requests)


def test_memory_for_the_next_to_leave_is_on_the_way(monkeypatch):
    """A block an iteration, until as many pages are free as the longest that left had, and no more than allowed."""
    monkeypatch.setattr("sparsespec_compile.runtime.host.host_tier._BLOCK_BYTES", 4 * 3 * 8)
    tier = tier_of(torch.zeros(16, 8), 10, Threaded())

    def iterate(times):
        for _ in range(times):
            list(tier.advance())
            if tier._coming is not None:
                tier._coming.result()
        tier._add_block(wait=True)

    iterate(4)
    assert tier._free.pages == 0, "nobody has left yet"
    while (first := tier.offload([3, 1, 4, 15])) is None:
        iterate(1)
    iterate(4)
    assert tier._free.free == 5
    assert tier._free.pages == 9
    assert tier.offload([9, 2]) is not None
    iterate(4)
    assert tier._free.pages == 10
    assert len(first.host_pages) == 4


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [(None, 0, 0, 8000), ("max", 0, 0, 8000), (5000, 1000, 0, 4000), (5000, 4000, 1500, 2500), (100, 200, 0, 0)],
)
def test_free_host_memory(tmp_path, limit, used, cached, free):
    """Of the machine, or of the control group, whose page cache can be had too."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    if limit is not None:
        (group / "memory.max").write_text(f"{limit if limit == 'max' else limit * 1024}\n")
        (group / "memory.current").write_text(f"{used * 1024}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached * 1024}\nactive_file 7\n")
    assert available_host_bytes(tmp_path) == free * 1024


def test_free_host_memory_of_a_system_without_proc(tmp_path):
    assert available_host_bytes(tmp_path) >= available_host_bytes()


def test_a_request_without_pages_leaves_at_once():
    tier = tier_of(torch.zeros(16, 8), 10)
    transfer = tier.offload([])
    assert list(tier.advance()) == [transfer]


@pytest.mark.parametrize(("mebibytes", "pages"), [(1, 16), (2.25, 7), (20, 1)])
def test_pages_of_a_block_of_memory(mebibytes, pages):
    pool = torch.empty(1, int(mebibytes * 2**18), device="meta")
    assert tier_of(pool, 10**6)._block_pages == pages
    assert tier_of(pool, 1)._block_pages == 1


def test_without_a_thread_no_more_memory_is_taken_than_needed(monkeypatch):
    monkeypatch.setattr("sparsespec_compile.runtime.host.host_tier._BLOCK_BYTES", 32)
    tier = tier_of(torch.zeros(16, 8), 100)
    for count, held in ((5, 5), (1, 6)):
        tier.offload(list(range(count)))
        list(tier.advance())
        assert tier._free.pages == tier.held == held


@pytest.mark.parametrize(
    ("by_a_thread", "error"),
    [
        (False, RuntimeError("CUDA error: out of memory")),
        (True, RuntimeError("CUDA error: out of memory")),
        (False, OSError("no memory")),
        (True, MemoryError()),
    ],
)
def test_host_memory_that_runs_out_leaves_the_others_unharmed(toy, by_a_thread, error):
    requests = requests_of(LENGTHS, 60)
    engine = small(toy, device=Threaded(error=error) if by_a_thread else Refusing(error))
    run(engine, requests)
    assert engine._session._tier.capacity == 0, "nobody is admitted for memory that is not there"
    expected = [toy.decode(request) for request in requests_of(LENGTHS, 60)]
    given_up = [request for request in requests if request.finish_reason is FinishReason.MEMORY]
    assert len(given_up) < len(requests) - 2
    for request, text in zip(requests, expected, strict=True):
        if request.finish_reason is FinishReason.MEMORY:
            assert request.output == text[: len(request.output)]
        else:
            assert request.output == text


def test_a_host_tier_that_is_too_small_admits_fewer(toy):
    requests = requests_of(LENGTHS, 60)
    texts = run(small(toy, host_pool_tokens=64), requests)
    assert texts == [toy.decode(request) for request in requests_of(LENGTHS, 60)]


def test_long_prompts_wait_rather_than_move(toy, moves):
    """Three prompts that fill the pool one by one: those that come later wait for room for the whole prompt."""
    requests = requests_of((80, 81, 82), 8)
    engine = small(toy, prefill_chunk=16)
    assert run(engine, requests) == [toy.decode(request) for request in requests_of((80, 81, 82), 8)]
    assert moves[True] == 0


def test_no_text_is_given_up_while_memory_can_be_had(toy):
    """Whole requests must fit into host memory beside what stays: more are not admitted."""
    requests = requests_of((21, 1, 6, 12, 3), 65)
    run(small(toy, pool_tokens=100, host_pool_tokens=52, prefill_chunk=8), requests)
    assert {request.finish_reason for request in requests} == {FinishReason.LENGTH}


@pytest.mark.parametrize("place", [Place.DEVICE, Place.LEAVING, Place.HOST, Place.RETURNING])
def test_cancelled_wherever_it_is(toy, monkeypatch, place):
    """Transfers that take several iterations, as on a GPU; one request is taken back while it is at `place`."""
    _slow_down(monkeypatch)
    engine = small(toy)
    requests = requests_of(LENGTHS, 60)
    taken = None
    with stepping(engine, requests) as session:
        while session.busy:
            if taken is None:
                taken = next((r for r in requests[1:] if r.place is place and r.output), None)
                if taken is not None:
                    session.cancel(taken)
            session.advance()
        kv_cache = session._scheduler.kv_cache
        assert kv_cache.pool.free == kv_cache.pool.pages
        assert kv_cache.tier.held == 0
    assert taken is not None
    assert taken.finish_reason is FinishReason.CANCELLED
    for request, expected in zip(requests, requests_of(LENGTHS, 60), strict=True):
        text = toy.decode(expected)
        assert request.output == (text[: len(request.output)] if request is taken else text)


def test_what_waits_is_admitted_when_those_before_it_are_cancelled_on_the_way(toy):
    """Pages come free only in the iteration that has just found no room for it, and nothing else is left."""
    device = AdversarialDevice(0)
    device.pause()
    first, second, long = requests_of((12, 16, 80), 60)
    long.max_new_tokens = 10
    engine = small(toy, device=device)
    with engine.client() as client:
        client.submit([first, second, long])
        while second.place is not Place.LEAVING:
            assert engine.drive(client)
        client.cancel([first, second])
        assert long.place is Place.NOWHERE
        while client.live:
            engine.drive(client)
    assert long.output == toy.decode(Request(long.prompt, 10))


@pytest.mark.parametrize("together", [True, False])
def test_ranks_plan_the_same_however_fast_their_copies_are(toy, moves, monkeypatch, together):
    """Devices that complete copies at other times stand for ranks; without agreement their plans part."""
    begin, plans = HostTier.__init__, []
    monkeypatch.setattr(HostTier, "__init__", lambda *given, **how: begin(*given, **{**how, "together": together}))
    pack = InputPacker.pack

    def recorded(packer, *work):
        packed = pack(packer, *work)
        plans[-1].append(zlib.crc32(packer.flat.tobytes()))
        return packed

    monkeypatch.setattr(InputPacker, "pack", recorded)
    for seed in range(2):
        plans.append([])
        requests = requests_of(LENGTHS, 60)
        texts = run(small(toy, device=AdversarialDevice(seed)), requests)
        assert texts == [toy.decode(request) for request in requests_of(LENGTHS, 60)]
    assert moves[True] > 60
    assert (plans[0] == plans[1]) == together


def _slow_down(monkeypatch):
    """Copies of two pages an iteration, complete one iteration after the last."""
    advance = HostTier.advance

    def slow(tier):
        for transfer in tier._moving:
            if not transfer.enqueued:
                tier._copy(transfer, 2)
                return
        yield from advance(tier)

    monkeypatch.setattr(HostTier, "advance", slow)


def test_an_exception_while_pages_move_leaves_the_engine_usable(toy, monkeypatch):
    _slow_down(monkeypatch)
    engine = small(toy)
    generation = engine.run(requests_of(LENGTHS, 60))
    for _ in generation:
        if engine._session._tier._moving:
            break
    with pytest.raises(KeyboardInterrupt):
        generation.throw(KeyboardInterrupt)
    assert engine._session._tier.held == 0
    requests = requests_of(LENGTHS, 60)
    assert run(engine, requests) == [toy.decode(request) for request in requests_of(LENGTHS, 60)]


def test_pages_and_blocks(monkeypatch):
    """Pages go to where they came from bit by bit, over several blocks of host memory."""
    monkeypatch.setattr("sparsespec_compile.runtime.host.host_tier._BLOCK_BYTES", 4 * 3 * 8)
    pool = torch.randn(16, 8)
    expected = pool.clone()
    tier = tier_of(pool, 10)
    order = random.Random(0).sample(range(16), 10)
    there = tier.offload(order)
    assert list(tier.advance()) == [there]
    assert tier.held == 10
    assert tier.offload([0]) is None
    pool.fill_(torch.nan)
    back = tier.restore(there.host_pages, there.device_pages)
    assert list(tier.advance()) == [back]
    assert torch.equal(pool[order], expected[order])
    tier.release(there.host_pages)
    assert tier.held == 0


def test_a_tier_is_waited_for_before_its_memory_is_given_back(toy, monkeypatch):
    """Its memory is unpinned with it, and nothing may be on its way there."""
    engine, waited, wait = small(toy), [], HostTier.wait
    run(engine, requests_of([10], 20))
    first = engine._session._tier
    monkeypatch.setattr(HostTier, "wait", lambda tier: waited.append(tier) or wait(tier))
    engine.release()
    assert waited == [first]
    requests = requests_of([10, 20, 30], 60)
    assert run(engine, requests) == [toy.decode(request) for request in requests_of([10, 20, 30], 60)]
    assert engine._session._tier is not first
