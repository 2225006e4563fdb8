"""Before the first request: which steps run, so that what compiles and times itself does so then."""

import re
from functools import partial

import pytest
import torch

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import MemoryPlanError
from sparsespec_compile.passes.layout import AttentionLayer, KVLayout
from sparsespec_compile.runtime.build import (
    Target,
    _plan_copies,
    _plan_memory,
    engine_capacity,
    first_runs,
    pages_of,
)
from sparsespec_compile.runtime.device.devices import CpuDevice
from sparsespec_compile.runtime.device.drafters import drafters_of
from sparsespec_compile.runtime.device.inputs import InputSizes
from sparsespec_compile.runtime.device.state import page_bytes, state_bytes
from sparsespec_compile.runtime.device.weights import DraftGraph
from sparsespec_compile.runtime.host.phases import GROUPED_ROWS


@pytest.mark.parametrize(
    ("slots", "rows", "logits", "expected"),
    [
        (64, 2880, 832, [(251, 250), (2880, 832)]),
        (64, 2112, 64, [(251, 63), (2112, 64)]),
        (2, 40, 18, [(40, 18)]),
    ],
)
def test_block_sizes_are_timed_on_a_decoding_step(slots, rows, logits, expected):
    """Rows, rows with logits and slots differ in the first one, so that no compiler takes two of them for one size."""
    sizes = InputSizes(slots=slots, rows=rows, logits=logits, request_pages=4, updates=8)
    assert first_runs(sizes) == expected


GIB = 2**30
QWEN3_8B = KVLayout(tuple(AttentionLayer(i, 32, 8, 128, 128, 1.0, 0, 0.0) for i in range(36)), page_size=16)


class Gpu(CpuDevice):
    """A device with so many free bytes."""

    def __init__(self, free):
        self._free = free

    @property
    def memory(self):
        return self

    def free(self):
        return self._free


def capacity(free, positions=40960, longest=0, layout=QWEN3_8B, **settings):
    config = SpecConfig(**settings)
    target = Target(None, layout, torch.bfloat16, torch.device("cpu"), positions=positions)
    return engine_capacity(target, config, drafters_of(config), Gpu(free), longest)


def test_the_state_is_sized_for_the_configuration_whatever_is_asked_first():
    sizes = capacity(120 * GIB, draft_tokens=8)
    assert (sizes.slots, sizes.tokens, sizes.score_slots) == (64, 40960, GROUPED_ROWS // 9)
    assert sizes.pages == 64 * 40960 // 16
    assert capacity(120 * GIB, draft_tokens=8, max_length=1000, max_requests=4).tokens == 1000
    assert capacity(120 * GIB, draft_tokens=8, pool_tokens=4096).pages == 256
    assert capacity(120 * GIB, draft_tokens=8, pool_tokens=4096).tokens == 4096


def test_what_grows_with_the_longest_text_takes_a_tenth_of_the_memory_at_most():
    for free in (4, 12, 40):
        sizes = capacity(free * GIB, positions=131072, draft_tokens="auto")
        parts = state_bytes(QWEN3_8B, sizes, torch.bfloat16)
        grows = sum(parts.values()) - parts["KV pool"]
        assert grows <= 0.1 * 0.9 * free * GIB or sizes.tokens == 1024
        assert 1024 <= sizes.tokens < 131072
    assert capacity(4 * GIB, positions=131072, longest=50_000).tokens == 50_000, "it was asked for"
    assert capacity(4 * GIB, positions=131072, max_length=131072).tokens == 131072


def test_memory_fraction_is_of_what_is_free_beside_the_weights():
    config = SpecConfig(draft_tokens=8, memory_fraction=0.4)
    target = Target(None, QWEN3_8B, torch.bfloat16, torch.device("cpu"), weight_bytes=60 * GIB)
    sizes = engine_capacity(target, config, drafters_of(config), Gpu(40 * GIB), 0)
    state = state_bytes(QWEN3_8B, sizes, torch.bfloat16)
    rest = sum(state.values()) - state["KV pool"]
    plan = _plan_memory(target, config, sizes, workspace=GIB, memory=Gpu(40 * GIB - rest))
    used = plan.total - plan.parts["weights"]
    assert 0.39 * 40 * GIB < used <= 0.4 * 40 * GIB
    with pytest.raises(MemoryPlanError, match=r"may be used, and .* are needed: weights 60\.00"):
        _plan_memory(target, config, sizes, workspace=30 * GIB, memory=Gpu(40 * GIB - rest))


class Copies:
    """Copies of so many GiB, of which none is held."""

    kind, count, held_bytes = "int8", 253, 0

    def __init__(self, gib):
        self.bytes = gib * GIB


def plan_with_copies(free, asked=0, gib=8, required=False, **settings):
    """The plan for Qwen3-8B's cache beside 15 GiB of weights, and what is reported."""
    config = SpecConfig(draft_tokens=8, max_length=16384, **settings)
    target = Target(None, QWEN3_8B, torch.bfloat16, torch.device("cpu"), weight_bytes=15 * GIB)
    sizes = engine_capacity(target, config, drafters_of(config), Gpu(free * GIB), 0)
    state = state_bytes(QWEN3_8B, sizes, torch.bfloat16)
    memory = Gpu(free * GIB - sum(state.values()) + state["KV pool"])
    told = []
    drafts = DraftGraph(None, Copies(gib), required, told.append)
    plan_for = partial(_plan_memory, target, config, sizes, GIB, memory)
    return _plan_copies(drafts, plan_for, plan_for(None), asked * GIB), told[-1]


def test_copies_of_weights_take_their_part_of_the_memory():
    plan, report = plan_with_copies(120)
    without, _ = plan_with_copies(120, gib=60)
    assert plan.parts["8-bit draft weights"] == 8 * GIB
    assert plan.available == without.available
    assert without.parts["KV pool"] - plan.parts["KV pool"] == pytest.approx(8 * GIB, rel=1e-3)
    assert report == "int8 copies of 253 weights, 8.00 GiB"


@pytest.mark.parametrize(
    ("free", "settings", "reason"),
    [
        (30, {}, "30% of what may be used beside the weights, and 25% are the limit"),
        (120, {"asked": 95}, "the KV pool would have .* GiB, and the requests need 95.00 GiB"),
        (40, {"pool_tokens": 16 * 15000}, "GiB of the device may be used, and .* are needed"),
    ],
)
def test_copies_are_left_out_where_memory_is_short(free, settings, reason):
    plan, report = plan_with_copies(free, **settings)
    assert "8-bit draft weights" not in plan.parts
    assert re.fullmatch(f"exact weights, as int8 copies would take 8.00 GiB: .*{reason}.*", report)


@pytest.mark.parametrize("asked", [10, 500])
def test_copies_stay_where_the_requests_fit_beside_them_or_do_not_fit_anyway(asked):
    assert "8-bit draft weights" in plan_with_copies(120, asked)[0].parts


def test_copies_that_are_asked_for_by_name_are_never_left_out():
    assert "8-bit draft weights" in plan_with_copies(30, required=True)[0].parts
    assert "8-bit draft weights" in plan_with_copies(120, asked=95, required=True)[0].parts
    figures = (
        r"may be used, and .* are needed: weights 15\.00, KV pool .* 8-bit draft weights 40\.00.*draft_weights='exact'"
    )
    with pytest.raises(MemoryPlanError, match=figures):
        plan_with_copies(30, gib=40, required=True)


def test_the_pages_that_requests_need_are_those_of_as_many_as_run_together():
    config = SpecConfig(draft_tokens=8, max_requests=2)
    assert pages_of(QWEN3_8B, config, [160, 16, 1600]) == 110


def test_a_gemma_s_pool_takes_less_than_a_third_of_whole_pages():
    """Gemma-3's shape, five layers with a window of 1,024 for each without: 32 requests of 32,768 tokens."""
    layers = [AttentionLayer(i, 8, 4, 256, 256, 1.0, 0 if i % 6 == 5 else 1024, 0.0) for i in range(48)]
    kinds = KVLayout(tuple(layers), page_size=16)
    sizes = capacity(10**4 * GIB, positions=32768, layout=kinds, max_requests=32)
    whole = 32 * 32768 * sum(layer.elements_per_token() for layer in layers) * 2
    assert sizes.pages * page_bytes(kinds, torch.bfloat16) <= 0.3 * whole
