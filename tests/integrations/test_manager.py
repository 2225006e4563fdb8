"""The manager of an equipped model, as transformers' server and other callers use it."""

import asyncio
import threading
import time

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus

import sparsespec_compile as ss
from sparsespec_compile.errors import EngineBusyError, PromptError, SamplingError

from ..support.models import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [3] * 20]
LONG = {"max_new_tokens": 900}
SECONDS = 60


@pytest.fixture(scope="module")
def model():
    model = tiny("llama", num_hidden_layers=1)
    ss.install(model, ss.SpecConfig(draft_tokens=3, min_budget=8))
    return model


@pytest.fixture(scope="module")
def expected(model):
    outputs = model.generate_batch(PROMPTS, generation_config=greedy())
    return [output.generated_tokens for output in outputs.values()]


def greedy(**settings):
    return GenerationConfig(do_sample=False, **{"max_new_tokens": 12, **settings})


@pytest.fixture
def manager(model):
    with model.continuous_batching_context_manager(greedy(), timeout=SECONDS) as manager:
        yield manager
        manager.stop(hard_stop=True, timeout=SECONDS)
    assert not manager.is_running()


def wait_until(true):
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


class TestResults:
    def test_come_for_every_request(self, manager, expected):
        names = manager.add_requests(PROMPTS)
        assert names == ["req_0", "req_1", "req_2"]
        results = {}
        for result in manager:
            results[result.request_id] = result
            if len(results) == 3:
                break
        for name, prompt, tokens in zip(names, PROMPTS, expected, strict=True):
            assert results[name].prompt_ids == prompt
            assert results[name].generated_tokens == tokens
            assert results[name].status is RequestStatus.FINISHED

    def test_are_streamed_when_asked(self, manager, expected):
        name = manager.add_request(PROMPTS[0], streaming=True, record_timestamps=True)
        results = list(manager.request_id_iter(name))
        assert len(results) > 2
        assert {result.status for result in results[:-1]} == {RequestStatus.DECODING}
        for result in results:
            assert result.generated_tokens == expected[0][: len(result.generated_tokens)]
            assert len(result.timestamps) == len(result.generated_tokens)
        assert results[-1].generated_tokens == expected[0]
        assert results[-1].status is RequestStatus.FINISHED

    def test_of_a_request_are_found_among_others(self, manager, expected):
        names = manager.add_requests(PROMPTS)
        for name, tokens in reversed(list(zip(names, expected, strict=True))):
            assert manager.get_result(name, timeout=SECONDS).generated_tokens == tokens
        assert manager.get_result(timeout=0.01) is None

    def test_go_to_a_handler_in_its_loop(self, manager, expected):
        async def ask():
            loop, seen = asyncio.get_running_loop(), []
            done = loop.create_future()

            def handle(result):
                seen.append((threading.current_thread(), result))
                if result.status is RequestStatus.FINISHED:
                    done.set_result(None)

            manager.register_result_handler("mine", handle)
            assert manager.add_request(PROMPTS[1], request_id="mine", streaming=True) == "mine"
            await asyncio.wait_for(done, SECONDS)
            return seen

        seen = asyncio.run(ask())
        assert {thread for thread, _ in seen} == {threading.current_thread()}
        assert seen[-1][1].generated_tokens == expected[1]
        assert not manager._results._handlers
        assert manager.get_result(timeout=0.01) is None

    def test_a_handler_that_comes_late_misses_nothing(self, manager, expected):
        """As transformers' server registers it behind the request."""

        async def ask():
            done = asyncio.get_running_loop().create_future()
            manager.add_request(PROMPTS[1], request_id="late")
            while not manager._results._waiting:
                await asyncio.sleep(0.01)
            manager.register_result_handler("late", done.set_result)
            return await asyncio.wait_for(done, SECONDS)

        assert asyncio.run(ask()).generated_tokens == expected[1]
        assert not manager._results._handlers

    def test_a_handler_whose_loop_is_closed_ends_the_request(self, manager):
        async def register():
            manager.register_result_handler("gone", print)

        asyncio.run(register())
        manager.add_request(PROMPTS[0], request_id="gone", streaming=True, **LONG)
        wait_until(lambda: not manager._named)
        assert not manager._results._handlers

    def test_a_request_of_its_own_kind(self, manager, expected):
        short = manager.add_request(PROMPTS[0], max_new_tokens=3)
        stop = manager.add_request(PROMPTS[0], eos_token_id=expected[0][4])
        assert manager.get_result(short, timeout=SECONDS).generated_tokens == expected[0][:3]
        ended = manager.get_result(stop, timeout=SECONDS).generated_tokens
        assert ended == expected[0][: expected[0].index(expected[0][4]) + 1]
        manager.configure("sampled", GenerationConfig(do_sample=True, max_new_tokens=12, num_return_sequences=2))
        manager.add_request(PROMPTS[0], request_id="sampled")
        texts = [manager.get_result(name, timeout=SECONDS) for name in ("sampled", "sampled__child#0")]
        assert texts[0].generated_tokens != texts[1].generated_tokens

    def test_several_threads_add(self, manager, expected):
        names = [[] for _ in range(4)]

        def add(own):
            own.extend(manager.add_requests(PROMPTS * 2))

        threads = [threading.Thread(target=add, args=(own,)) for own in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({name for own in names for name in own}) == 24
        for own in names:
            got = [manager.get_result(name, timeout=SECONDS).generated_tokens for name in own]
            assert got == expected * 2

    def test_sampling_of_a_request(self, model, expected):
        with model.continuous_batching_context_manager(GenerationConfig(do_sample=True, max_new_tokens=12)) as manager:
            name = manager.add_request(PROMPTS[0], top_k=1)
            assert manager.get_result(name, timeout=SECONDS).generated_tokens == expected[0]


class TestEnds:
    def test_a_cancelled_request_gives_no_more(self, manager, expected):
        name = manager.add_request(PROMPTS[0], streaming=True, **LONG)
        results = manager.request_id_iter(name)
        next(results)
        manager.cancel_request(name)
        assert all(result.status is RequestStatus.DECODING for result in results)
        other = manager.add_request(PROMPTS[1])
        assert manager.get_result(other, timeout=SECONDS).generated_tokens == expected[1]
        assert manager.get_result(timeout=0.01) is None
        manager.cancel_request("nobody")

    def test_a_request_is_cancelled_before_it_reaches_the_engine(self, model, expected):
        manager = model.init_continuous_batching(greedy())
        first, second = manager.add_request(PROMPTS[0], **LONG), manager.add_request(PROMPTS[1])
        manager.cancel_request(first)
        manager.start()
        manager.stop(timeout=SECONDS)
        assert [result.request_id for result in manager] == [second]

    def test_stopping_lets_requests_finish(self, model, expected):
        manager = model.init_continuous_batching(greedy())
        manager.add_requests(PROMPTS)
        assert not manager.is_running()
        manager.start()
        manager.start()  # does nothing
        assert manager.is_running()
        manager.stop(block=True, timeout=SECONDS)
        assert not manager.is_running()
        assert sorted(result.request_id for result in manager) == ["req_0", "req_1", "req_2"]
        with pytest.raises(EngineBusyError, match="is stopping"):
            manager.add_request(PROMPTS[0])
        assert model.generate_batch.__self__.fast.memory_plan is None
        manager.start()  # once more
        name = manager.add_request(PROMPTS[0])
        assert manager.get_result(name, timeout=SECONDS).generated_tokens == expected[0]
        manager.stop(timeout=SECONDS)
        manager.destroy()

    def test_stopping_at_once_ends_requests(self, model):
        manager = model.init_continuous_batching(greedy())
        name = manager.add_request(PROMPTS[0], streaming=True, **LONG)
        manager.start()
        next(manager.request_id_iter(name))
        manager.stop(hard_stop=True, timeout=SECONDS)
        assert not manager.is_running()
        last = list(manager)[-1]
        assert last.status is RequestStatus.FAILED
        assert "stopped before" in last.error
        assert 0 < len(last.generated_tokens) < 900

    def test_a_manager_is_kept_for_the_next_session(self, model, expected):
        with model.continuous_batching_context_manager(greedy(), persistent_manager=True) as manager:
            manager.get_result(manager.add_request(PROMPTS[0]), timeout=SECONDS)
        assert model.generate_batch.__self__.fast.memory_plan is not None
        with model.continuous_batching_context_manager() as again:
            assert again is manager
            result = again.get_result(again.add_request(PROMPTS[1]), timeout=SECONDS)
            assert result.generated_tokens == expected[1]
        assert model.init_continuous_batching(greedy()) is not manager
        model.destroy_cached_continuous_batching_manager()

    def test_a_failed_iteration_is_fatal_and_told_to_everybody(self, model, monkeypatch):
        manager = model.init_continuous_batching(greedy())
        engine = model.generate_batch.__self__.fast._engine
        assert manager.fatal_error is manager.background_thread_status.fatal_error is None
        names = [manager.add_request(prompt, streaming=True, **LONG) for prompt in PROMPTS]
        manager.start()
        next(manager.request_id_iter(names[0]))

        def fail():
            raise OSError("the device is gone")

        monkeypatch.setattr(engine._session, "advance", fail)
        wait_until(lambda: not manager.is_running())
        assert isinstance(manager.fatal_error, OSError)
        last = {result.request_id: result for result in manager}
        assert all(last[name].status is RequestStatus.FAILED for name in names)
        assert all("the device is gone" in last[name].error for name in names)
        with pytest.raises(EngineBusyError, match="has died"):
            manager.add_request(PROMPTS[0])
        manager.start()
        assert manager.get_result(manager.add_request(PROMPTS[0]), timeout=SECONDS).status is RequestStatus.FINISHED
        manager.stop(timeout=SECONDS)


class TestRefusals:
    def test_of_settings(self, manager):
        with pytest.raises(SamplingError, match="asks for temperature, but its texts are greedy"):
            manager.add_request(PROMPTS[0], temperature=0.5)
        with pytest.raises(SamplingError, match="asks for guidance_scale, which is not supported"):
            manager.add_request(PROMPTS[0], guidance_scale=1.5)
        with pytest.raises(EngineBusyError, match="cannot pause"):
            manager.pause()

    def test_of_a_name_that_is_in_use(self, manager):
        manager.add_request(PROMPTS[0], request_id="mine", **LONG)
        with pytest.raises(PromptError, match="'mine' is unfinished"):
            manager.add_request(PROMPTS[0], request_id="mine")
        manager.cancel_request("mine")
        manager.add_request(PROMPTS[0], request_id="mine")
        assert manager.get_result("mine", timeout=SECONDS).status is RequestStatus.FINISHED

    def test_of_a_text(self, manager):
        with pytest.raises(PromptError, match=r"input_ids must be token ids, got 'text'.*token ids alone"):
            manager.add_request("text")

    def test_of_a_prompt_is_that_requests_result(self, manager, expected):
        good, bad = manager.add_request(PROMPTS[0]), manager.add_request([10**6])
        assert manager.get_result(good, timeout=SECONDS).generated_tokens == expected[0]
        result = manager.get_result(bad, timeout=SECONDS)
        assert result.status is RequestStatus.FAILED
        assert "PromptError" in result.error

    def test_of_a_model_that_cannot_be_compiled(self):
        model = tiny("llama", num_hidden_layers=1)
        ss.install(model)
        model.lm_head.to(torch.bfloat16)
        manager = model.init_continuous_batching(greedy())
        name = manager.add_request(PROMPTS[0])
        manager.start()
        result = manager.get_result(name, timeout=SECONDS)
        assert result.status is RequestStatus.FAILED
        wait_until(lambda: not manager.is_running())
        assert type(manager.fatal_error).__name__ in result.error

    def test_of_a_queue_that_is_full(self, model, monkeypatch):
        import queue

        from sparsespec_compile.integrations import manager as module

        monkeypatch.setattr(module, "_PUT_SECONDS", 0.01)
        batching = ContinuousBatchingConfig(max_queue_size=1)
        manager = model.init_continuous_batching(greedy(), batching)
        manager.add_request(PROMPTS[0])
        with pytest.raises(queue.Full):
            manager.add_request(PROMPTS[0])
        manager.start()
        assert manager.get_result(timeout=SECONDS).status is RequestStatus.FINISHED
        manager.stop(timeout=SECONDS)
