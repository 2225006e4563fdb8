"""Ranks that share a model agree, or all of them end within a time and say why."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import sparsespec_compile as ss
from sparsespec_compile.errors import ConfigError, PoolTooSmallError, RanksDifferError, RanksEndedError
from sparsespec_compile.passes.ranks import Ranks
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.state import State
from sparsespec_compile.runtime.device.weights import DraftCopies
from sparsespec_compile.runtime.host.ranks import _KEPT, Agreement

from ..support.models import left_padded, tiny
from ..support.ranks import BEGAN, RankError, _collect, run_ranks

TIMEOUT = 2.0
"""Seconds that a rank may be away where a test is about a rank that is away."""

PATIENT = 600.0
"""... where it is not: a busy machine may keep a process from running for some seconds."""


def agreement(rank, size, timeout=PATIENT):
    return Agreement(Ranks(rank, size, dist.group.WORLD.group_name), timeout)


def iterate(together, inputs=0, sleep=0.0):
    """An iteration, with a collective; returns what ended it, as text."""
    try:
        with together.iteration():
            together.planned(np.array([inputs], dtype=np.int32))
            time.sleep(sleep)
            dist.all_reduce(torch.ones(2))
    except (RanksEndedError, RanksDifferError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def until_ended(together, seconds=60.0, **how):
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        text = iterate(together, sleep=0.02, **how)
        if text is not None:
            return text
    return "not ended"


def agree(rank, size):
    together = agreement(rank, size)
    assert [iterate(together) for _ in range(3)] == [None] * 3
    shared = together.share({"seeds": [2**62 + rank]})
    least = together.least(10 + rank, 20 - rank)
    together.agree("requests", [1, "a"])
    return shared, least


def far_apart(rank, size):
    """Rank 0 tells many values before rank 1 asks for the first; returns the keys that the store holds in the end."""
    together = agreement(rank, size)
    if rank == 1:
        time.sleep(1.0)
    for number in range(5 * _KEPT):
        assert together.share(number) == number
    assert together.least(rank) == [0]
    return together._store.num_keys()


def test_the_time_until_all_ranks_have_begun_does_not_count():
    """As while their server imports."""
    ours, theirs = zip(*(multiprocessing.Pipe(duplex=False) for _ in range(2)), strict=True)

    def run():
        time.sleep(1.5)
        for pipe in theirs:
            pipe.send_bytes(pickle.dumps(BEGAN))
            pipe.send_bytes(pickle.dumps((True, 5)))

    thread = threading.Thread(target=run)
    thread.start()
    assert _collect(list(ours), timeout=1.0) == [(True, 5)] * 2
    thread.join()


def test_what_rank_0_says_and_the_least_of_all():
    assert run_ranks(agree, 2, timeout=60) == [({"seeds": [2**62]}, [10, 19])] * 2


def test_a_rank_may_be_many_values_behind_and_what_all_have_read_is_forgotten():
    for kept in run_ranks(far_apart, 2, timeout=60):
        assert kept < 3 * _KEPT


def other_requests(rank, size):
    together = agreement(rank, size)
    try:
        together.agree("requests", rank)
    except RanksDifferError as error:
        return str(error)
    while together.failure is None:  # rank 0 hears of it at its next look
        time.sleep(0.01)
    with pytest.raises(RanksDifferError) as caught:
        together.share(1)
    return str(caught.value)


def test_other_requests_end_all_ranks():
    for text in run_ranks(other_requests, 2, timeout=60):
        assert "rank 1 has other requests than rank 0: 1, not 0" in text


def other_plans(rank, size):
    return until_ended(agreement(rank, size), inputs=rank)


def test_other_plans_end_all_ranks():
    for text in run_ranks(other_plans, 2, timeout=60):
        assert text.startswith(
            "RanksDifferError: The ranks that share the model have ended together: rank 1 has planned"
        )


def one_fails(rank, size):
    together = agreement(rank, size)
    iterate(together)
    if rank == 1:
        together.fail("rank 1 failed by ValueError: no luck")
        return iterate(together)
    return until_ended(together)


def test_an_iteration_that_fails_on_one_rank_ends_all():
    for text in run_ranks(one_fails, 2, timeout=60):
        assert text.startswith("RanksEndedError")
        assert "rank 1 failed by ValueError: no luck. Start all of them again." in text


def one_leaves(rank, size):
    together = agreement(rank, size)
    iterate(together)
    if rank == 1:
        together._at_exit()  # as at the end of a process
        return None
    return until_ended(together)


def test_a_process_that_ends_ends_all():
    text, _ = run_ranks(one_leaves, 2, timeout=60)
    assert "RanksEndedError" in text
    assert "the process of rank 1 has ended" in text


def one_dies(rank, size):
    together = agreement(rank, size, TIMEOUT)
    iterate(together)
    if rank == 1:
        os._exit(3)
    text = until_ended(together)
    assert "nothing has been heard of rank 1 for 2 s" in text, text


def test_a_process_that_dies_ends_all():
    with pytest.raises(RankError, match=r"^rank 1: died[^\n]*$"):  # and rank 0 found what it expected
        run_ranks(one_dies, 2, timeout=60)


def one_stays_away(rank, size, told):
    sys.stderr = open(f"{told}{rank}", "w")  # noqa: SIM115  until the process ends
    together = agreement(rank, size, TIMEOUT)
    iterate(together)
    if rank == 1:
        began = time.monotonic()
        while "RanksEndedError" not in Path(f"{told}0").read_text() and time.monotonic() < began + 60:
            time.sleep(0.1)  # alive, but not in the iteration in which rank 0 waits
        return None
    return until_ended(together)


def test_a_rank_that_stays_away_ends_those_that_wait_within_a_collective(tmp_path):
    with pytest.raises(RankError, match="rank 0: died"):
        run_ranks(one_stays_away, 2, str(tmp_path / "told"), timeout=60)
    told = (tmp_path / "told0").read_text()
    assert "RanksEndedError" in told
    assert "rank 0 has waited 2 s in iteration 2 for rank 1, which has stayed outside since iteration 1" in told


def shared(size, **settings):
    """A model that ranks share, float32."""
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, head_dim=16)
    settings = {"max_length": 128, "rank_timeout": PATIENT, **settings}
    return ss.optimize(model, ss.SpecConfig(tensor_parallel=size, **settings))


def written(fast, prompt=(1, 2, 3), tokens=12):
    (one,) = fast.generate_batch([list(prompt)], ss.SamplingParams(max_new_tokens=tokens))
    return one.token_ids


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("none is left")


def short_of_memory(rank, size):
    """Where rank 1 has no memory for its pool: what each rank says, and what it writes when there is some again."""
    fast, give = shared(size), State.give_pool
    if rank == 1:
        State.give_pool = no_memory
    with pytest.raises(PoolTooSmallError) as caught:
        written(fast)
    State.give_pool = give
    return str(caught.value), written(fast)


def test_a_rank_without_memory_for_its_state_refuses_for_all_and_they_go_on_together():
    (told, text), (own, same) = run_ranks(short_of_memory, 2, timeout=300)
    assert told.startswith("Rank 1, which shares the model, has no memory for its part. No memory for the state of")
    assert own.startswith("No memory for the state of")
    assert text == same
    assert len(text) == 12


def fails_to_capture(rank, size):
    """Where rank 1 has no memory for its graphs, while rank 0 goes on into an iteration."""
    fast = shared(size)
    written(fast)
    if rank == 1:
        StepRunner.prepare = no_memory
    with pytest.raises((RanksEndedError, torch.OutOfMemoryError)) as caught:
        written(fast)
    return str(caught.value)


def test_a_rank_without_memory_for_a_graph_ends_all_with_the_reason():
    told, own = run_ranks(fails_to_capture, 2, timeout=300)
    assert "have ended together: rank 1 failed by OutOfMemoryError: none is left" in told
    assert own == "none is left"


def changed_on_one_rank(rank, size):
    """Prompt tokens that were taken and how often copies were made, before and after rank 1 alone changes a weight."""
    fast, made, copy = shared(size, draft_tokens=3, draft_weights="int8", page_size=8), [], DraftCopies._copy
    DraftCopies._copy = lambda copies: made.append(1) or copy(copies)
    prompt, found = list(range(2, 60)), []
    for run in range(3):
        if run == 2 and rank == 1:
            fast.model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
        text = written(fast, prompt, 30)
        found.append((text, fast.stats.cached_tokens, len(made)))
    return found


def test_a_weight_that_changes_on_one_rank_is_new_on_all():
    """All forget shared prompts, and make copies anew: else they would plan other iterations, or hang."""
    one, other = run_ranks(changed_on_one_rank, 2, timeout=300)
    assert one == other
    (text, *_), (same, taken, copied), (changed, taken_then, copied_then) = one
    assert text == same != changed
    assert taken > 40
    assert taken_then == 0
    assert copied_then > copied


def generate(rank, size):
    """Sampled texts without seeds and with drafts by measured times; then rank 1's loop fails."""
    torch.manual_seed(rank)
    config = ss.SpecConfig(min_budget=12, max_length=256, tensor_parallel=size, rank_timeout=PATIENT)
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, head_dim=16)
    fast = ss.optimize(model, config)
    ids, mask = left_padded(3, 41)
    text = fast.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=150).tolist()
    with pytest.raises(ConfigError, match="background=True"):
        fast.stream([[1, 2]], background=True)
    try:
        for _ in fast.stream([[1, 2, 3]] * 2, ss.SamplingParams(max_new_tokens=100, temperature=1.0)):
            if rank == 1:
                raise ValueError("the loop's own")
    except ValueError:
        fast._engine._agreement._at_exit()  # the process would end here
        return text, "its own"
    except RanksEndedError as error:
        return text, str(error)


@pytest.mark.slow
def test_texts_without_seeds_and_a_loop_that_fails_on_one_rank():
    (text, why), (same, own) = run_ranks(generate, 2, timeout=240)
    assert text == same
    assert own == "its own"
    assert "the process of rank 1 has ended" in why


def other_prompts(rank, size):
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, head_dim=16)
    fast = ss.optimize(model, ss.SpecConfig(max_length=64, tensor_parallel=size, rank_timeout=PATIENT))
    with pytest.raises((RanksDifferError, RanksEndedError), match="rank 1 has other requests"):
        fast.generate_batch([[1, 2, 3 + rank]], ss.SamplingParams(max_new_tokens=30))


@pytest.mark.slow
def test_other_prompts_on_one_rank_are_refused_on_all():
    run_ranks(other_prompts, 2, timeout=240)


def crowded(rank, size):
    """Texts of more requests than the pool holds, and how many pages went to host memory."""
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, head_dim=16)
    config = ss.SpecConfig(
        draft_tokens=3, page_size=4, pool_tokens=160, host_pool_tokens=4096, max_length=80, tensor_parallel=size
    )
    fast = ss.optimize(model, config)
    sampling = ss.SamplingParams(max_new_tokens=50, temperature=0.8, top_k=20, seed=4)
    written = fast.generate_batch([[1, 2, 3 + number] for number in range(8)], sampling)
    return [one.token_ids for one in written], fast.stats.pages_offloaded


@pytest.mark.slow
def test_requests_that_leave_the_device_write_the_texts_of_one_rank():
    (texts, moved), *others = run_ranks(crowded, 2, timeout=240)
    assert moved > 20
    assert others == [(texts, moved)]
    assert texts == crowded(0, 1)[0]


def interrupted(rank, size):
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64, head_dim=16)
    fast = ss.optimize(model, ss.SpecConfig(max_length=1024, tensor_parallel=size, rank_timeout=PATIENT))
    fast.generate_batch([[1, 2]], ss.SamplingParams(max_new_tokens=4))
    if rank == 1:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    try:
        while True:
            fast.generate_batch([[1, 2, 3]], ss.SamplingParams(max_new_tokens=900))
    except KeyboardInterrupt:
        fast._engine._agreement._at_exit()
        return "interrupted"
    except RanksEndedError as error:
        return str(error)


@pytest.mark.slow
def test_an_interrupt_of_one_rank_ends_all():
    told, own = run_ranks(interrupted, 2, timeout=240)
    assert own == "interrupted"
    assert "failed by KeyboardInterrupt" in told or "the process of rank 1 has ended" in told
