"""Kernels compiled beside `optimize`: exactly those of the steps that follow, each once, and failures come out."""

import dataclasses
import os
import threading
from contextlib import contextmanager

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch.utils._python_dispatch import TorchDispatchMode

import sparsespec_compile as ss
from sparsespec_compile.compile import target, warm_up
from sparsespec_compile.compile.warm_up import (
    Attention,
    Draw,
    Product,
    Proposals,
    Quantisation,
    Selection,
    calls_of,
    done_beside,
)
from sparsespec_compile.kernels.launch import Promise, kind_of_step
from sparsespec_compile.kernels.ops import Mode, draw_tokens, dual_mode_attention, select_pillars
from sparsespec_compile.runtime.device.inputs import Work
from sparsespec_compile.runtime.device.step import Variant

from ..passes.families import tiny

launcher = pytest.importorskip(
    "sparsespec_compile.kernels.attention.launcher", reason="Triton is published for Linux only"
)

LARGE = ss.SpecConfig(max_requests=4, prefill_chunk=2764)
"""Its largest step has 2800 rows, which with 6 query heads makes it one that prefills."""

CPU = torch.device("cpu")


class Variants(TorchDispatchMode):
    """Notes what of each call of our ops decides on the kernel it takes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is dual_mode_attention:
            self.seen.append(attention_variant(*args))
        elif func is draw_tokens:
            self.seen.append(("draw", *(pattern(tensor) for tensor in args), args[0].shape[1]))
        elif func is select_pillars:
            self.seen.append(("select", pattern(args[0]), max(64, args[1].shape[0])))
        return func(*args, **(kwargs or {}))


def attention_variant(q, k, v, kv, scores, mode, *rest):
    *_, scale, window, softcap, chunked, sinks = rest
    units = launcher.pool_units(kv)
    del units["page_units"]  # any value takes the same kernel
    return (
        *map(pattern, (q, k, v)),
        pattern(kv[0]),
        tuple(tuple(tensor.shape[1:]) for tensor in (q, k, v, kv)),
        tuple(units.items()),
        max(64, mode.shape[0]),
        kind_of_step(q.shape[0], q.shape[1], mode.shape[0]),
        (scale > 0, window > 0, softcap > 0, chunked, None if sinks is None else sinks.dtype),
    )


def pattern(tensor):
    strides = tuple((stride == 1, stride % 16 == 0) for stride in tensor.stride())
    return tensor.dtype, tensor.data_ptr() % 16 == 0, strides


def variants_of(run):
    with Variants() as recorder:
        run()
    return recorder.seen


@pytest.mark.parametrize(
    ("family", "dims", "settings"),
    [
        ("qwen2", {}, {}),
        ("qwen2", {}, {"drafter": "window"}),
        ("gemma3_text", {}, {}),
        ("gpt2", {}, {}),
        ("gpt_oss", {}, {}),
        ("deepseek_v3", {}, {}),
        # The second layer's part of a page begins at no multiple of 16 bytes.
        ("deepseek_v3", {"v_head_dim": 11}, {"page_size": 1}),
    ],
)
def test_variants_are_those_of_real_steps_each_once(family, dims, settings):
    config = dataclasses.replace(LARGE, **settings)
    fast = ss.optimize(tiny(family, **dims), config)
    step = fast.capture(max_requests=4, max_length=64)

    def steps():
        for rows in (16, 2800):
            step.replay(rows, 16)
        step._runner(16, 16, Variant(promise=Promise.NO_SCORES))  # as the engine verifies drafts from the text
        for slot in range(2):
            step.begin(slot, 64)
        step.fill([Work(slot, Mode.PREFILL, 1, tokens=[1], logits=1) for slot in range(2)])
        step.fill([Work(slot, Mode.VERIFY, 1, logits=1) for slot in range(2)])  # no request has several rows
        step.replay()

    def warm():
        for call in calls_of(fast._compiled, config):
            call.run(CPU)

    compiled = variants_of(warm)
    assert len(compiled) == len(set(compiled))
    assert set(compiled) == set(variants_of(steps))


def test_products_with_8_bit_weights_are_those_of_iterations_of_drafts(compiled):
    """For the padded rows of up to a row for each slot; and what makes each kind of copy."""
    config = ss.SpecConfig(draft_tokens=2, draft_weights="int8", max_requests=20, prefill_chunk=100)
    fast = ss.optimize(tiny("qwen2", num_hidden_layers=3), config)
    calls = calls_of(fast._compiled, config)
    products = [call for call in calls if isinstance(call, Product)]
    quantisations = [call for call in calls if isinstance(call, Quantisation)]
    hidden, mlp, vocabulary = 48, 96, 151
    assert sorted((call.columns, call.inputs[0].size[-1]) for call in products) == sorted(
        [(6 * 8 + 2 * 8, hidden), (hidden, hidden), (2 * mlp, hidden), (hidden, mlp), (vocabulary, hidden)]
    )
    assert {tuple(layout.size[1] for layout in call.inputs) for call in products} == {(2, 16, 64)}
    assert sorted(call.inner for call in quantisations) == [hidden, mlp]
    for call in (*products, *quantisations):
        call.run(CPU)
    assert not any(isinstance(call, Product | Quantisation) for call in calls_of(compiled, config))


@pytest.mark.gpu
def test_nothing_of_8_bit_drafts_is_compiled_after_optimize():
    config = ss.SpecConfig(draft_tokens=2, draft_weights="int8", max_requests=4, max_length=256)
    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "head_dim": 64}
    model = tiny("qwen3", **wide).bfloat16().cuda()
    fast = ss.optimize(model, config)
    from sparsespec_compile.kernels.products import quantised

    kernels = quantised.quantise_kernel, quantised.product_kernel

    def compiled():
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    before = compiled()
    fast.generate_batch([[5, 6, 7]] * 4, ss.SamplingParams(max_new_tokens=20, stop_token_ids=()))
    assert fast.stats.draft_weight_iterations > 0
    assert before == compiled()
    assert min(before) > 0


def test_without_prompts_there_are_two_kernels_for_each_kind_of_layer():
    model = tiny("gemma3_text", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3)
    fast = ss.optimize(model, ss.SpecConfig(draft_tokens=8))
    attention = [call for call in calls_of(fast._compiled, fast.spec_config) if isinstance(call, Attention)]
    assert sorted(call.settings.window for call in attention) == [0, 0, 1, 1]


def test_chunks_have_kernels_of_their_own():
    fast = ss.optimize(tiny("llama4_text"), ss.SpecConfig(draft_tokens=8))
    attention = [call for call in calls_of(fast._compiled, fast.spec_config) if isinstance(call, Attention)]
    kinds = sorted((call.settings.window, call.settings.chunked) for call in attention)
    assert kinds == [(0, False), (0, False), (1, True), (1, True)]


@pytest.fixture(scope="module")
def compiled():
    """A model with exact weights. Its graph is the same whatever drafts it."""
    return ss.optimize(tiny("qwen3"))._compiled


def test_auto_compiles_what_each_drafter_takes(compiled):
    """A third kernel without scores, for iterations that verify drafts from the text."""
    calls = calls_of(compiled, ss.SpecConfig())
    promises = {call.promise for call in calls if isinstance(call, Attention)}
    assert promises == {Promise.NOTHING, Promise.NO_SCORES, Promise.SMALL_TILES}
    assert {type(call) for call in calls} == {Attention, Draw, Selection, Proposals}


@pytest.mark.parametrize("settings", [{"drafter": "window"}, {"drafter": "full"}, {"draft_tokens": 0}])
def test_what_selects_no_pillars_compiles_no_selection(compiled, settings):
    assert not any(isinstance(call, Selection) for call in calls_of(compiled, ss.SpecConfig(**settings)))


def test_the_default_dtype_does_not_matter(compiled):
    calls = calls_of(compiled, ss.SpecConfig())
    torch.set_default_dtype(torch.bfloat16)
    try:
        for call in calls:
            call.run(CPU)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(warm_up, "ThreadPoolExecutor", None)
    monkeypatch.setattr(warm_up, "calls_of", None)
    ss.optimize(tiny("qwen3", num_hidden_layers=1))


def test_regions_are_compiled_meanwhile(monkeypatch):
    order = []

    @contextmanager
    def beside(compiled, config, device):
        order.append("kernels begin")
        yield
        order.append("kernels done")

    def regions(compiled):
        order.append("regions")
        return compiled.graph_module, None

    monkeypatch.setattr(target, "_settle_kernel_cache", lambda device: order.append("cache settled"))
    monkeypatch.setattr(target, "kernels_compiled_beside", beside)
    monkeypatch.setattr(target, "_compile_regions", regions)
    ss.optimize(tiny("qwen3", num_hidden_layers=1), ss.SpecConfig(backend="inductor"))
    assert order == ["cache settled", "kernels begin", "regions", "kernels done"]


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [("cuda:0", None, triton_cache_dir(0)), ("cuda:0", "/of/the/user", "/of/the/user"), ("cpu", None, None)],
)
def test_kernels_are_looked_for_where_inductor_will_look(device, before, after, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", before or "")
    if before is None:
        monkeypatch.delenv("TRITON_CACHE_DIR")
    target._settle_kernel_cache(torch.device(device))
    assert os.environ.get("TRITON_CACHE_DIR") == after


def test_jobs_run_beside_the_body_and_are_done_behind_it():
    begun, done = threading.Event(), threading.Event()

    def job():
        begun.set()
        assert body.wait(10)
        done.set()

    body = threading.Event()
    with done_beside([job]):
        assert begun.wait(10)
        body.set()
    assert done.is_set()


def test_an_error_of_a_job_comes_out_behind_the_body():
    error = RuntimeError("no kernel")

    def fail():
        raise error

    with pytest.raises(RuntimeError) as caught, done_beside([lambda: None, fail]):
        pass
    assert caught.value is error


def test_a_body_that_fails_waits_for_no_job():
    released = threading.Event()
    with pytest.raises(KeyboardInterrupt), done_beside([lambda: released.wait(60)]):
        raise KeyboardInterrupt
    assert not released.is_set()
    released.set()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "settings"),  # no other test has pages of those sizes
    [
        ("qwen3", {"page_size": 128}),
        ("gemma3_text", {"page_size": 128, "backend": "eager"}),
        ("qwen3", {"page_size": 256, "drafter": "window", "backend": "eager"}),
    ],
)
def test_a_generation_compiles_no_kernel_of_the_first_steps(family, settings, monkeypatch):
    import triton

    compiled = []

    def note(*, fn, **rest):
        compiled.append(fn.name.rpartition(".")[2])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    model = tiny(family, num_attention_heads=8).cuda()
    fast = ss.optimize(model, ss.SpecConfig(**settings))
    attention = [call for call in calls_of(fast._compiled, fast.spec_config) if isinstance(call, Attention)]
    assert compiled.count("attention_kernel") == len(attention)
    compiled.clear()
    fast.generate_batch([list(range(2, 40)), list(range(2, 90))], ss.SamplingParams(max_new_tokens=30))
    ours = {"attention_kernel", "score_kernel", "filter_kernel", "draw_kernel", "join_kernel", "select_kernel"}
    assert not ours & set(compiled)
