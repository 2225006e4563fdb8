"""Prompts whose K/V are computed once: the same texts, by engines that read what another one has computed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from sparsespec_compile.runtime.device.devices import open_device
from sparsespec_compile.runtime.host.engine import Engine
from tests.support.toy import Toy, requests_of, run, state_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kept_prompts
from kept_prompts import KeptPool, KeptPrompts

LENGTHS = (150, 97, 64, 20)
NEW_TOKENS = 40


def engines(toy, *all_settings):
    """Engines over one pool, one after the other, and the prompts that they share."""
    prompts = KeptPrompts([request.prompt for request in requests_of(LENGTHS, NEW_TOKENS)], page_size=16)
    tokens = prompts.pool_tokens(len(LENGTHS), NEW_TOKENS)
    device = None
    for settings in all_settings:
        first = toy.engine(pool_tokens=tokens, prefill_chunk=64, host_pool_tokens=0, **settings)
        device = device or KeptPool(first.target)
        engine = Engine(first.target, first.config, device)
        prompts.give(engine)
        yield engine, prompts
        engine.release()


def test_texts_of_kept_prompts():
    toy = Toy()
    expected = [toy.decode(request) for request in requests_of(LENGTHS, NEW_TOKENS, temperature=0.6)]
    settings = ({"draft_tokens": 0}, {"draft_tokens": 4, "drafter": "ngram"}, {"draft_tokens": 8, "min_budget": 8})
    kept = []
    for engine, prompts in engines(toy, *settings):
        for _ in range(2):
            requests = requests_of(LENGTHS, NEW_TOKENS, temperature=0.6)
            assert run(engine, requests) == expected
            kept.append([request.stats.cached_tokens for request in requests])
            prompts.computed(engine, [request.prompt for request in requests])
    # Of the last tokens as many are computed as a cycle has, in whole pages.
    assert kept == [[0] * 4, [144, 96, 48, 16], *[[144, 80, 48, 0]] * 2, *[[128, 80, 48, 0]] * 2]


def test_what_is_kept_is_what_is_read():
    """With other values in the kept pages, texts are others."""
    texts = []
    for engine, prompts in engines(Toy(), {"draft_tokens": 0}, {"draft_tokens": 0}, {"draft_tokens": 0}):
        texts.append(run(engine, requests_of(LENGTHS, NEW_TOKENS)))
        prompts.computed(engine, [request.prompt for request in requests_of(LENGTHS, NEW_TOKENS)])
        if len(texts) == 2:
            state_of(engine).pool.mul_(-1)
    assert texts[0] == texts[1]
    assert texts[2][0] != texts[1][0]


def test_the_pool_counts_as_free_and_outlives_engines(monkeypatch):
    """On a device with memory of its own, which this one only claims to have."""
    memory = SimpleNamespace(free=lambda: 1000, taken_by=lambda work: 7)
    zeros = open_device(torch.device("cpu")).zeros
    monkeypatch.setattr(kept_prompts, "open_device", lambda device: SimpleNamespace(memory=memory, zeros=zeros))
    target = Toy().engine().target
    device, row = KeptPool(target), target.layout.elements_per_page
    assert (device.memory.free(), device.memory.taken_by(None)) == (1000, 7)
    assert device.zeros(2, row, dtype=target.dtype).shape == (2, row)  # a state's first two pages
    assert device.memory.free() == 1000
    pool = device.zeros(5, row, dtype=target.dtype)
    assert device.memory.free() == 1000 + 5 * row * target.dtype.itemsize
    assert device.zeros(4, row, dtype=target.dtype).data_ptr() == pool.data_ptr()
    assert device.zeros(5, row, dtype=torch.int32).data_ptr() != pool.data_ptr()
    device.drop()
    assert device.memory.free() == 1000


def test_the_pool_holds_prompts_and_what_is_written():
    prompts = KeptPrompts([[1] * 100, [1] * 100, [2] * 20], page_size=16)
    assert prompts.pool_tokens(requests=2, tokens=100) == 16 * (7 + 2 + 2 * (7 + 8))
