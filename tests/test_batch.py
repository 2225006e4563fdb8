"""Many ragged prompts: `generate_batch`, `as_completed`, `stream`."""

import gc
import itertools
import math
import re
from concurrent.futures import Future

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.errors import (
    ConfigError,
    EngineBusyError,
    PoolTooSmallError,
    PromptError,
    StoppedError,
)
from sparsespec_compile.runtime.device.devices import CpuDevice

from .support.models import VOCABULARY, tiny
from .support.tokenizer import letters

LENGTHS = (3, 41, 17, 1, 9, 26, 5)
NEW = 30


class Letters:
    """A tokenizer that writes each token as two letters."""

    def decode(self, token_ids):
        return "".join(chr(97 + token // 26) + chr(97 + token % 26) for token in token_ids)


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3", num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast(model):
    return ss.optimize(model, ss.SpecConfig(draft_tokens=4, min_budget=6, max_requests=3))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def texts(model, prompts):
    """HuggingFace's own greedy text of each prompt."""
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        expected.append(out[0, len(prompt) :].tolist())
    return expected


GREEDY = ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=())


def test_greedy_texts_are_huggingfaces_in_the_order_of_the_prompts(fast, prompts, texts):
    completions = fast.generate_batch(prompts, GREEDY)
    assert [completion.token_ids for completion in completions] == texts
    assert [completion.index for completion in completions] == list(range(len(prompts)))
    assert {completion.finish_reason for completion in completions} == {ss.FinishReason.LENGTH}


def test_texts_as_they_finish(fast, prompts, texts):
    sampling = [ss.SamplingParams(max_new_tokens=5 + 3 * i, stop_token_ids=()) for i in range(len(prompts))]
    order = []
    for completion in fast.as_completed(prompts, sampling):
        order.append(completion.index)
        assert completion.token_ids == texts[completion.index][: 5 + 3 * completion.index]
    assert sorted(order) == list(range(len(prompts)))
    assert order.index(0) < order.index(2)


def test_streamed_tokens_add_up_to_the_texts(fast, prompts, texts):
    pieces = [[] for _ in prompts]
    for piece in fast.stream([torch.tensor(prompt) for prompt in prompts], GREEDY):
        pieces[piece.index].extend(piece.token_ids)
        if piece.completion is not None:
            assert piece.completion.token_ids == pieces[piece.index]
    assert pieces == texts


def test_each_prompt_has_its_own_settings(model, fast, prompts):
    sampling = [
        ss.SamplingParams(max_new_tokens=9, stop_token_ids=()),
        ss.SamplingParams(max_new_tokens=12, temperature=0.8, seed=5, stop_token_ids=()),
        ss.SamplingParams(max_new_tokens=7, temperature=1.2, top_k=4, seed=5, stop_token_ids=()),
        ss.SamplingParams(max_new_tokens=7, temperature=1.0, top_p=0.5, min_p=0.05, seed=9, stop_token_ids=()),
    ]
    together = fast.generate_batch(prompts[:4], sampling)
    plain = ss.optimize(model, ss.SpecConfig(draft_tokens=0))
    alone = [plain.generate_batch([prompt], one)[0] for prompt, one in zip(prompts, sampling, strict=False)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [len(c.token_ids) for c in together] == [9, 12, 7, 7]


def test_several_texts_of_one_prompt(fast, prompts):
    params = ss.SamplingParams(max_new_tokens=12, temperature=1.0, seed=4, n=3, stop_token_ids=())
    completions = fast.generate_batch(prompts[:2], params)
    assert [(c.index, c.sample) for c in completions] == list(itertools.product(range(2), range(3)))
    assert len({tuple(c.token_ids) for c in completions}) == 6
    again = fast.generate_batch(prompts[:2], params)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]


def test_seeds_that_are_not_given_differ(fast, prompts):
    params = ss.SamplingParams(max_new_tokens=12, temperature=1.0, stop_token_ids=())
    torch.manual_seed(1)
    first = fast.generate_batch([prompts[0]] * 2, params)
    torch.manual_seed(1)
    second = fast.generate_batch([prompts[0]] * 2, params)
    assert first[0].token_ids != first[1].token_ids
    assert [c.token_ids for c in first] == [c.token_ids for c in second]


def test_stop_tokens(fast, prompts, texts):
    stop = texts[2][11]
    (completion,) = fast.generate_batch([prompts[2]], ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=[stop]))
    assert completion.token_ids == texts[2][: texts[2].index(stop) + 1]
    assert completion.finish_reason is ss.FinishReason.STOP


def test_the_models_own_stop_tokens_are_the_default(model, prompts, texts):
    stop = texts[1][8]
    model.generation_config.eos_token_id = [stop]
    try:
        fast = ss.optimize(model)
        (completion,) = fast.generate_batch([prompts[1]], ss.SamplingParams(max_new_tokens=NEW))
    finally:
        model.generation_config.eos_token_id = None
    assert completion.token_ids == texts[1][: texts[1].index(stop) + 1]


@pytest.mark.parametrize("place", range(6, 12))
def test_stop_strings_that_span_tokens_and_blocks(fast, prompts, texts, place):
    whole = Letters().decode(texts[4])
    string = whole[2 * place - 1 : 2 * place + 3]
    params = ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=(), stop_strings=["never there", string])
    (completion,) = fast.generate_batch([prompts[4]], params, tokenizer=Letters())
    text = Letters().decode(completion.token_ids)
    assert string in text
    assert string not in text[:-2]
    assert completion.finish_reason is ss.FinishReason.STOP


def test_logprobs_are_the_models_own(model, fast, prompts):
    params = ss.SamplingParams(max_new_tokens=14, temperature=0.7, top_k=9, seed=2, logprobs=True, stop_token_ids=())
    greedy = ss.SamplingParams(max_new_tokens=14, stop_token_ids=())
    with_logprobs, without = fast.generate_batch(prompts[1:3], [params, greedy])
    assert without.logprobs == []
    tokens = torch.tensor([prompts[1] + with_logprobs.token_ids])
    with torch.no_grad():
        expected = model(tokens).logits.double().log_softmax(-1)[0, len(prompts[1]) - 1 : -1]
    expected = expected.gather(-1, tokens[0, len(prompts[1]) :, None])[:, 0]
    assert torch.allclose(torch.tensor(with_logprobs.logprobs).double(), expected, atol=1e-4)


def test_what_each_request_took(fast, prompts):
    completions = fast.generate_batch(prompts, GREEDY)
    total = fast.stats
    assert sum(c.stats.target_passes for c in completions) == total.target_passes
    assert sum(c.stats.cycles for c in completions) == total.cycles
    assert sum(c.stats.accepted for c in completions) == total.accepted_per_cycle * total.cycles
    for completion in completions:
        assert 0 < completion.stats.first_token_seconds <= completion.stats.seconds
        assert completion.stats.cycles == 0 or 0 <= completion.stats.accepted_per_cycle <= 4
    assert math.isnan(ss.Completion(0, 0, [], ss.FinishReason.STOP, [], type(completions[0].stats)()).stats.seconds)


def test_cancelling_one_prompt_leaves_the_others(fast, prompts, texts):
    done = {}
    with fast.stream(prompts, GREEDY) as pieces:
        for piece in pieces:
            if piece.index == 1 and not done:
                (done[1],) = pieces.cancel(1)
                assert pieces.cancel(1) == []
            assert piece.index != 1 or piece.token_ids == texts[1][:1]
            if piece.completion is not None:
                done[piece.index] = piece.completion
    assert done[1].finish_reason is ss.FinishReason.CANCELLED
    assert done[1].token_ids == texts[1][: len(done[1].token_ids)]
    assert {index: c.token_ids for index, c in done.items() if index != 1} == {
        index: text for index, text in enumerate(texts) if index != 1
    }


def test_cancelling_before_the_start_and_while_waiting(fast, prompts, texts):
    pieces = fast.stream(prompts, GREEDY)
    assert [c.token_ids for c in pieces.cancel(0)] == [[]]
    with pytest.raises(PromptError, match="no prompt 99; this stream has had 7"):
        pieces.cancel(99)
    next(pieces)
    pieces.cancel(6)
    completed = {p.index: p.completion.token_ids for p in pieces if p.completion is not None}
    assert completed == {index: texts[index] for index in range(1, 6)}


def test_prompts_added_while_others_run(fast, prompts, texts):
    completed = {}
    with fast.stream(prompts[:2], GREEDY) as pieces:
        for piece in pieces:
            if piece.completion is not None:
                completed[piece.index] = piece.completion.token_ids
                if len(completed) == 1:
                    assert pieces.add(prompts[2:], GREEDY) == [2, 3, 4, 5, 6]
                    assert pieces.add([]) == []
    assert [completed[index] for index in range(len(prompts))] == texts
    with pytest.raises(EngineBusyError, match="has ended"):
        pieces.add(prompts[:1])


def test_prompts_added_later_are_told_their_own_numbers(fast, prompts):
    told = ss.SamplingParams(max_new_tokens=1, prefix_allowed_tokens_fn=lambda number, ids: [10 + number])
    with fast.stream(prompts[:1], told) as pieces:
        pieces.add(prompts[1:3], told)
        pieces.add(prompts[3:4], told)
        with pytest.raises(PromptError, match="Prompt 4 is empty"):
            pieces.add([[]], told)
        texts = {piece.index: piece.token_ids for piece in pieces}
    assert texts == {0: [10], 1: [11], 2: [12], 3: [13]}


def test_closing_and_interrupting_leave_the_model_usable(fast, prompts, texts):
    pieces = fast.stream(prompts, GREEDY)
    next(pieces)
    assert [c.token_ids for c in fast.generate_batch(prompts[:1], GREEDY)] == texts[:1]
    pieces.close()
    with pytest.raises(StopIteration):
        next(pieces)

    def interrupted():
        pieces = fast.stream(prompts, GREEDY)
        for piece in pieces:
            if piece.completion is not None:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:  # the traceback keeps the stream alive, as a notebook does
        interrupted()
    assert [c.token_ids for c in fast.generate_batch(prompts, GREEDY)] == texts
    fast.stop()
    fast.stop()
    assert kept.type is KeyboardInterrupt
    assert [c.token_ids for c in fast.generate_batch(prompts, GREEDY)] == texts


def test_a_dropped_iterator_of_texts_leaves_the_model_usable(fast, prompts, texts):
    for completion in fast.as_completed(prompts, GREEDY):
        assert completion.token_ids == texts[completion.index]
        break
    assert [c.token_ids for c in fast.generate_batch(prompts, GREEDY)] == texts


class Stopping(Letters):
    """A tokenizer whose owner has had enough."""

    def __init__(self, fast):
        self.fast = fast

    def decode(self, token_ids):
        self.fast.stop()
        return super().decode(token_ids)


def test_whole_texts_that_are_stopped_are_an_error(fast, prompts, texts):
    sampling = ss.SamplingParams(max_new_tokens=NEW, stop_strings=("never",))
    with pytest.raises(StoppedError, match=f"of {len(prompts)} texts before they were whole"):
        fast.generate_batch(prompts, sampling, tokenizer=Stopping(fast))
    assert len(list(fast.as_completed(prompts, sampling, tokenizer=Stopping(fast)))) < len(prompts)
    assert [c.token_ids for c in fast.generate_batch(prompts, GREEDY)] == texts


def test_a_stream_may_be_closed_by_what_it_calls(fast, prompts, texts):
    class Closing(Letters):
        def decode(self, token_ids):
            pieces.close()
            return super().decode(token_ids)

    sampling = ss.SamplingParams(max_new_tokens=NEW, stop_strings=("never",))
    pieces = fast.stream(prompts, sampling, tokenizer=Closing())
    assert sum(piece.completion is not None for piece in pieces) < len(prompts)
    with pytest.raises(EngineBusyError, match="ended"):
        pieces.add(prompts)
    assert [c.token_ids for c in fast.generate_batch(prompts, GREEDY)] == texts


def test_a_stream_counts_the_texts_that_it_still_owes(fast, prompts):
    with fast.stream(prompts, GREEDY) as pieces:
        assert pieces.unfinished == len(prompts)
        pieces.cancel(0)
        completed = sum(piece.completion is not None for piece in itertools.islice(pieces, 40))
        assert pieces.unfinished == len(prompts) - 1 - completed
    assert pieces.unfinished > 0


def test_a_stopped_stream_cannot_be_revived(fast, prompts, texts):
    stopped = fast.stream(prompts, GREEDY)
    next(stopped)
    fast.stop()
    with fast.stream(prompts, GREEDY) as running:
        next(running)
        with pytest.raises(EngineBusyError, match="ended"):
            stopped.add(prompts[:1], GREEDY)
        assert list(stopped) == []
        completed = {p.index: p.completion.token_ids for p in running if p.completion is not None}
    assert [completed[index] for index in range(len(prompts))] == texts


def test_inference_mode_inside_and_outside(model, prompts, texts):
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=1, page_size=4, pool_tokens=96, host_pool_tokens=4096))
    with torch.inference_mode():
        inside = fast.generate_batch(prompts, GREEDY)
    assert fast.stats.pages_offloaded > 0
    outside = fast.generate_batch(prompts, GREEDY)
    assert [c.token_ids for c in inside] == [c.token_ids for c in outside] == texts


def test_a_tokenizer_that_fails_for_one_text_loses_no_other(fast, prompts, texts):
    class FailingTokenizer(Letters):
        def decode(self, token_ids):
            if token_ids[0] == texts[2][0]:
                raise ValueError("a user's own error")
            return super().decode(token_ids)

    params = ss.SamplingParams(max_new_tokens=NEW, stop_strings=["?"], stop_token_ids=())
    completions = fast.generate_batch(prompts, params, tokenizer=FailingTokenizer())
    failed = [completion for completion in completions if completion.finish_reason is ss.FinishReason.ERROR]
    assert 2 in [completion.index for completion in failed]
    assert all(isinstance(completion.error, ValueError) for completion in failed)
    assert all(c.token_ids == texts[c.index] for c in completions if c not in failed)
    assert len(failed) < len(prompts)
    assert [c.token_ids for c in fast.generate_batch(prompts, GREEDY)] == texts


def test_progress_shows_speed_acceptance_choice_requests_and_memory(fast, prompts, capsys):
    fast.generate_batch(prompts, GREEDY, progress=True)
    first, *_, last = capsys.readouterr().err.splitlines()
    for wanted in (
        "/7 texts",
        "at most ",
        " left",
        "tokens/s",
        "now 4 by pillar",
        " running",
        " waiting",
        " of the KV pool",
    ):
        assert wanted in first
    running, waiting = (int(re.search(rf"(\d+) {word}", first).group(1)) for word in ("running", "waiting"))
    assert 1 <= running <= 3  # max_requests
    assert waiting >= 1
    assert last.startswith("7/7 texts")
    assert " of 4.00 drafts accepted" in last
    fast.generate_batch(prompts, GREEDY)
    assert capsys.readouterr().err == ""


def test_no_prompts(fast):
    assert fast.generate_batch([]) == []
    assert list(fast.stream([])) == []


def test_requests_that_cannot_fit(model):
    small = ss.optimize(model, ss.SpecConfig(pool_tokens=64))
    with pytest.raises(PoolTooSmallError):
        small.generate_batch([[1, 2]], ss.SamplingParams(max_new_tokens=100))


def test_a_captured_step_that_is_wrong(fast):
    for sizes in ((0, 10), (2, 0), (True, 10), (2, 1.5)):
        with pytest.raises(ConfigError, match="must be an integer of at least 1"):
            fast.capture(*sizes)


def test_generate_returns_whole_texts_or_none(model, monkeypatch):
    def refuse(device, shape, dtype):
        block = Future()
        block.set_exception(RuntimeError("CUDA error: out of memory"))
        return block

    monkeypatch.setattr(CpuDevice, "host_block", refuse)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=8, page_size=4, pool_tokens=64, host_pool_tokens=4096))
    with pytest.raises(PoolTooSmallError, match="neither by the KV pool nor by host memory"):
        fast.generate(torch.ones(4, 5, dtype=torch.int64), max_new_tokens=50, eos_token_id=None)
    assert fast.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=50, eos_token_id=None).shape == (1, 55)


def test_a_stream_that_is_dropped_in_the_middle_leaves_the_model_usable(fast):
    gc.disable()  # nothing is left for it to find
    try:
        for _ in fast.stream([[1, 2, 3], [4, 5]], GREEDY):
            break
        assert len(fast.generate_batch([[1, 2, 3]], GREEDY)) == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("index", ["1", 1.0, True, None])
def test_a_prompt_is_cancelled_by_its_number(fast, index):
    with fast.stream([[1, 2, 3], [4, 5]], GREEDY) as pieces, pytest.raises(PromptError, match="There is no prompt"):
        pieces.cancel(index)


def test_texts_and_chats_with_a_tokenizer(fast):
    tokenizer = letters()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    ids, sampling = tokenizer("adaf").input_ids, ss.SamplingParams(max_new_tokens=6)
    (expected,) = fast.generate_batch([ids], sampling)
    prompts = ["adaf", [{"role": "user", "content": "adaf"}], ids]
    for completion in fast.generate_batch(prompts, sampling, tokenizer=tokenizer):
        assert completion.token_ids == expected.token_ids
        assert completion.text == tokenizer.decode(expected.token_ids, skip_special_tokens=True)
    with pytest.raises(ss.errors.TokenizerError, match="generated without a tokenizer"):
        expected.text  # noqa: B018
