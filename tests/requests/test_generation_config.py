"""HuggingFace's generation settings are applied as HuggingFace applies them, or refused by name."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from sparsespec_compile.errors import ContextLengthError, PromptError, SamplingError
from sparsespec_compile.requests.reader import RequestReader
from sparsespec_compile.requests.sampling_params import SamplingParams
from sparsespec_compile.runtime.device.sampling import derive_seed

VOCABULARY = 50
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


class Letters:
    def decode(self, token_ids):
        return "".join(chr(97 + token) for token in token_ids)


def reader(tokenizer=None, positions=2048, **model):
    return RequestReader(VOCABULARY, torch.device("cpu"), positions, None, GenerationConfig(**model), tokenizer)


def generate(input_ids=IDS, mask=None, config=None, *, seed=None, tokenizer=None, model=None, **arguments):
    return reader(tokenizer, **(model or {})).read_padded(input_ids, mask, config, arguments, seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temprature": 1.0}, "unknown argument.*temprature.*temperature, top_h, top_k"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number in.*nan"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=False for greedy"),
        ({"do_sample": True, "temperature": [0.0, 0.7]}, r"above 0.*got \[0.0, 0.7\].*generate_batch SamplingParams"),
        ({"do_sample": True, "temperature": np.array([0.7, 0.0])}, "temperature must be above 0"),
        ({"do_sample": True, "temperature": torch.tensor([0.7, 0.0])}, "temperature must be above 0"),
        ({"do_sample": True, "temperature": [1.0, 1.0, 1.0]}, "3 values for 2 prompts"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be"),
        ({"do_sample": True, "top_k": -3}, "top_k must be"),
        ({"do_sample": True, "seed": -1}, "seed must be"),
        ({"do_sample": True, "seed": [1, 2, 3]}, "3 values for 2 texts"),
        ({"num_beams": 4}, "num_beams=4 is not supported.*num_beams=1"),
        ({"guidance_scale": 1.2}, "guidance_scale=1.2 is not supported.*nothing that is asked for is ignored"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0; got 0.0"),
        ({"bad_words_ids": [3]}, "bad_words_ids must be a sequence of sequences"),
        ({"bad_words_ids": [[3], []]}, "no empty sequence"),
        ({"sequence_bias": {(50,): 1.0}}, "logit_bias or sequence_bias has token"),
        ({"forced_eos_token_id": 50}, "forced_eos_token_id has token"),
        ({"watermarking_config": {}}, "watermarking_config={} is not supported"),
        ({"bad_words_ids": [[3, 50]]}, r"bad_words_ids has token\(s\) \[50\], the vocabulary ends at 50"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must hold token ids"),
        ({"sequence_bias": {(3,): float("nan")}}, "finite numbers, or -inf; got nan"),
        ({"sequence_bias": [3]}, "sequence_bias must map sequences"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0; got -1"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size must be an integer"),
        ({"logits_processor": [3]}, "sequence of functions of"),
        ({"prefix_allowed_tokens_fn": 3}, "must be a function"),
        ({"exponential_decay_length_penalty": (3,)}, "first new token, factor"),
        ({"do_sample": True, "typical_p": 1.5}, "typical_p must be a number in"),
        ({"presence_penalty": 0.5}, "unknown argument.*presence_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1 here, got 0"),
        ({"max_new_tokens": 2.5}, "got 2.5"),
        ({"max_new_tokens": None, "max_length": 3}, "max_length must be an integer of at least 4 here, got 3"),
        ({"max_length": "20", "max_new_tokens": None}, "max_length must be an integer"),
        ({"do_sample": "no"}, "do_sample must be True or False, got 'no'"),
        ({"do_sample": True, "temperature": 1e-38}, "temperature must be a number in"),
        ({"do_sample": True, "temperature": 1e39}, "temperature must be a number in"),
        ({"eos_token_id": 2.7}, "eos_token_id must be a token id.*2.7"),
        ({"eos_token_id": ["a"]}, "eos_token_id must be a token id"),
        ({"pad_token_id": -1}, "pad_token_id must be a token id"),
        ({"pad_token_id": [0, 1]}, "pad_token_id must be one token"),
        ({"cache_implementation": "quantized"}, "would change the text"),
        ({"config": {"max_new_tokens": 3}}, "generation_config must be a GenerationConfig, got dict"),
        ({"num_return_sequences": 3}, "num_return_sequences=3 needs do_sample=True"),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1, got 0"),
        ({"stop_strings": "a"}, "stop_strings.*need a tokenizer.*pass tokenizer="),
        ({"stop_strings": ["a", ""], "tokenizer": Letters()}, "stop_strings must be a non-empty string"),
        ({"stop_strings": 5, "tokenizer": Letters()}, "stop_strings must be a non-empty string"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message):
    with pytest.raises(SamplingError, match=message):
        generate(**{"max_new_tokens": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        ({"output_hidden_states": True}, "Call the HuggingFace model"),
        ({"max_time": 3.0}, r"stream\(\)"),
        ({"prompt_lookup_num_tokens": 3}, "SpecConfig"),
        ({"stopping_criteria": [lambda ids, scores: True]}, "stop_strings"),
        ({"assistant_model": object()}, "SpecConfig"),
        ({"synced_gpus": True}, "pass False"),
        ({"position_ids": IDS}, "attention_mask"),
        ({"past_key_values": object()}, "KV cache"),
    ],
)
def test_refusals_say_what_to_use_instead(arguments, instead):
    (name,) = arguments
    with pytest.raises(SamplingError, match=rf"(?s){name}=.*is not supported.*{instead}"):
        generate(**arguments)


def test_arguments_that_ask_for_nothing_are_accepted():
    """HuggingFace's whole signature, as evaluation harnesses pass it."""
    nothing = dict.fromkeys(
        [
            "logits_processor",
            "stopping_criteria",
            "prefix_allowed_tokens_fn",
            "synced_gpus",
            "assistant_model",
            "assistant_tokenizer",
            "negative_prompt_ids",
            "negative_prompt_attention_mask",
            "custom_generate",
            "trust_remote_code",
            "past_key_values",
            "position_ids",
            "token_type_ids",
            "bad_words_ids",
            "stop_strings",
        ]
    )
    empty = {
        "logits_processor": LogitsProcessorList(),
        "stopping_criteria": StoppingCriteriaList(),
        "synced_gpus": False,
        "suppress_tokens": [],
    }
    neutral = {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "use_cache": True,
        "trust_remote_code": True,
        "num_return_sequences": 1,
    }
    plain = generate(max_new_tokens=4).requests
    for arguments in (nothing, empty, neutral, {"stopping_criteria": []}, {"output_scores": False}):
        read = generate(max_new_tokens=4, **arguments).requests
        assert [(r.prompt, r.params, r.max_new_tokens, r.stop_check) for r in read] == [
            (r.prompt, r.params, r.max_new_tokens, r.stop_check) for r in plain
        ]


@pytest.mark.parametrize(
    ("arguments", "model", "expected"),
    [
        ({}, {}, 20),
        ({"max_length": 9}, {}, 6),
        ({}, {"max_length": 30}, 27),
        ({"max_new_tokens": 2}, {"max_length": 30}, 2),
        ({}, {"max_new_tokens": 7}, 7),
        ({"max_new_tokens": None, "max_length": 5}, {"max_new_tokens": 7}, 2),
    ],
)
def test_lengths(arguments, model, expected):
    assert {request.max_new_tokens for request in generate(model=model, **arguments).requests} == {expected}


def test_without_a_length_texts_end_with_the_models_positions_as_huggingfaces_do():
    def lengths(positions):
        return {
            request.max_new_tokens
            for request in reader(positions=positions).read_padded(IDS, None, None, {}, 0).requests
        }

    assert lengths(10) == {7}
    assert lengths(None) == {20}
    with pytest.raises(ContextLengthError, match=r"fill the 3 positions.*max_new_tokens"):
        lengths(3)


def test_texts_of_a_prompt_stand_beside_each_other_with_seeds_of_their_own():
    arguments = {"do_sample": True, "num_return_sequences": 3, "temperature": [0.5, 0.9], "max_new_tokens": 4}
    batch = generate(seed=7, **arguments)
    assert torch.equal(batch.input_ids, IDS.repeat_interleave(3, dim=0))
    assert [request.prompt for request in batch.requests] == batch.input_ids.tolist()
    assert [request.params.temperature for request in batch.requests] == [0.5] * 3 + [0.9] * 3
    assert [request.params.seed for request in batch.requests] == [derive_seed(7, nth) for nth in range(6)]
    own = generate(seed=[1, 2, 3, 4, 5, 6], **arguments).requests
    assert [request.params.seed for request in own] == [1, 2, 3, 4, 5, 6]
    single = generate(seed=7, do_sample=True, max_new_tokens=4).requests
    assert [request.params.seed for request in single] == [derive_seed(7, nth) for nth in range(2)]


def test_each_text_has_a_stop_check_of_its_own_that_knows_its_prompt():
    batch = generate(stop_strings="fc", tokenizer=Letters(), do_sample=True, num_return_sequences=2)
    checks = [request.stop_check for request in batch.requests]
    assert len(set(map(id, checks))) == 4
    assert checks[0]([2])  # the first prompt ends with f
    assert not checks[2]([2])  # the second one with i
    assert not checks[2]([2, 5])
    assert checks[2]([2, 5, 2])


def test_without_a_prompt_the_text_begins_with_the_beginning_of_sequence():
    batch = generate(None, model={"bos_token_id": 9})
    assert batch.input_ids.tolist() == [[9]]
    assert [request.prompt for request in batch.requests] == [[9]]
    with pytest.raises(PromptError, match=r"no input_ids, and bos_token_id.*is None"):
        generate(None)


class TestTheModelsOwnSettings:
    """Those that come with a prompt that has no `SamplingParams`, or in spite of them."""

    def read(self, sampling=None, tokenizer=None, **model):
        (texts,) = reader(tokenizer, **model).read([[1, 2, 3]], sampling)
        return texts

    def test_without_sampling_params_they_say_everything(self):
        model = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [4, 5]}
        (request,) = self.read(**model, max_new_tokens=9)
        params = request.params
        assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 20, 0.95, 0.0)
        assert (request.max_new_tokens, request.stop_tokens) == (9, {4, 5})
        assert len({text.params.seed for text in self.read(**model, num_return_sequences=3)}) == 3

    def test_what_they_leave_out_is_as_in_generate_but_for_the_length(self):
        (request,) = self.read(do_sample=True)
        assert (request.params.temperature, request.params.top_k) == (1.0, 50)
        (request,) = self.read()
        assert (request.params.temperature, request.max_new_tokens) == (0.0, SamplingParams().max_new_tokens)
        assert self.read(max_length=10)[0].max_new_tokens == 7
        ((request,),) = reader(positions=64).read([[1, 2, 3]], None)
        assert request.max_new_tokens == 61

    def test_sampling_params_say_everything_but_what_ends_a_text(self):
        model = {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 9, "eos_token_id": 4}
        (request,) = self.read(SamplingParams(temperature=0.8, seed=1), **model)
        assert (request.params.temperature, request.params.top_k, request.max_new_tokens) == (0.8, 0, 512)
        assert request.stop_tokens == {4}
        assert self.read(SamplingParams(), **model)[0].params.temperature == 0.0
        assert self.read(SamplingParams(stop_token_ids=()), **model)[0].stop_tokens == frozenset()

    def test_stop_strings(self):
        with pytest.raises(SamplingError, match=r"stop_strings \['b'\], which need a tokenizer"):
            self.read(SamplingParams(), stop_strings=["b"])
        for sampling in (SamplingParams(), None):
            assert self.read(sampling, Letters(), stop_strings=["b"])[0].stop_check([1])
        assert self.read(SamplingParams(stop_strings=()), stop_strings=["b"])[0].stop_check is None

    @pytest.mark.parametrize("sampling", [None, SamplingParams(), SamplingParams(temperature=0.7), [None]], ids=str)
    @pytest.mark.parametrize(
        "model", [{"guidance_scale": 1.05}, {"num_beams": 3}, {"watermarking_config": {"bias": 2.5}}], ids=str
    )
    def test_what_cannot_be_done_is_refused_by_name(self, sampling, model):
        (name,) = model
        with pytest.raises(SamplingError, match=rf"model.generation_config.{name}=.*not supported.*Allowed.*set it"):
            self.read(sampling, **model)
