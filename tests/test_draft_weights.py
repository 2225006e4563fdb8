"""8-bit draft weights: texts cannot depend on them, acceptance follows the parameters, and memory is given back."""

import math
from functools import cache

import pytest
import torch

import sparsespec_compile as ss
from sparsespec_compile.errors import ConfigError
from sparsespec_compile.passes.rewrites import draft_weights
from sparsespec_compile.runtime.device.graphs import StepRunner
from sparsespec_compile.runtime.device.weights import DraftCopies
from sparsespec_compile.runtime.host.engine import Engine

from .support.choices import choose_every
from .support.models import VOCABULARY, left_padded, tiny

NEW = 30
SAMPLED = {"do_sample": True, "temperature": 0.8, "seed": 3}


def settings(**changes):
    """Drafts that read everything, so that it is the weights that decide whether they are right."""
    return ss.SpecConfig(**{"draft_tokens": 4, "min_budget": 512, "draft_weights": "int8", **changes})


def texts(fast, **arguments):
    ids, mask = left_padded(3, 41, 17)
    return fast.generate(ids, attention_mask=mask, max_new_tokens=NEW, **arguments)


def accepted(fast):
    return fast.stats.accepted_per_cycle / fast.stats.drafts_per_cycle


def noise(copies):
    """Copies of other weights."""
    generator = torch.Generator().manual_seed(5)
    for weight, copy, scale, _ in copies._copies:
        copy.copy_(torch.randint(-127, 128, copy.shape, generator=generator))
        scale.copy_(weight.detach().abs().amax(1) / 127)


def not_a_number(copies):
    """K/V of drafts that would show in any text which reads them as exact."""
    for _, copy, scale, _ in copies._copies:
        copy.fill_(1)
        scale.fill_(math.nan)


FAMILIES = ("gemma3_text", "qwen3", "mistral")
"""With layers of both kinds, without a window, and with one in all layers."""

CONFIGS = {
    "pillar": {},
    "balanced": {"schedule": "balanced"},
    "few pillars": {"min_budget": 2, "budget_ratio": 0.01},
    "window": {"drafter": "window", "min_budget": 6},
    "full": {"drafter": "full"},
    "auto": {"draft_tokens": "auto", "max_draft_tokens": 5},
    "in phase": {"schedule": "in_phase"},
    "host tier": {"pool_tokens": 96, "host_pool_tokens": 4096},
}


FAST = ("pillar", "balanced", "window", "auto", "host tier")


@cache
def compiled(family):
    """Compiled once; engines with other settings run it."""
    return ss.optimize(tiny(family), settings())


def with_settings(fast, **changes):
    """Another engine for a compiled model."""
    config = settings(**changes)
    target = fast._engine.target
    fast._engine.release()
    fast._engine = Engine(target, config)
    return fast


def plain(family, **sampling):
    """What plain decoding gives."""
    return texts(with_settings(compiled(family), draft_tokens=0), **sampling)


GARBAGE = [
    *(
        pytest.param(FAMILIES[0], name, not_a_number, marks=() if name in FAST else pytest.mark.slow)
        for name in CONFIGS
    ),
    *(pytest.param(FAMILIES[0], name, noise, marks=pytest.mark.slow) for name in ("pillar", "auto")),
    *(pytest.param(family, "pillar", not_a_number, marks=pytest.mark.slow) for family in FAMILIES[1:]),
]


@pytest.mark.parametrize(("family", "name", "garbage"), GARBAGE)
def test_garbage_in_the_copies_changes_no_text_and_no_draft_is_right(monkeypatch, family, name, garbage):
    expected = [plain(family, **sampling) for sampling in ({}, SAMPLED)]
    choose_every(monkeypatch, 2)
    monkeypatch.setattr(DraftCopies, "_copy", garbage)
    fast = with_settings(compiled(family), **CONFIGS[name])
    for text, sampling in zip(expected, ({}, SAMPLED), strict=True):
        assert torch.equal(texts(fast, **sampling), text)
        if name != "auto":  # which may leave drafts alone
            assert fast.stats.draft_weight_iterations > 0
            if name != "balanced":  # where many draft beside others that verify, with exact weights
                assert accepted(fast) < 0.1
        if name == "host tier":
            assert fast.stats.pages_offloaded > 0


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_texts_are_those_of_plain_decoding_and_nearly_all_drafts_are_right(sampling):
    expected = plain("gemma3_text", **sampling)
    fast = with_settings(compiled("gemma3_text"))
    assert torch.equal(texts(fast, **sampling), expected)
    assert fast.stats.draft_weight_iterations > fast.stats.iterations / 2
    assert accepted(fast) > 0.6
    assert f"{fast.stats.draft_weight_iterations} of {fast.stats.iterations} iterations" in str(fast.stats)


def test_log_probabilities_are_those_of_the_exact_graph():
    got = []
    for drafts in (0, 4):
        fast = with_settings(compiled("qwen3"), draft_tokens=drafts)
        (completion,) = fast.generate_batch([[5, 9, 3]], ss.SamplingParams(max_new_tokens=NEW, logprobs=True))
        got.append(completion)
    assert got[0].token_ids == got[1].token_ids
    assert got[0].logprobs == pytest.approx(got[1].logprobs, abs=1e-4)


def test_every_position_that_counts_as_cached_was_written_by_the_exact_graph(monkeypatch):
    """Where drafts write keys that are no numbers, none of them is left below a request's length."""
    monkeypatch.setattr(DraftCopies, "_copy", not_a_number)
    fast = with_settings(compiled("qwen3"), schedule="balanced")
    seen, checked = 0, 0
    prompts = [[7] * length for length in (3, 41, 17)]
    with fast.stream(prompts, ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=())) as stream:
        for _ in stream:
            state = fast._engine._session.state
            for slot, length in enumerate(state.length.tolist()):
                pages = state.pool[state.page_table[0, slot].long()]
                by_layer = pages.unflatten(1, (len(state.layout.layers), -1, state.layout.page_size, 32))
                written = by_layer.permute(0, 3, 1, 2, 4).flatten(0, 1).isfinite().flatten(1).all(1)
                assert written[:length].all()
                checked += length
                seen += int((~written[length:]).any())
    assert checked > 500
    assert seen > 10, "drafts wrote none: the test would not notice"


def in_place(model, other):
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)


def through_data(model, other):
    """Leaves no version behind."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def load(model, other):
    model.load_state_dict(other.state_dict())


def train(model, other):
    """A step of gradient descent that ends at the other's weights."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.grad = (mine - theirs).detach()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.zero_grad()


@pytest.fixture
def llama():
    """Compiled, with the parameters that it was compiled with."""
    fast = compiled("llama")
    in_place(fast.model, tiny("llama"))
    return with_settings(fast)


@pytest.mark.parametrize("change", [in_place, through_data, load, train])
def test_copies_follow_changes_of_the_parameters_before_the_next_generation(llama, change):
    former = texts(llama)
    before = accepted(llama)
    change(llama.model, tiny("llama", seed=1))
    got, after = texts(llama), accepted(llama)
    assert not torch.equal(got, former)
    assert min(before, after) > 0.6
    assert torch.equal(got, texts(with_settings(llama, draft_tokens=0)))


def test_copies_that_do_not_follow_show_in_acceptance_alone(monkeypatch, llama):
    """So the test before this one would fail if they did not."""
    texts(llama)
    monkeypatch.setattr(DraftCopies, "outdate", lambda copies: None)
    in_place(llama.model, tiny("llama", seed=1))
    got, after = texts(llama), accepted(llama)
    assert after < 0.2
    assert torch.equal(got, texts(with_settings(llama, draft_tokens=0)))


@pytest.mark.parametrize(("caching", "renewed"), [(True, [1]), (False, [1, 1])])
def test_copies_are_renewed_when_requests_come_to_an_idle_engine(monkeypatch, llama, caching, renewed):
    """Where bits of weights are compared anyway, only if they have changed."""
    llama, made, copy = with_settings(llama, prefix_caching=caching), [], DraftCopies._copy
    monkeypatch.setattr(DraftCopies, "_copy", lambda copies: made.append(1) or copy(copies))
    params = ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=())
    with llama.stream([[5, 6, 7]], params) as stream:
        next(stream)
        stream.add([[8, 9]], params)
        while stream.unfinished:
            next(stream)
        assert made == [1]
        stream.add([[5, 6, 7]], params)
        while stream.unfinished:
            next(stream)
        assert made == renewed
        in_place(llama.model, tiny("llama", seed=1))
        stream.add([[5, 6, 7]], params)
        while stream.unfinished:
            next(stream)
    assert made == [*renewed, 1]


def test_copies_have_memory_while_a_state_does():
    fast = with_settings(compiled("qwen3"))
    copies = fast._engine.target.drafts.copies
    assert copies.held_bytes == 0
    expected = texts(fast)
    assert copies.held_bytes == copies.bytes == fast.memory_plan.parts["8-bit draft weights"] > 0
    fast.release()
    assert copies.held_bytes == 0
    assert torch.equal(texts(fast), expected)
    assert accepted(fast) > 0.6


def test_a_captured_step_keeps_the_copies_that_it_reads():
    fast = with_settings(compiled("qwen3"))
    texts(fast)
    copies = fast._engine.target.drafts.copies
    step = fast.capture(2, 64)
    fast.release()
    assert copies.held_bytes == copies.bytes
    assert decode(step, [5, 9, 3]) == expected_of(fast, [5, 9, 3])
    fast.release()
    del step
    fast.release()
    assert copies.held_bytes == 0


def test_a_loop_of_one_s_own_renews_the_copies_with_each_text(monkeypatch):
    made, copy = [], DraftCopies._copy
    monkeypatch.setattr(DraftCopies, "_copy", lambda copies: made.append(1) or copy(copies))
    step = with_settings(compiled("qwen3")).capture(2, 64)
    texts_of_two = [decode(step, [5, 9, 3]) for _ in range(2)]
    assert texts_of_two[0] == texts_of_two[1]
    assert made == [1, 1]


def decode(step, prompt):
    """A loop of one's own: four drafts, then their verification; each a replay."""
    step.begin(0, len(prompt) + NEW)
    step.fill([ss.Work(0, ss.Mode.PREFILL, len(prompt), tokens=prompt, logits=1, scored=len(prompt))])
    text, drafted = [], 0
    while len(text) < NEW:
        count, *tokens = step.replay().tokens[0].tolist()
        text += tokens[:count]
        if drafted < 4:
            step.fill([ss.Work(0, ss.Mode.DRAFT, 1, offset=drafted, logits=1)])
            drafted += 1
        else:
            step.fill([ss.Work(0, ss.Mode.VERIFY, 5, logits=5, scored=5)])
            drafted = 0
    return text[:NEW]


def expected_of(fast, prompt):
    (completion,) = fast.generate_batch([prompt], ss.SamplingParams(max_new_tokens=NEW, stop_token_ids=()))
    return completion.token_ids


@pytest.mark.parametrize("garbage", [None, noise, not_a_number])
def test_a_loop_of_one_s_own_drafts_with_the_copies_too(monkeypatch, garbage):
    expected = expected_of(with_settings(compiled("qwen3"), draft_tokens=0), [5, 9, 3])
    fast, ran = with_settings(compiled("qwen3")), []
    if garbage is not None:
        monkeypatch.setattr(DraftCopies, "_copy", garbage)
    step = fast.capture(2, 64)
    call = StepRunner.__call__

    def note(runner, rows, logits, variant, *functions):
        ran.append(variant.draft_weights)
        call(runner, rows, logits, variant, *functions)

    monkeypatch.setattr(StepRunner, "__call__", note)
    assert decode(step, [5, 9, 3]) == expected
    assert ran.count(True) == 4 * ran.count(False) - 4  # a prompt and verifications, each behind four drafts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"draft_tokens": 0}, "no iteration drafts"),
        ({"drafter": "ngram"}, "no iteration drafts"),
        ({"draft_weights": "auto"}, "CPU"),
        ({"draft_weights": "exact"}, "exact weights"),
    ],
)
def test_nothing_is_made_where_nothing_drafts_or_gains(changes, reason):
    fast = ss.optimize(tiny("llama"), settings(**changes))
    assert fast._compiled.draft is None
    assert fast._engine.target.drafts is None
    assert reason in fast.report.draft_weights
    assert f"drafts: {fast.report.draft_weights}" in str(fast.report)


def test_the_report_says_what_was_copied():
    fast = with_settings(compiled("qwen3"))
    texts(fast)
    assert fast.report.draft_weights == "int8 copies of 9 weights, 0.00 GiB"


def test_a_model_whose_weights_have_no_8_bit_form_drafts_with_them(monkeypatch):
    monkeypatch.setattr(draft_weights, "why_exact", lambda weight: "it is in torch.int8")
    fast = ss.optimize(tiny("llama"), settings())
    assert any("lm_head.weight: it is in torch.int8" in note for note in fast.report.notes("8-bit draft weights"))
    assert "no product of the model" in fast.report.draft_weights
    texts(fast)
    assert "8-bit draft weights" not in fast.memory_plan.parts
    assert fast.stats.draft_weight_iterations == 0


def test_fp8_is_refused_where_there_is_no_unit_for_it():
    with pytest.raises(ConfigError, match=r"draft_weights='fp8' needs .* compute capability 8\.9 or later, got cpu"):
        ss.optimize(tiny("llama"), settings(draft_weights="fp8"))


@pytest.mark.parametrize("value", ["int4", None, 8])
def test_unknown_kinds_are_refused(value):
    with pytest.raises(ConfigError, match="draft_weights must be one of 'auto', 'exact', 'int8', 'fp8', got"):
        ss.SpecConfig(draft_weights=value)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("garbage", [None, noise])
def test_texts_on_a_gpu_do_not_depend_on_what_drafts_read(monkeypatch, kind, garbage):
    """Graphs of iterations, of which those of drafts run the compiled form on the copies."""
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    model = tiny("qwen3", hidden_size=1024, intermediate_size=2048, num_attention_heads=16, head_dim=64).cuda()
    ids, mask = (tensor.cuda() for tensor in left_padded(3, 41, 17))
    got = {}
    for read in ("exact", kind):
        fast = ss.optimize(model, settings(draft_weights=read, max_requests=4))
        if garbage is not None and read == kind:
            monkeypatch.setattr(DraftCopies, "_copy", garbage_on_a_gpu)
        got[read] = fast.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(got["exact"], got[kind])
    assert fast.stats.draft_weight_iterations > 0
    assert accepted(fast) > 0.5 if garbage is None else accepted(fast) < 0.1
    fast.release()
    assert fast._engine.target.drafts.copies.held_bytes == 0


def garbage_on_a_gpu(copies):
    for weight, copy, scale, _ in copies._copies:
        copy.copy_(torch.randint(-127, 128, copy.shape, device=copy.device))
        scale.copy_(weight.detach().abs().amax(1) / 127)


assert VOCABULARY > 100, "chance would accept drafts"
