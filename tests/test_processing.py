"""What changes logits: greedy text equals HuggingFace's, sampled text plain decoding's, whatever is drafted."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, SuppressTokensLogitsProcessor

import sparsespec_compile as ss

from .support.models import left_padded, tiny

NEW_TOKENS = 32
LENGTHS = (3, 41, 17)
CONFIG = {"min_budget": 6, "budget_ratio": 0.01}


def each_row(change):
    """A function of (ids, scores) as transformers takes it, from one of a row."""
    return lambda ids, scores: torch.stack([change(*row) for row in zip(ids, scores, strict=True)])


@each_row
def not_like_the_last(ids, scores):
    """Forbids what depends on a token that may be a draft."""
    scores = scores.clone()
    scores[int(ids[-1]) % 7 :: 7] = -math.inf
    return scores


class Greedy:
    """A model, HuggingFace's text of it, and what settings can refer to that changes this text."""

    def __init__(self):
        self.model = tiny("qwen3")
        self.input_ids, self.mask = left_padded(*LENGTHS)
        self.plain = self.expect()
        self.first, self.second, self.third = self.plain[:, self.input_ids.shape[1] :].tolist()
        self.fast = {
            drafter: ss.optimize(self.model, ss.SpecConfig(draft_tokens=4, drafter=drafter, **CONFIG))
            for drafter in ("pillar", "ngram")
        }

    def expect(self, **settings):
        return self.model.generate(self.input_ids, **self.arguments(**settings))

    def arguments(self, **settings):
        return {"attention_mask": self.mask, "max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}


@pytest.fixture(scope="module")
def greedy():
    return Greedy()


ON_DEVICE = {
    "repetition penalty": lambda g: {"repetition_penalty": 1.3},
    "n-grams": lambda g: {"no_repeat_ngram_size": 2},
    "bad words": lambda g: {"bad_words_ids": [[g.first[3]], g.second[4:6], g.third[7:10]]},
    "suppressed": lambda g: {"suppress_tokens": g.first[:3]},
    "suppressed at the beginning": lambda g: {"begin_suppress_tokens": [g.first[0], g.second[0]]},
    "new tokens": lambda g: {"min_new_tokens": 20, "eos_token_id": [g.first[5], g.second[5]], "pad_token_id": 0},
    "length": lambda g: {"min_length": 60, "eos_token_id": [g.first[5], g.second[5]], "pad_token_id": 0},
    "bias": lambda g: {"sequence_bias": {(g.first[0],): -3.0, (7,): 2.5}},
    "all": lambda g: {
        "sequence_bias": [[[9], 3.0]],
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[g.first[3]], g.second[4:6]],
        "suppress_tokens": [g.first[6]],
        "min_new_tokens": 20,
        "eos_token_id": g.first[5],
        "pad_token_id": 0,
    },
}
BY_FUNCTIONS = {
    "a function of the caller's": lambda g: {"logits_processor": [not_like_the_last], "repetition_penalty": 1.2},
    "one in place of a setting": lambda g: {
        "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor(g.first[:3])]),
        "repetition_penalty": 1.1,
        "suppress_tokens": g.second[:3],
    },
    "allowed tokens": lambda g: {
        "prefix_allowed_tokens_fn": lambda nth, ids: [*range(nth * 7, nth * 7 + 30), int(ids[-1]) // 2]
    },
    "long n-grams": lambda g: {"bad_words_ids": [g.first[2:10]]},
    "bias of a sequence": lambda g: {"sequence_bias": {tuple(g.first[:2]): -3.0, (g.second[3],): -2.5}},
    "end": lambda g: {"forced_eos_token_id": 5},
    "decay": lambda g: {
        "exponential_decay_length_penalty": (5, 1.2),
        "eos_token_id": g.first[5],
        "pad_token_id": 0,
    },
}
SLOW = {"suppressed", "length", "bias", "n-grams", "long n-grams", "bias of a sequence", "end", "decay"}
CASES = [
    pytest.param(drafter, make, id=f"{name}-{drafter}", marks=[pytest.mark.slow] if slow else [])
    for drafter in ("pillar", "ngram")
    for name, make in {**ON_DEVICE, **BY_FUNCTIONS}.items()
    if drafter == "pillar" or name in ("all", "bad words", "a function of the caller's", "allowed tokens")
    for slow in [name in SLOW or drafter == "ngram"]
]


@pytest.mark.parametrize(("drafter", "make"), CASES)
def test_greedy_text_equals_huggingface(greedy, drafter, make):
    settings = make(greedy)
    expected = greedy.expect(**settings)
    text = greedy.fast[drafter].generate(greedy.input_ids, **greedy.arguments(**settings))
    assert torch.equal(text, expected)
    assert not torch.equal(text, greedy.plain), "the settings must change something"


def test_prompts_are_seen_without_their_padding(greedy):
    """HuggingFace's text of a padded prompt would depend on the padding here."""
    settings = {"encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 1}
    text = greedy.fast["pillar"].generate(greedy.input_ids, **greedy.arguments(**settings))
    for row, mask, found in zip(greedy.input_ids, greedy.mask, text, strict=True):
        alone = row[mask.bool()][None]
        expected = greedy.model.generate(alone, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
        assert torch.equal(found[-NEW_TOKENS:], expected[0, -NEW_TOKENS:])


MIXED = [
    ss.SamplingParams(max_new_tokens=NEW_TOKENS),
    ss.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.9, seed=4, repetition_penalty=1.4, presence_penalty=0.5),
    ss.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.2, top_p=0.9, seed=5, frequency_penalty=1.5),
    ss.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.1, seed=6, logit_bias={3: 6.0, 5: -math.inf}),
    ss.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.3, top_k=20, seed=7, typical_p=0.8, top_h=0.9),
    ss.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.3, seed=8, logits_processor=[not_like_the_last]),
    ss.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.7, seed=9, no_repeat_ngram_size=1, logprobs=True),
]


def test_a_text_depends_neither_on_drafts_nor_on_who_else_is_there(greedy):
    """Slots are few, so that each is taken by requests that ask for something and by others."""
    prompt = greedy.input_ids[1].tolist()
    plain = ss.optimize(greedy.model, ss.SpecConfig(draft_tokens=0, **CONFIG))
    alone = [plain.generate_batch([prompt], params)[0] for params in MIXED]
    assert len({tuple(one.token_ids) for one in alone}) == len(MIXED)
    fast = ss.optimize(greedy.model, ss.SpecConfig(draft_tokens=4, max_requests=2, **CONFIG))
    for order in (MIXED, MIXED[::-1]):
        texts = fast.generate_batch([prompt] * len(order), order)
        expected = [alone[MIXED.index(params)] for params in order]
        assert [one.token_ids for one in texts] == [one.token_ids for one in expected]
    assert fast.stats.accepted_per_cycle > 0
    assert len(set(alone[6].token_ids)) == NEW_TOKENS
    assert not {5} & set(alone[3].token_ids)


def test_log_probabilities_are_the_models_own(greedy):
    prompt = greedy.input_ids[1].tolist()
    params = ss.SamplingParams(max_new_tokens=4, logprobs=True, logit_bias={3: 50.0})
    (text,) = greedy.fast["pillar"].generate_batch([prompt], params)
    assert text.token_ids == [3] * 4
    logits = greedy.model(torch.tensor([[*prompt, *text.token_ids]])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.tensor(text.logprobs), logits.log_softmax(-1)[:, 3].detach(), atol=1e-4, rtol=0)


class TestFunctions:
    def test_one_that_fails_ends_its_own_text_alone(self, greedy):
        def fails(ids, scores):
            if ids.shape[1] > 50:
                raise ZeroDivisionError("on purpose")
            return scores

        prompts = [greedy.input_ids[1].tolist()] * 3
        sampling = [
            ss.SamplingParams(max_new_tokens=NEW_TOKENS),
            ss.SamplingParams(max_new_tokens=NEW_TOKENS, logits_processor=[fails]),
            ss.SamplingParams(max_new_tokens=NEW_TOKENS, logits_processor=[lambda ids, scores: scores[:, 1:]]),
        ]
        good, late, wrong = greedy.fast["pillar"].generate_batch(prompts, sampling)
        assert good.token_ids == greedy.second
        assert late.finish_reason is ss.FinishReason.ERROR
        assert isinstance(late.error, ZeroDivisionError)
        assert late.token_ids == greedy.second[: 51 - len(prompts[0])]
        assert "must return scores [1, 151], got (1, 150)" in str(wrong.error)

    def test_one_that_fails_behind_a_wrong_draft_is_no_failure(self, greedy):
        """Drafts from the text are not drawn by the request's rule, so processors see prefixes that never come true."""
        prompt = [*greedy.second[4:12], *greedy.input_ids[1].tolist(), *greedy.second[:6]]
        (plain,) = greedy.fast["ngram"].generate_batch([prompt], ss.SamplingParams(max_new_tokens=NEW_TOKENS))
        expected, wrong = [*prompt, *plain.token_ids], 0

        def knows_one_text(ids, scores):
            nonlocal wrong
            if ids[0].tolist() != expected[: ids.shape[1]]:
                wrong += 1
                raise ValueError("no such prefix")
            return scores

        params = ss.SamplingParams(max_new_tokens=NEW_TOKENS, logits_processor=[knows_one_text])
        (text,) = greedy.fast["ngram"].generate_batch([prompt], params)
        assert text.error is None
        assert text.token_ids == plain.token_ids
        assert wrong, "no draft was wrong, so this shows nothing"

    @pytest.mark.parametrize("value", [-math.inf, math.nan])
    def test_a_text_ends_where_no_token_is_left(self, greedy, value):
        def leaves_none(ids, scores):
            return torch.full_like(scores, value) if ids.shape[1] == 50 else scores

        prompt = greedy.input_ids[1].tolist()
        params = ss.SamplingParams(max_new_tokens=NEW_TOKENS, logits_processor=[leaves_none])
        (text,) = greedy.fast["pillar"].generate_batch([prompt], params)
        assert text.finish_reason is ss.FinishReason.ERROR
        assert text.token_ids == greedy.second[: 50 - len(prompt)]
        assert "No token is left to draw behind 50 tokens" in str(text.error)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_text_ends_where_settings_leave_no_token(self, greedy, temperature):
        """On the device: every token but those of the prompt has been written once."""
        vocabulary, prompt = greedy.model.config.vocab_size, [5, 5, 6]
        settings = {"temperature": temperature, "seed": 1, "no_repeat_ngram_size": 1}
        several = [ss.SamplingParams(max_new_tokens=new, **settings) for new in (vocabulary + 9, 20)]
        ended, whole = greedy.fast["pillar"].generate_batch([prompt] * 2, several)
        assert ended.finish_reason is ss.FinishReason.ERROR
        assert sorted(ended.token_ids) == sorted({*range(vocabulary)} - {*prompt})
        assert f"behind {vocabulary + 1} tokens" in str(ended.error)
        assert (whole.finish_reason, whole.token_ids) == (ss.FinishReason.LENGTH, ended.token_ids[:20])

    def test_what_it_does_in_place_is_its_own(self, greedy):
        def spoils(ids, scores):
            ids.fill_(0)
            return scores

        params = ss.SamplingParams(max_new_tokens=NEW_TOKENS, logits_processor=[spoils])
        (text,) = greedy.fast["pillar"].generate_batch([greedy.input_ids[1].tolist()], params)
        assert text.token_ids == greedy.second


class TestOutput:
    @pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "eos_token_id": 89, "pad_token_id": 0}])
    def test_logits_and_scores_are_huggingfaces(self, greedy, settings):
        asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, **settings}
        expected = greedy.expect(**asked)
        found = greedy.fast["pillar"].generate(greedy.input_ids, **greedy.arguments(**asked))
        assert torch.equal(found.sequences, expected.sequences)
        new_tokens = found.sequences[:, greedy.input_ids.shape[1] :]
        for ours, theirs in ((found.logits, expected.logits), (found.scores, expected.scores)):
            assert len(ours) == len(theirs) == new_tokens.shape[1]
            for nth, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                ended = (new_tokens[:, :nth] == settings.get("eos_token_id", -1)).any(dim=1)
                torch.testing.assert_close(mine[~ended], other[~ended], atol=1e-4, rtol=1e-4)
                assert not mine[ended].any()

    def test_scores_of_sampled_texts_are_filtered_and_change_no_text(self, greedy):
        fast, arguments = greedy.fast["pillar"], greedy.arguments(do_sample=True, top_k=5, temperature=0.7, seed=3)
        plain = fast.generate(greedy.input_ids, **arguments)
        found = fast.generate(greedy.input_ids, **arguments, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(found.sequences, plain)
        assert found.logits is None
        new_tokens = plain[:, greedy.input_ids.shape[1] :]
        for scores, tokens in zip(found.scores, new_tokens.T, strict=True):
            assert ((scores > -math.inf).sum(dim=1) == 5).all()
            assert (scores.gather(1, tokens[:, None]) > -math.inf).all()

    def test_sequences_alone(self, greedy):
        found = greedy.fast["pillar"].generate(greedy.input_ids, **greedy.arguments(return_dict_in_generate=True))
        assert torch.equal(found.sequences, greedy.plain)
        assert found.scores is None


def test_the_models_own_settings_are_for_prompts_without_sampling_params(greedy, monkeypatch):
    monkeypatch.setattr(greedy.model.generation_config, "repetition_penalty", 1.3)
    fast, prompt = greedy.fast["pillar"], greedy.input_ids[1].tolist()
    monkeypatch.setattr(greedy.model.generation_config, "max_new_tokens", NEW_TOKENS)
    (text,) = fast.generate_batch([prompt])
    (own,) = fast.generate_batch([prompt], ss.SamplingParams(max_new_tokens=NEW_TOKENS))
    assert own.token_ids == greedy.second
    monkeypatch.undo()
    assert text.token_ids == greedy.expect(repetition_penalty=1.3)[1, -NEW_TOKENS:].tolist()


def test_a_processor_of_transformers_can_be_given(greedy):
    stop = greedy.first[5]
    least = [MinLengthLogitsProcessor(60, stop)]
    expected = greedy.expect(min_length=60, eos_token_id=stop, pad_token_id=0)[1]
    prompt = greedy.input_ids[1].tolist()
    params = ss.SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=[stop], logits_processor=least)
    (text,) = greedy.fast["pillar"].generate_batch([prompt], params)
    assert text.token_ids == expected[len(prompt) : len(prompt) + len(text.token_ids)].tolist()
