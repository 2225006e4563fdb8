"""Random models, settings, prompts and callers: texts equal those of plain decoding, which equal HuggingFace's."""

import math
import random
import time
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sparsespec_compile as ss
from sparsespec_compile.runtime.host.engine import Engine

from .support.adversary import AdversarialDevice, random_proposals
from .support.choices import choose_every, random_times

VOCABULARY = 67
NEAR_TIE = 1e-3
"""Difference of logits below which two float32 programs may choose differently."""


FAMILIES = ("llama", "qwen2", "gemma2", "qwen3", "gemma3_text", "mistral", "llama4_text", "olmo2", "smollm3")
"""In an order in which the first seeds draw models with chunks, with windows and with neither."""


def random_model(chance: random.Random) -> PreTrainedModel:
    """Any family, one to three layers, up to 17 query heads to a KV head, narrow heads, windows from 2 positions on.

    Llama-4 has chunks in place of windows, in some of its layers, and experts in some.
    """
    family = chance.choice(FAMILIES)
    width, kv_heads, layers = chance.choice([2, 6, 8, 10, 16]), chance.choice([1, 2]), chance.choice([1, 2, 3])
    heads = kv_heads * chance.choice([1, 1, 2, 3, 4, 8, 17])
    window = chance.choice([2, 3, 5, 13, 30])
    special = {
        "mistral": {"sliding_window": window},
        "gemma2": {
            "query_pre_attn_scalar": width,
            "sliding_window": window,
            "attn_logit_softcapping": chance.choice([2.0, 5.0, 50.0]),
            "final_logit_softcapping": 10.0,
        },
        "gemma3_text": {
            "query_pre_attn_scalar": width,
            "sliding_window": window,
            "layer_types": chance.choices(["sliding_attention", "full_attention"], k=layers),
        },
        "smollm3": {"no_rope_layers": chance.choices([0, 1], k=layers)},
        "llama4_text": {
            "attention_chunk_size": window,
            "no_rope_layers": chance.choices([0, 1], k=layers),
            "moe_layers": [layer for layer in range(layers) if chance.random() < 0.5],
            "intermediate_size_mlp": 40,
            "num_local_experts": 3,
            "num_experts_per_tok": chance.choice([1, 2]),
            "floor_scale": window,
            "attn_scale": 0.5,
        },
    }
    torch.manual_seed(chance.randrange(2**31))
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=heads * width,
        head_dim=width,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.35,
        tie_word_embeddings=chance.random() < 0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **special.get(family, {}),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if family == "gemma2":
        model.set_attn_implementation("eager")  # older transformers' default, sdpa, leaves soft-capping out
    return model


def random_settings(chance: random.Random, page_size: int, longest: int) -> ss.SpecConfig:
    """Any settings; often a pool that does not hold all requests, with or without host memory for those who leave."""
    tight = {}
    if chance.random() < 0.75:
        pages = max(2, math.ceil(longest * chance.choice([1.0, 1.1, 1.5, 2.5]) / page_size))
        host = chance.choice([0, longest, 2 * longest + 3 * page_size, 100 * longest])
        tight = {"pool_tokens": pages * page_size, "host_pool_tokens": host}
    draft_tokens = chance.choice([0, 1, 2, 3, 4, 7, 12, 16, "auto", "auto"])
    drafter = chance.choice(["auto", "auto", "pillar", "window", "full", "ngram"])
    return ss.SpecConfig(
        draft_tokens=draft_tokens,
        draft_proposals=random_proposals(chance, draft_tokens, drafter),
        max_draft_tokens=chance.choice([1, 3, 6]),
        budget_ratio=chance.choice([0.01, 0.05, 0.3, 1.0]),
        min_budget=chance.choice([1, 2, 5, 11, 300]),
        drafter=drafter,
        local_ratio=chance.choice([0.0, 0.25, 0.5, 1.0]),
        page_size=page_size,
        prefill_chunk=chance.choice([1, 2, 3, 7, 20, 2048]),
        max_requests=chance.choice([1, 2, 3, 5, 8]),
        schedule=chance.choice(["grouped", "balanced", "random", "in_phase"]),
        overlap=chance.random() < 0.75,
        prefix_caching=chance.random() < 0.75,
        backend="eager",
        ceilings=chance.choice([None, ss.H200]),
        **tight,
    )


def random_sampling(chance: random.Random) -> ss.SamplingParams:
    """Greedy or drawn from a filtered distribution; sometimes with stop tokens or log-probabilities."""
    drawn = {}
    if chance.random() < 0.4:
        drawn = {
            "temperature": chance.choice([0.3, 1.0, 3.0]),
            "seed": chance.randrange(2**63),
            "top_k": chance.choice([0, 5]),
            "top_p": chance.choice([1.0, 0.8]),
            "min_p": chance.choice([0.0, 0.05]),
        }
    return ss.SamplingParams(
        max_new_tokens=chance.choice([1, 2, 5, 20, 45]),
        stop_token_ids=tuple(chance.choices(range(VOCABULARY), k=3)) if chance.random() < 0.3 else (),
        logprobs=chance.random() < 0.2,
        **drawn,
    )


@dataclass
class Texts:
    """Prompts, how they are continued, and what plain decoding makes of them."""

    prompts: list[list[int]]
    sampling: list[ss.SamplingParams]
    expected: list[ss.Completion]


def with_settings(fast: ss.OptimizedModel, config: ss.SpecConfig, chance: random.Random) -> None:
    """Give the compiled model an engine with other settings, whose iterations seem to take random times."""
    auto = config.draft_tokens == "auto"
    target = replace(
        fast._engine.target,
        iteration_time=random_times(chance) if auto else None,
        drafts=chance.choice([None, fast._engine.target.drafts]),
    )
    device = AdversarialDevice(chance.randrange(2**31)) if chance.random() < 0.5 else None
    fast._engine = Engine(target, config, device)


def check_plain_decoding(model: PreTrainedModel, texts: Texts) -> None:
    """Greedy texts are HuggingFace's, up to a near tie."""
    for prompt, params, completion in zip(texts.prompts, texts.sampling, texts.expected, strict=True):
        if params.temperature:
            continue
        inputs = torch.tensor([prompt])
        mask = torch.ones_like(inputs)
        with torch.no_grad():
            theirs = model.generate(inputs, attention_mask=mask, max_new_tokens=params.max_new_tokens, do_sample=False)
        for place, (ours, token) in enumerate(zip(completion.token_ids, theirs[0, len(prompt) :].tolist())):  # noqa: B905
            if ours != token:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + completion.token_ids[:place]])).logits[0, -1]
                assert abs(logits[ours] - logits[token]) < NEAR_TIE
                break


def stream_at_random(fast: ss.OptimizedModel, texts: Texts, chance: random.Random) -> dict[int, ss.Completion]:
    """Completions by prompt, of a stream to which prompts are added, and from which they are taken back."""
    order = chance.sample(range(len(texts.prompts)), len(texts.prompts))
    later = order[chance.randint(1, len(order)) :]
    numbers = order[: len(order) - len(later)]  # the prompt of each number of the stream
    cancels = chance.choice([0.0, 0.0, 0.02, 0.1])
    got: dict[int, ss.Completion] = {}
    pieces: dict[int, list[int]] = {}
    stream = fast.stream([texts.prompts[i] for i in numbers], [texts.sampling[i] for i in numbers])

    def add() -> None:
        prompt = later.pop()
        assert stream.add([texts.prompts[prompt]], texts.sampling[prompt]) == [len(numbers)]
        numbers.append(prompt)

    with stream:
        while stream.unfinished or later:
            if not stream.unfinished:
                add()
            piece = next(stream)
            prompt = numbers[piece.index]
            pieces.setdefault(prompt, []).extend(piece.token_ids)
            if piece.completion is not None:
                assert piece.completion.token_ids == pieces[prompt]
                got[prompt] = piece.completion
            if later and chance.random() < 0.2:
                add()
            if stream.unfinished and chance.random() < cancels:
                number = chance.randrange(len(numbers))
                for completion in stream.cancel(number):
                    got[numbers[number]] = completion
    return got


def check(texts: Texts, got: dict[int, ss.Completion]) -> None:
    """Whole texts are the expected ones, those that ended early are their beginnings; none is lost."""
    assert sorted(got) == list(range(len(texts.prompts)))
    for prompt, completion in got.items():
        expected = texts.expected[prompt]
        if completion.finish_reason not in (ss.FinishReason.LENGTH, ss.FinishReason.STOP):
            assert completion.finish_reason in (ss.FinishReason.CANCELLED, ss.FinishReason.MEMORY)
            assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
            continue
        assert completion.token_ids == expected.token_ids
        if texts.sampling[prompt].logprobs:
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def fuzz(seed: int, settings: int) -> None:
    """One model, and several settings of its engine."""
    chance = random.Random(seed)
    model, page_size = random_model(chance), chance.choice([1, 2, 3, 5, 8, 16, 33])
    plain = ss.SpecConfig(page_size=page_size, draft_tokens=0, backend="eager")
    fast = ss.optimize(model, replace(plain, draft_tokens=1, draft_weights="int8"))  # other engines may draft
    fast._engine = Engine(fast._engine.target, plain)
    prompts = [
        [chance.randrange(VOCABULARY) for _ in range(chance.choice([1, 2, 3, 9, 25, 60]))]
        for _ in range(chance.randint(2, 7))
    ]
    sampling = [random_sampling(chance) for _ in prompts]
    texts = Texts(prompts, sampling, fast.generate_batch(prompts, sampling))
    check_plain_decoding(model, texts)
    longest = max(len(p) + s.max_new_tokens for p, s in zip(prompts, sampling, strict=True))
    for _ in range(settings):
        config = random_settings(chance, page_size, longest)
        with_settings(fast, config, chance)
        check(texts, stream_at_random(fast, texts, chance))
        assert fast.stats.pages_held == 0, config


@pytest.mark.parametrize("seed", range(3))
def test_texts_are_plain_decodings(seed):
    fuzz(seed, settings=2)


@pytest.mark.slow
def test_texts_are_plain_decodings_for_long(monkeypatch):
    began, seed = time.process_time(), 1000
    while time.process_time() - began < 50:
        choose_every(monkeypatch, 1 + seed % 5)
        fuzz(seed, settings=5)
        seed += 1
    assert seed > 1003
