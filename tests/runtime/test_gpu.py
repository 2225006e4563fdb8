"""What only a GPU shows of the engine: captured steps, copies beside running steps, an idle host."""

from dataclasses import replace

import pytest
import torch

import sparsespec_compile as ss

from ..support.models import VOCABULARY, tiny

pytestmark = pytest.mark.gpu

LENGTHS = (3, 41, 17, 1, 9, 26, 5, 60)


@pytest.fixture(scope="module")
def model():
    return tiny("qwen3").cuda()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def sampling():
    return [
        ss.SamplingParams(max_new_tokens=40 + i, temperature=0.8 * (i % 2), seed=i, stop_token_ids=())
        for i in range(len(LENGTHS))
    ]


def texts(model, prompts, sampling, **settings):
    fast = ss.optimize(model, ss.SpecConfig(**{"draft_tokens": 4, "min_budget": 8, "page_size": 4, **settings}))
    return [completion.token_ids for completion in fast.generate_batch(prompts, sampling)], fast


@pytest.fixture(scope="module")
def expected(model, prompts, sampling):
    """Token by token, node by node, no graphs, no overlap."""
    plain = {"draft_tokens": 0, "backend": "eager", "cuda_graphs": False, "overlap": False}
    return texts(model, prompts, sampling, **plain)[0]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_captured_steps_write_the_same_texts(model, prompts, sampling, expected, cuda_graphs, backend):
    got, fast = texts(model, prompts, sampling, cuda_graphs=cuda_graphs, backend=backend)
    assert got == expected
    assert [c.token_ids for c in fast.generate_batch(prompts[::-1], sampling[::-1])] == expected[::-1]


def every_third(ids, scores):
    scores[:, int(ids[0, -1]) % 3 :: 3] = float("-inf")
    return scores


@pytest.mark.parametrize(
    "settings",
    [{}, {"backend": "eager"}, {"drafter": "ngram"}, {"draft_tokens": 6, "draft_proposals": 2}],
    ids=str,
)
def test_processed_logits_in_captured_steps_write_the_same_texts(model, prompts, sampling, settings):
    """Some requests by the op, which is captured, some by a function, which is not, some by neither."""
    asked = [
        {},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"presence_penalty": 0.5, "logit_bias": {3: 2.0}},
    ]
    asked += [{"logits_processor": [every_third]}, {"bad_words_ids": [[5], [7, 9]], "frequency_penalty": 0.3}]
    mixed = [replace(params, **asked[nth % len(asked)]) for nth, params in enumerate(sampling)]
    plain = {"draft_tokens": 0, "backend": "eager", "cuda_graphs": False, "overlap": False}
    expected, _ = texts(model, prompts, mixed, **plain)
    got, fast = texts(model, prompts, mixed, **settings)
    assert got == expected
    by_op = [nth for nth, params in enumerate(mixed) if params.logits_processor is None]
    again = fast.generate_batch([prompts[nth] for nth in by_op], [mixed[nth] for nth in by_op])  # all steps captured
    assert [text.token_ids for text in again] == [expected[nth] for nth in by_op]


def test_requests_that_leave_the_gpu_come_back_whole(model, prompts, sampling, expected):
    got, fast = texts(model, prompts, sampling, pool_tokens=160, host_pool_tokens=4096)
    assert got == expected
    assert fast.stats.pages_offloaded > 20
    assert fast.stats.pages_held == 0


def test_captured_step_for_a_loop_of_ones_own(model, prompts):
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=4))
    step = fast.capture(max_requests=2, max_length=64)
    prompt = prompts[2]
    step.begin(0, 64)
    step.fill([ss.Work(0, ss.Mode.PREFILL, rows=len(prompt), tokens=prompt, logits=1)])
    text = []
    while len(text) < 30:
        text.append(int(step.replay().tokens[0, 1]))
        step.fill([ss.Work(0, ss.Mode.VERIFY, rows=1, logits=1)])
    greedy = ss.SamplingParams(max_new_tokens=30, stop_token_ids=())
    assert text == fast.generate_batch([prompt], greedy)[0].token_ids


def test_memory_plan_is_what_is_taken(model, prompts, sampling):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    _, fast = texts(model, prompts, sampling)
    plan = fast.memory_plan
    taken = torch.cuda.memory_allocated() - before
    state = sum(size for name, size in plan.parts.items() if name not in ("weights", "CUDA graphs"))
    assert plan.total <= plan.available
    assert taken <= state + 64 * 2**20


def test_a_pool_that_cannot_fit_is_refused_with_figures(model, prompts):
    fast = ss.optimize(model, ss.SpecConfig(pool_tokens=2**36))
    with pytest.raises(ss.SparseSpecError, match=r"GiB of the device may be used|No memory"):
        fast.generate_batch(prompts)
