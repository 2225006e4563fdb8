"""Requests whose texts begin alike share the pages of that beginning, and write what they would write without."""

import random

import pytest
import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import PoolTooSmallError
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.device.drafters import cycles_of
from sparsespec_compile.runtime.device.sampling import DrawParams
from sparsespec_compile.runtime.device.weights import WeightsRecord, _words
from sparsespec_compile.runtime.host.host_tier import HostTier
from sparsespec_compile.runtime.host.kv_cache import _DIGESTED_TOKENS, KVCacheManager
from sparsespec_compile.runtime.host.page_pool import PagePool, PrefixCache
from sparsespec_compile.runtime.host.phases import Phases
from sparsespec_compile.runtime.host.request import FinishReason, PageTable, Place, Request
from sparsespec_compile.runtime.host.scheduler import Limits, Scheduler

from ..support.toy import VOCABULARY, Toy, prompts, run, state_of, stepping

PAGE = 4
(PROMPT,) = prompts(30)
K = 3
SHARED = (30 - K - 1) // PAGE * PAGE
"""Tokens of the prompt that others need not compute: full pages, but for the last k + 1 tokens."""


@pytest.fixture(scope="module")
def toy():
    return Toy()


def samples(count, prompt=PROMPT, new_tokens=20, first_seed=0):
    params = [DrawParams(temperature=1.0, seed=first_seed + nth) for nth in range(count)]
    return [Request(list(prompt), new_tokens, drawn) for drawn in params]


def engine_of(toy, **settings):
    return toy.engine(**{"draft_tokens": K, "min_budget": 4, "page_size": PAGE, **settings})


def prefilled(engine, requests):
    """Texts of the requests, and how many rows of prompts were computed for them."""
    rows, forward = [], engine.target.forward

    def counting(*inputs):
        mode, row_count = inputs[6], inputs[8]
        rows.append(int(row_count[mode == Mode.PREFILL].sum()))
        return forward(*inputs)

    if engine._session is None:
        object.__setattr__(engine.target, "forward", counting)
    else:
        engine._session._runner.step.forward = counting
    texts = run(engine, requests)
    return texts, sum(rows)


@pytest.mark.parametrize("chunk", [2048, 7])
def test_samples_of_a_prompt_prefill_it_once(toy, chunk):
    engine = engine_of(toy, prefill_chunk=chunk)
    requests = samples(5)
    texts, rows = prefilled(engine, requests)
    assert texts == [toy.decode(request) for request in samples(5)]
    assert rows == 30 + 4 * (30 - SHARED)
    assert engine.stats.cached_tokens == 4 * SHARED
    assert [request.stats.cached_tokens for request in requests] == [0] + [SHARED] * 4
    assert engine.stats.pages_held == 0


def test_without_prefix_caching_every_prompt_is_computed(toy):
    engine = engine_of(toy, prefix_caching=False)
    texts, rows = prefilled(engine, samples(3))
    assert texts == [toy.decode(request) for request in samples(3)]
    assert rows == 90
    assert engine.stats.cached_tokens == 0


def test_the_next_turn_of_a_chat_finds_prompt_and_answer(toy):
    engine = engine_of(toy)
    (first,) = samples(1)
    run(engine, [first])
    turn = first.prompt + first.output + PROMPT[:9]
    (second,) = samples(1, turn)
    assert run(engine, [second]) == [toy.decode(Request(turn, 20, second.params))]
    # All but the newest token of the answer have K/V.
    assert second.stats.cached_tokens == (30 + 20 - 1) // PAGE * PAGE


def test_prompts_that_part_share_what_comes_before(toy):
    engine = engine_of(toy)
    other = PROMPT[:17] + [(token + 1) % VOCABULARY for token in PROMPT[17:]]
    requests = [*samples(1), *samples(1, other)]
    expected = [toy.decode(request) for request in [*samples(1), *samples(1, other)]]
    assert run(engine, requests) == expected
    assert requests[1].stats.cached_tokens == 16


def test_equal_pages_behind_different_beginnings_are_not_shared(toy):
    engine = engine_of(toy)
    other = [(PROMPT[0] + 1) % VOCABULARY, *PROMPT[1:]]
    requests = [*samples(1), *samples(1, other)]
    assert run(engine, requests) == [toy.decode(request) for request in [*samples(1), *samples(1, other)]]
    assert requests[1].stats.cached_tokens == 0


@pytest.mark.parametrize(("windows", "chunked"), [((6, 0, 17), False), ((5, 5), False), ((6, 0, 17), True)])
def test_layers_with_windows_share_what_their_rows_see(windows, chunked):
    toy = Toy(windows=windows, chunked=chunked)
    engine = engine_of(toy)
    texts = run(engine, samples(3))
    assert texts == [toy.decode(request) for request in samples(3)]
    assert engine.stats.cached_tokens == 2 * SHARED
    later = samples(2, first_seed=9)
    assert run(engine, later) == [toy.decode(request) for request in samples(2, first_seed=9)]
    assert later[0].stats.cached_tokens == SHARED
    assert engine.stats.pages_held == 0


def test_pillars_are_those_without_sharing(toy):
    indices = []
    for caching in (False, True):
        engine = engine_of(toy, prefix_caching=caching)
        run(engine, samples(1))
        (request,) = samples(1, first_seed=1)
        with stepping(engine, [request]) as session:
            while not request.output:
                session.advance()
            state = state_of(engine)
            count = int(state.pillar_count[request.slot])
            assert count
            indices.append((request.stats.cached_tokens, state.pillar_index[request.slot, :, :count].clone()))
    (without, ours), (shared, theirs) = indices
    assert (without, shared) == (0, SHARED)
    assert torch.equal(ours, theirs)


def test_n_grams_are_looked_up_in_prompts_that_were_not_computed(toy):
    repeated = (PROMPT[:10] * 4)[:39]
    engine = engine_of(toy, drafter="ngram")
    run(engine, samples(1, repeated))
    run(engine, samples(1, [0]))  # another text in the same slot
    (request,) = samples(1, repeated)
    with stepping(engine, [request]) as session:
        while not request.output:
            session.advance()
        assert request.stats.cached_tokens
        assert state_of(engine).tokens[request.slot, : len(repeated)].tolist() == repeated


def change_in_place(toy):
    toy.qkv[0].mul_(1.5)


def change_data(toy):
    toy.qkv[0].data.mul_(1.5)


def rows_trade_places(toy):
    toy.embedding.data.copy_(toy.embedding.data.flip(0))


def changes_cancel_out(toy):
    toy.qkv[0].data[0].mul_(2)
    toy.qkv[0].data[1].div_(2)


@pytest.mark.parametrize("change", [change_in_place, change_data, rows_trade_places, changes_cancel_out])
def test_a_change_of_weights_forgets_everything(change):
    toy = Toy()
    engine = engine_of(toy)
    run(engine, samples(1))
    change(toy)
    changed = samples(2)
    assert run(engine, changed) == [toy.decode(request) for request in samples(2)]
    assert changed[0].stats.cached_tokens == 0
    assert changed[1].stats.cached_tokens == SHARED, "found again under the new weights"


@pytest.mark.parametrize("change", [change_in_place, change_data])
def test_weights_may_change_while_an_idle_client_is_open(change):
    toy = Toy()
    engine = engine_of(toy)
    with engine.client() as idle:
        run(engine, samples(1))
        idle.submit(samples(1))
        while not idle.done:
            engine.drive(idle)
            while idle.take():
                pass
        change(toy)
        (request,) = samples(1)
        assert run(engine, [request]) == [toy.decode(request) for request in samples(1)]
        assert request.stats.cached_tokens == 0


def test_what_runs_while_weights_change_is_not_kept():
    toy = Toy()
    engine = engine_of(toy)
    (before,), (after,) = samples(1), samples(1, PROMPT[:20])
    with engine.client() as client:
        client.submit([before])
        for _ in range(3):
            engine.drive(client)
        change_in_place(toy)
        client.submit([after])
        while not client.done:
            engine.drive(client)
            while client.take():
                pass
    assert after.stats.cached_tokens == 0
    assert run(engine, samples(1, PROMPT[:20])) == [toy.decode(request) for request in samples(1, PROMPT[:20])]


def test_a_refused_submission_leaves_no_client_open(toy):
    engine = engine_of(toy, pool_tokens=64)
    client = engine.client()  # as a traceback keeps one
    with pytest.raises(PoolTooSmallError):
        client.submit(samples(1, new_tokens=200))
    run(engine, samples(1))
    assert engine.stats.tokens == 20
    engine.release()
    client.submit(samples(1))
    client.close()


def test_requests_with_shared_pages_leave_and_come_back(toy):
    longest = 30 + 40
    engine = engine_of(
        toy, pool_tokens=2 * longest // PAGE * PAGE, host_pool_tokens=100 * longest, max_requests=6, min_budget=2
    )
    requests = samples(6, new_tokens=40)
    assert run(engine, requests) == [toy.decode(request) for request in samples(6, new_tokens=40)]
    assert engine.stats.pages_offloaded
    assert engine.stats.cached_tokens
    assert engine.stats.pages_held == 0


def test_others_go_on_when_the_one_that_computes_is_cancelled(toy):
    engine = engine_of(toy, prefill_chunk=5)
    requests = samples(3)
    with engine.client() as client:
        client.submit(requests)
        for _ in range(2):
            engine.drive(client)
        client.cancel([requests[0]])
        while not client.done:
            engine.drive(client)
            while client.take():
                pass
    expected = [toy.decode(request) for request in samples(3)]
    assert requests[0].finish_reason is FinishReason.CANCELLED
    assert [request.output for request in requests[1:]] == expected[1:]


def test_a_pool_that_is_needed_gives_up_what_it_kept(toy):
    """The least recently used text first, and never a page in use."""
    engine = engine_of(toy, pool_tokens=112, host_pool_tokens=0)
    old, new = prompts(30, 30, seed=5)
    for prompt in (old, new, old):
        run(engine, samples(1, prompt, new_tokens=4))
    (large,) = prompts(64, seed=6)
    assert run(engine, samples(1, large, 4)) == [toy.decode(request) for request in samples(1, large, 4)]
    (kept,), (gone,) = samples(1, old, 4), samples(1, new, 4)
    run(engine, [kept])
    run(engine, [gone])
    assert kept.stats.cached_tokens == SHARED
    assert gone.stats.cached_tokens < SHARED


def test_the_end_of_a_text_is_given_up_before_its_beginning(toy):
    engine = engine_of(toy)
    (request,) = samples(1)
    run(engine, [request])
    kv_cache = engine._session._scheduler.kv_cache
    pages = len(kv_cache.pool._kept)
    assert kv_cache._prefixes.find(request.page_keys, 100) == pages == (30 + 20 - 1) // PAGE
    kv_cache.pool.allocate(kv_cache.pool.free - pages + 2)
    assert kv_cache._prefixes.find(request.page_keys, 100) == pages - 2


def test_random_conversations(toy):
    """Beginnings, continuations and repeats, in a pool that holds a few: every text is right, and no page is lost."""
    chance = random.Random(3)
    engine = engine_of(toy, pool_tokens=160, host_pool_tokens=400, max_requests=4, prefill_chunk=11)
    known = [list(prompt) for prompt in prompts(3, 12, 30)]
    found = 0
    for turn in range(12):
        batch = []
        for _ in range(chance.randint(1, 5)):
            prompt = chance.choice(known)[: chance.randint(1, 60)] + chance.choices(
                range(VOCABULARY), k=chance.randint(0, 4)
            )
            batch.append(Request(prompt, chance.randint(1, 20), DrawParams(temperature=1.0, seed=turn)))
        texts = run(engine, batch)
        assert texts == [toy.decode(Request(r.prompt, r.max_new_tokens, r.params)) for r in batch]
        known.extend(request.prompt + request.output for request in batch)
        found += engine.stats.cached_tokens
        kv_cache = engine._session._scheduler.kv_cache
        assert kv_cache.pool.free == kv_cache.pool.pages
        assert kv_cache.tier.held == 0
        assert sum(map(len, kv_cache._prefixes._pages)) == len(kv_cache.pool._kept)
    assert found > 100


def one_layer(window=0, chunked=False):
    return KVLayout((AttentionLayer(0, 1, 1, 1, 1, 1.0, window, 0.0, chunked),), PAGE)


def kept_text(pool, cache, tokens):
    """Pages of a text that was computed and released, and its keys."""
    keys = []
    cache.extend_keys(keys, tokens)
    pages = pool.allocate(len(keys))
    cache.keep(keys, [PageTable(pages=pages)], 0, len(keys))
    pool.release(reversed(pages))
    return pages, keys


def test_kept_pages_are_free_and_given_out_last():
    pool = PagePool(6)
    cache = PrefixCache(one_layer(), pool)
    pages, keys = kept_text(pool, cache, list(range(4 * PAGE)))
    assert pool.free == 6
    assert not set(pool.allocate(2)) & set(pages)
    assert pool.allocate(1) == pages[-1:], "the end of a text is given up first"
    assert cache.find(keys, 4) == 3
    (table,) = cache.take(keys, 2)
    assert table.pages == pages[:2]
    assert pool.allocate(2) is None, "two are held"
    assert pool.allocate(1) == pages[2:3]
    assert cache.find(keys, 4) == 2


def test_chunks_need_the_pages_from_the_latest_start_on():
    pool = PagePool(12)
    cache = PrefixCache(one_layer(window=2 * PAGE, chunked=True), pool)
    pages, keys = kept_text(pool, cache, list(range(5 * PAGE)))
    (table,) = cache.take(keys, 5)
    assert (table.first, table.pages) == (4, pages[4:])
    (table,) = cache.take(keys, 4)
    assert (table.first, table.pages) == (4, []), "a chunk begins behind it"
    cache._forget(pages[4])
    pool.discard(pages[4])
    assert cache.find(keys, 5) == 4


def test_windows_need_the_pages_that_rows_behind_see():
    pool = PagePool(12)
    cache = PrefixCache(one_layer(window=6), pool)
    pages, keys = kept_text(pool, cache, list(range(5 * PAGE)))
    assert cache.find(keys, 5) == 5
    (table,) = cache.take(keys, 5)
    assert (table.first, table.pages) == (3, pages[3:])
    cache._forget(pages[3])
    pool.discard(pages[3])
    # Rows behind the last page see 6 positions, of it and of the page that is gone.
    assert cache.find(keys, 5) == 3


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 5, dtype=torch.bfloat16),
        torch.zeros(4, 8, dtype=torch.float32),
        torch.zeros(7, dtype=torch.float64),
        torch.zeros((), dtype=torch.float32),
        torch.zeros(6, 4, dtype=torch.float16).t(),
        torch.zeros(9, 3, dtype=torch.int8)[1:],
        torch.zeros(2, 2, dtype=torch.complex64),
    ],
    ids=lambda weight: f"{weight.dtype} {tuple(weight.shape)}",
)
def test_changes_of_weights_of_any_kind_are_noticed(weight):
    other = torch.ones(4)
    record = WeightsRecord([other, weight])
    assert not record.changed()
    assert not record.changed()
    weight.data.view(-1)[-1:].add_(1) if weight.is_contiguous() else weight.data[-1].add_(1)
    assert record.changed()
    assert not record.changed()
    other.mul_(1.0)  # torch counts it, though no value is another
    assert record.changed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_elements_that_trade_places_are_noticed(dtype):
    """In a row, in a column, in one word of several elements or in two."""
    weight = torch.arange(8 * 16).view(8, 16).to(dtype)
    record, flat, chance = WeightsRecord([weight]), weight.data.view(-1), random.Random(0)
    assert not record.changed()
    for _ in range(200):
        one, other = chance.sample(range(len(flat)), 2)
        flat[one], flat[other] = flat[other].clone(), flat[one].clone()
        assert record.changed()


@pytest.mark.parametrize(
    ("weight", "word"),
    [
        (torch.zeros(3, 8, dtype=torch.bfloat16), torch.int64),
        (torch.zeros(8, 3, dtype=torch.bfloat16).t(), torch.int16),
        (torch.zeros(3, 8, dtype=torch.bfloat16).t(), torch.int64),
        (torch.zeros(3, 9, dtype=torch.bfloat16)[:, :8], torch.int16),
        (torch.zeros(3, 16, dtype=torch.int8)[:, 4:12], torch.int32),
        (torch.zeros(4, 3, 6, dtype=torch.float32), torch.int64),
        (torch.zeros(2, 5, dtype=torch.uint8), torch.uint8),
        (torch.zeros((), dtype=torch.float16), torch.int16),
    ],
)
def test_weights_are_read_in_the_widest_words(weight, word):
    """Sums of int16 take 30 times as long as those of int64: seconds before each text of a model on a CPU."""
    assert _words(weight).dtype == word
    assert _words(weight).numel() * word.itemsize == weight.numel() * weight.itemsize


def test_weights_made_in_inference_mode_are_read():
    with torch.inference_mode():
        weight = torch.zeros(4)
    record = WeightsRecord([weight])
    assert not record.changed()
    with torch.inference_mode():
        weight.add_(1)
    assert record.changed()


def test_pages_that_came_back_from_host_memory_are_found_again(toy):
    """Texts of requests that have left and returned, whose first pages other texts have taken since."""
    engine = engine_of(toy, pool_tokens=96, host_pool_tokens=4096)
    requests = [
        Request(prompt, 60, DrawParams(temperature=1.0, seed=nth)) for nth, prompt in enumerate(prompts(*[20] * 6))
    ]
    returned, found = set(), 0
    with stepping(engine, requests) as session:
        kv_cache = session._scheduler.kv_cache
        while session.busy:
            session.advance()
            for request in requests:
                returned |= {request} if request.place is Place.RETURNING else set()
                if request in returned and request.place is Place.DEVICE and not request.finished:
                    pages = request.cached // PAGE
                    assert request.kept_pages <= pages
                    whole = (request.prompt + request.output)[: request.kept_pages * PAGE]
                    keys: list[bytes] = []
                    kv_cache._prefixes.extend_keys(keys, whole)
                    assert kv_cache._prefixes.find(keys, len(keys)) == len(keys)
                    found = max(found, len(keys))
    assert len(returned) > 1
    assert found > 5
    assert [request.output for request in requests] == [
        toy.decode(Request(list(request.prompt), 60, request.params)) for request in requests
    ]


LONG, MANY = 8000, 1000
"""Tokens of prompts that wait for their turn to be prefilled, and how many they are."""


def crowd(alike):
    """A cache with many requests whose prompts were not begun, which begin alike, or not at all."""
    layout = KVLayout((AttentionLayer(0, 1, 1, 1, 1, 1.0, 0, 0.0),), page_size=16)
    tier = HostTier(CpuDevice().stream(), torch.zeros(2, 1), 0)
    pages = MANY * (LONG // 16 + 3)
    kv_cache = KVCacheManager(layout, pages, tier, updates=10**6, cycle_tokens=9, prefill_chunk=2048)
    cycle = cycles_of(SpecConfig(draft_tokens=8))[-1]
    scheduler = Scheduler(Limits(MANY, cycle, 2048, MANY), kv_cache, Phases(cycle, "grouped", MANY))
    chance = random.Random(0)
    beginning = [chance.randrange(1000) for _ in range(LONG - 8)]
    for nth in range(MANY):
        text = beginning if alike else [nth, *beginning[1:]]
        scheduler.waiting.append(Request([*text, *range(8)], 8))
    return scheduler


@pytest.mark.parametrize("alike", [True, False])
def test_prompts_that_wait_cost_little_in_each_iteration(monkeypatch, alike):
    """However many there are: pages get keys for a few of them, and those that wait for the same page just wait."""
    scheduler = crowd(alike)
    digested, looked = [0], [0]
    extend, find = PrefixCache.extend_keys, PrefixCache.find

    def extend_keys(cache, keys, tokens):
        before = len(keys)
        extend(cache, keys, tokens)
        digested[-1] += (len(keys) - before) * 16

    def counted(cache, keys, most):
        looked[-1] += 1
        return find(cache, keys, most)

    monkeypatch.setattr(PrefixCache, "extend_keys", extend_keys)
    monkeypatch.setattr(PrefixCache, "find", counted)
    scheduler.running = []
    for request in list(scheduler.waiting)[:MANY]:
        scheduler.waiting.remove(request)
        request.place, request.slot = Place.DEVICE, scheduler._free_slots.pop()
        request.page_tables = (PageTable(),)
        scheduler.running.append(request)
    for _ in range(8):
        rows = sum(item.rows for _, item in scheduler.plan() if item.mode == Mode.PREFILL)
        assert 0 < rows <= 2048
        scheduler.kv_cache.updates.clear()
        digested.append(0)
        looked.append(0)
    assert max(digested) <= _DIGESTED_TOKENS + LONG
    assert sum(looked) < 0.1 * MANY * 8
