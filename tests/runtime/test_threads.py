"""Any thread may generate, add, cancel, close and stop at any time: every text is right, or its end is named."""

import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from sparsespec_compile.errors import (
    EngineBusyError,
    EngineFailedError,
    EngineStalledError,
    PoolTooSmallError,
)
from sparsespec_compile.runtime.device.processing import Processing
from sparsespec_compile.runtime.device.step import Step
from sparsespec_compile.runtime.host.client import BackgroundDriver, Turns
from sparsespec_compile.runtime.host.engine import Engine
from sparsespec_compile.runtime.host.request import FinishReason

from ..support.toy import Toy, requests_of, run, stepping

LENGTHS = (3, 9, 30, 2)


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def engine_of(toy, **settings):
    return toy.engine(**{"draft_tokens": 3, "min_budget": 4, "page_size": 4, "max_length": 256, **settings})


def in_threads(*functions, timeout=60.0):
    """Run each function in a thread of its own; raises what one of them raised, or that one hangs."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def test_threads_that_generate_at_once_are_served_together(toy, frequent_switches):
    engine, texts = engine_of(toy), {}

    def generate(seed):
        requests = requests_of(LENGTHS, 12 + seed, temperature=0.8)
        texts[seed] = run(engine, requests)

    in_threads(*(lambda seed=seed: generate(seed) for seed in range(6)))
    for seed, got in texts.items():
        assert got == [toy.decode(request) for request in requests_of(LENGTHS, 12 + seed, temperature=0.8)]
    assert len(texts) == 6


def test_a_generation_inside_of_another_shares_its_batches(toy):
    engine, inner = engine_of(toy), None
    outer = requests_of(LENGTHS, 30)
    for _ in engine.run(outer):
        if inner is None:
            inner = requests_of(LENGTHS, 10)
            assert run(engine, inner) == [toy.decode(request) for request in requests_of(LENGTHS, 10)]
    assert [request.output for request in outer] == [toy.decode(request) for request in requests_of(LENGTHS, 30)]


def test_stop_from_another_thread_ends_every_waiter_and_the_next_text_is_right(toy, frequent_switches):
    engine = engine_of(toy)
    for attempt in range(10):
        started, ended = threading.Barrier(3, timeout=30), []

        def wait(started=started, ended=ended):
            requests = requests_of(LENGTHS, 200)
            outputs = engine.run(requests)
            next(outputs)
            started.wait()
            for _ in outputs:
                pass
            ended.append([request.finish_reason for request in requests])

        def stop(started=started, pause=attempt * 0.002):
            started.wait()
            time.sleep(pause)
            engine.stop()
            requests = requests_of((7, 4), 9)
            assert run(engine, requests) == [toy.decode(request) for request in requests_of((7, 4), 9)]

        in_threads(wait, wait, stop)
        assert len(ended) == 2


def test_closing_from_another_thread_ends_the_iterator(toy):
    engine = engine_of(toy)
    client = engine.client()
    requests = requests_of(LENGTHS, 200)
    client.submit(requests)
    next(client)
    in_threads(lambda: list(client), client.close)
    with pytest.raises(EngineBusyError, match="has ended"):
        client.submit(requests_of((3,), 5))
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]


def test_a_client_cancels_its_own_requests_alone(toy):
    engine, requests = engine_of(toy), requests_of(LENGTHS, 12)
    with engine.client() as mine, engine.client() as other:
        mine.submit(requests)
        other.submit(requests_of((4,), 30))
        next(mine)
        other.cancel(requests)
        assert {output.request for output in mine if output.ended} == set(requests)
    assert [request.output for request in requests] == [toy.decode(request) for request in requests_of(LENGTHS, 12)]


def test_requests_added_one_by_one_run_together(toy):
    """The state is sized by the configuration, not by the first request."""
    engine = engine_of(toy, max_requests=32)
    lengths = [5 + i % 7 for i in range(32)]
    requests = requests_of(lengths, 40)
    run(engine, requests_of(lengths, 40))
    together = engine.stats.iterations
    with engine.client() as client:
        client.submit(requests[:1])
        next(client)
        client.submit(requests[1:])
        for _ in client:
            pass
    assert [request.output for request in requests] == [toy.decode(r) for r in requests_of(lengths, 40)]
    assert engine.stats.iterations <= 1.1 * together


def test_a_text_beyond_the_models_positions_starts_while_no_other_runs(toy):
    engine = engine_of(toy, max_length=None)
    engine.target = replace(engine.target, positions=64)
    run(engine, requests_of((5,), 20))
    long = requests_of((80,), 20)
    with engine.client() as client:
        client.submit(requests_of((5,), 50))
        next(client)
        with pytest.raises(PoolTooSmallError, match=r"longer than the 64 .* while no other is running"):
            run(engine, long)
    assert run(engine, long) == [toy.decode(request) for request in requests_of((80,), 20)]


def test_a_text_longer_than_the_settings_allow(toy):
    with pytest.raises(
        PoolTooSmallError, match=r"longer than the 20 .* or raise SpecConfig.max_length, which is 20\.$"
    ):
        run(engine_of(toy, max_length=20), requests_of((5,), 50))


def test_the_old_state_is_gone_before_a_larger_one_is_sized(toy, monkeypatch):
    engine = engine_of(toy, max_length=None)
    engine.target = replace(engine.target, positions=64)
    run(engine, requests_of((5,), 20))
    pool, new_session, alive = weakref.ref(engine._session.state.pool), Engine._new_session, []

    def note(engine, longest, requests):
        alive.append(pool())
        return new_session(engine, longest, requests)

    monkeypatch.setattr(Engine, "_new_session", note)
    run(engine, requests_of((80,), 20))
    assert alive == [None]


def test_a_text_for_which_no_state_can_be_built_is_forgotten(toy, monkeypatch):
    engine = engine_of(toy, max_length=None)
    engine.target = replace(engine.target, positions=64)
    new_session = Engine._new_session

    def refuse_long(engine, longest, requests):
        if longest > 1000:
            raise PoolTooSmallError("too long")
        return new_session(engine, longest, requests)

    monkeypatch.setattr(Engine, "_new_session", refuse_long)
    with pytest.raises(PoolTooSmallError, match="too long"):
        run(engine, requests_of((5,), 5000))
    assert run(engine, requests_of((5,), 9)) == [toy.decode(request) for request in requests_of((5,), 9)]


def test_a_long_prompt_may_need_more_pages_than_a_longer_text():
    """With windows, where chunks of a prompt count."""
    windowed = Toy(windows=(6, 6))
    engine = engine_of(windowed, pool_tokens=40, prefill_chunk=64, draft_tokens=1)
    with pytest.raises(PoolTooSmallError, match="A request of 52 tokens"):
        run(engine, [*requests_of((2,), 70), *requests_of((50,), 2)])


def test_texts_with_windows_leave_and_return(toy):
    """Results land while a request is in host memory, and its window goes on."""
    windowed = Toy(windows=(0, 4))
    lengths = range(20, 26)
    settings = {"drafter": "full", "max_requests": 6, "page_size": 1, "pool_tokens": 110, "host_pool_tokens": 2000}
    engine = windowed.engine(draft_tokens=8, min_budget=4, prefill_chunk=16, max_length=128, **settings)
    assert run(engine, requests_of(lengths, 60)) == [windowed.decode(request) for request in requests_of(lengths, 60)]
    assert engine.stats.pages_offloaded > 0
    run(engine, requests_of((3,), 4))
    assert engine.stats.pages_offloaded == 0


def test_a_failing_iteration_names_itself_to_everybody_who_shared_it(toy, monkeypatch):
    engine = engine_of(toy)
    other = engine.client()
    other.submit(requests_of(LENGTHS, 40))
    next(other)
    step = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda *arguments: (_ for _ in ()).throw(RuntimeError("a kernel failed")))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run(engine, requests_of((3,), 9))
    monkeypatch.setattr(Step, "__call__", step)
    with pytest.raises(EngineFailedError, match="a kernel failed"):
        next(other)
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]


def test_what_fails_for_one_request_ends_that_one_alone(toy):
    def check(output):
        if len(output) == 5:
            raise ValueError("a decoder's own error")
        return False

    engine, requests = engine_of(toy), requests_of(LENGTHS, 20)
    requests[1].stop_check = check
    run(engine, requests)
    assert requests[1].finish_reason is FinishReason.ERROR
    assert "own error" in str(requests[1].error)
    expected = [toy.decode(request) for request in requests_of(LENGTHS, 20)]
    assert requests[1].output == expected[1][:5]
    assert [r.output for r in requests if r is not requests[1]] == [text for i, text in enumerate(expected) if i != 1]


@pytest.mark.parametrize("asked", [{"logprobs": True}, {"processing": Processing(repetition=1.5)}], ids=str)
def test_no_memory_for_a_step_of_its_own_ends_the_requests_that_need_it(toy, monkeypatch, asked):
    engine, requests = engine_of(toy), requests_of(LENGTHS, 20)
    for name, value in asked.items():
        setattr(requests[2], name, value)
    step = Step.__call__

    def refuse(self, rows, logits, variant, *functions):
        if variant.logprobs or variant.processed:
            raise PoolTooSmallError("no memory for this graph")
        step(self, rows, logits, variant, *functions)

    monkeypatch.setattr(Step, "__call__", refuse)
    run(engine, requests)
    assert requests[2].finish_reason is FinishReason.ERROR
    expected = [toy.decode(request) for request in requests_of(LENGTHS, 20)]
    assert [r.output for r in requests if r is not requests[2]] == [text for i, text in enumerate(expected) if i != 2]


def test_work_without_progress_is_named(toy, monkeypatch):
    monkeypatch.setattr("sparsespec_compile.runtime.host.session._STALLED_ITERATIONS", 50)
    engine = engine_of(toy)
    step = Step.__call__

    def nothing_becomes_final(self, *arguments):
        step(self, *arguments)
        self.results.tokens[:, 0] = 0

    monkeypatch.setattr(Step, "__call__", nothing_becomes_final)
    with pytest.raises(EngineStalledError, match="50 iterations, with 4 requests running"):
        run(engine, requests_of(LENGTHS, 20))
    monkeypatch.setattr(Step, "__call__", step)
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]


def test_an_interrupt_while_a_client_is_closed_leaves_the_engine_usable(toy, monkeypatch):
    engine = engine_of(toy)
    client = engine.client()
    client.submit(requests_of(LENGTHS, 40))
    next(client)
    session = engine._session
    with monkeypatch.context() as patch:
        patch.setattr(session, "settle", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client.close()
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]


def test_stop_ends_a_generation_whose_state_is_being_built(toy, monkeypatch):
    engine, requests, building = engine_of(toy), requests_of(LENGTHS, 30), threading.Event()
    new_session = Engine._new_session

    def slowly(engine, longest, requests):
        building.set()
        time.sleep(0.2)
        return new_session(engine, longest, requests)

    monkeypatch.setattr(Engine, "_new_session", slowly)

    def stop():
        building.wait(30)
        engine.stop()

    in_threads(lambda: run(engine, requests), stop)
    assert [request.output for request in requests] == [[]] * len(LENGTHS)
    assert not engine._clients


@pytest.mark.parametrize("at", ["hand_over", "_leave", "_fail"])
def test_an_interrupt_anywhere_leaves_the_engine_usable(toy, monkeypatch, at):
    engine, interrupted = engine_of(toy), []
    whose = Turns if at == "hand_over" else Engine
    whole = getattr(whose, at)

    def interrupt(one, *arguments):
        if not interrupted:
            interrupted.append(at)
            raise KeyboardInterrupt
        return whole(one, *arguments)

    client = engine.client()
    client.submit(requests_of(LENGTHS, 40))
    next(client)
    with monkeypatch.context() as patch:
        patch.setattr(whose, at, interrupt)
        if at == "_fail":
            patch.setattr(Step, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("a kernel failed")))
        with pytest.raises(KeyboardInterrupt):
            client.close() if at == "_leave" else list(client)
    with contextlib.suppress(EngineFailedError):
        client.close()
    assert interrupted
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]
    assert not engine._clients


def test_what_an_iteration_calls_cannot_add_or_release(toy):
    engine, requests, refused = engine_of(toy), requests_of(LENGTHS, 9), []

    def check(output):
        for call in (lambda: client.submit(requests_of((3,), 5)), engine.release, lambda: engine.capture(2, 64)):
            with pytest.raises(EngineBusyError, match="from within an iteration"):
                call()
            refused.append(call)
        return False

    requests[0].stop_check = check
    with engine.client() as client:
        client.submit(requests)
        assert sum(output.ended for output in client) == len(LENGTHS)
    assert len(refused) == 3 * 9


def test_a_client_that_is_abandoned_gives_its_pages_back_at_once(toy):
    engine = engine_of(toy)
    client = engine.client()
    client.submit(requests_of(LENGTHS, 40))
    next(client)
    engine.abandon(client)
    kv_cache = engine._session._scheduler.kv_cache
    assert kv_cache.pool.free == kv_cache.pool.pages
    assert not engine._clients


def test_a_background_thread_ends_with_its_client(toy):
    engine = engine_of(toy)
    client = engine.client()
    driver = BackgroundDriver(engine, client)
    client.submit(requests_of((3,), 4))
    list(client)
    engine.abandon(client)  # as when its stream is dropped
    driver._thread.join(30)
    assert not driver._thread.is_alive()


def test_the_interpreter_ends_while_a_background_thread_is_at_work():
    script = """
from tests.support.toy import Toy, requests_of
from sparsespec_compile.runtime.host.client import BackgroundDriver
engine = Toy().engine(draft_tokens=3, min_budget=4, max_length=4096)
client = engine.client()
BackgroundDriver(engine, client)
client.submit(requests_of((3, 5), 4000))
next(client)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True
    )
    assert result.returncode == 0, result.stderr


def test_what_an_iteration_calls_may_close_but_not_wait(toy):
    engine, requests = engine_of(toy), requests_of(LENGTHS, 20)
    client, seen = engine.client(), []

    def check(output):
        with pytest.raises(EngineBusyError, match="from within"):
            next(client)
        client.close()
        client.cancel([requests[2]])
        seen.append(requests[2].finish_reason)
        return False

    requests[0].stop_check = check
    client.submit(requests)
    assert len(list(client)) < 20 * len(LENGTHS)
    assert seen[0] is FinishReason.CANCELLED
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]


def test_a_thread_of_its_own_carries_a_client_on(toy):
    engine, requests = engine_of(toy), requests_of(LENGTHS, 20)
    client = engine.client()
    BackgroundDriver(engine, client)
    client.submit(requests)
    deadline = time.monotonic() + 30
    while not all(request.finished for request in requests) and time.monotonic() < deadline:
        time.sleep(0.01)  # nobody asks for an output
    assert [request.output for request in requests] == [toy.decode(request) for request in requests_of(LENGTHS, 20)]
    assert {output.request for output in client} == set(requests)
    client.close()
    while drivers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not drivers()


def drivers():
    return [thread for thread in threading.enumerate() if thread.name == "sparsespec-engine"]


def test_memory_is_given_back_when_nobody_generates(toy):
    engine = engine_of(toy)
    with stepping(engine, requests_of(LENGTHS, 20)), pytest.raises(EngineBusyError, match="1 generation"):
        engine.release()
    engine.release()
    gc.collect()
    assert engine._session is None
    assert engine.memory_plan is None
    assert run(engine, requests_of(LENGTHS, 9)) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]


def chaos(toy, seconds, threads=8):
    """Threads that generate, stream, cancel, close and stop at random; returns how many whole texts were compared."""
    engine = engine_of(toy, max_requests=5, pool_tokens=512, host_pool_tokens=2048)
    expected = {length: toy.decode(requests_of([length], 25)[0]) for length in range(1, 12)}
    deadline, compared = time.monotonic() + seconds, []

    def work(seed):
        chance = random.Random(seed)
        while time.monotonic() < deadline:
            lengths = [chance.randint(1, 11) for _ in range(chance.randint(1, 4))]
            requests = [requests_of([length], 25)[0] for length in lengths]
            with engine.client() as client:
                client.submit(requests)
                if chance.random() < 0.2:
                    engine.stop()
                for taken, _ in enumerate(client):
                    kind = chance.random()
                    if kind < 0.02:
                        client.cancel([chance.choice(requests)])
                    elif kind < 0.03:
                        break
                    elif kind < 0.035:
                        more = [requests_of([length], 25)[0] for length in lengths]
                        try:
                            client.submit(more)
                        except EngineBusyError:
                            assert client.closed
                            break
                        requests, lengths = requests + more, lengths + lengths
                    del taken
            for length, request in zip(lengths, requests, strict=True):
                whole = request.finish_reason is FinishReason.LENGTH
                assert request.output == expected[length][: len(request.output)]
                assert len(request.output) == 25 or not whole
                compared.append(whole)

    in_threads(*(lambda seed=seed: work(seed) for seed in range(threads)), timeout=seconds + 60)
    requests = requests_of(LENGTHS, 9)
    assert run(engine, requests) == [toy.decode(request) for request in requests_of(LENGTHS, 9)]
    scheduler = engine._session._scheduler
    assert scheduler.kv_cache.pool.free == scheduler.kv_cache.pool.pages
    assert scheduler.kv_cache.tier.held == 0
    assert len(scheduler._free_slots) == 5
    return sum(compared)


def test_threads_at_random(toy, frequent_switches):
    assert chaos(toy, seconds=4) > 20


@pytest.mark.slow
def test_threads_at_random_for_a_minute(toy, frequent_switches):
    assert chaos(toy, seconds=60) > 300
