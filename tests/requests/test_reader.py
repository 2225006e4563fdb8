"""Batches of ragged prompts, and how long texts may be."""

import warnings

import numpy as np
import pytest
import torch

from sparsespec_compile.errors import ContextLengthError, ContextLengthWarning, PromptError, SamplingError
from sparsespec_compile.requests.reader import RequestReader
from sparsespec_compile.requests.sampling_params import SamplingParams

VOCABULARY = 50
READER = RequestReader(VOCABULARY, torch.device("cpu"))


def test_prompts_of_any_kind():
    read = READER.read([[1, 2], np.array([3]), torch.tensor([4, 5], dtype=torch.int32)], None)
    assert [[request.prompt for request in texts] for texts in read] == [[[1, 2]], [[3]], [[4, 5]]]


def test_what_is_no_list_of_prompts():
    for prompts in ("text", torch.ones(2, 3, dtype=torch.int64), {"a": 1}, ["text"], [[1.5]], [[True]], [3]):
        with pytest.raises(PromptError, match="token ids"):
            READER.read(prompts, None)


def test_sampling_that_does_not_fit_the_prompts():
    with pytest.raises(SamplingError, match=r"2 entries for 3 prompts\. Give .* or one SamplingParams for all"):
        READER.read([[1]] * 3, [SamplingParams(), SamplingParams()])
    with pytest.raises(SamplingError, match=r"Prompt 1 has stop_strings.*need a tokenizer"):
        READER.read([[1]] * 2, [SamplingParams(), SamplingParams(stop_strings=["x"])])
    with pytest.raises(SamplingError, match="got str"):
        RequestReader(VOCABULARY, torch.device("cpu"), tokenizer="abc").read([[1]], SamplingParams(stop_strings=["x"]))
    for wrong in ({"temperature": 1}, [3], "greedy"):
        with pytest.raises(SamplingError, match="sampling must be SamplingParams"):
            READER.read([[1]], wrong)


def test_one_seed_for_equal_prompts_gives_equal_texts_and_n_texts_of_a_prompt_differ():
    alike = READER.read([[1]] * 3, SamplingParams(temperature=1.0, seed=7))
    assert {texts[0].params.seed for texts in alike} == {7}
    (several,) = READER.read([[1]], SamplingParams(temperature=1.0, seed=7, n=3))
    assert len({text.params.seed for text in several}) == 3


@pytest.mark.parametrize("positions", [None, 100])
def test_learned_positions_end(positions):
    reader = RequestReader(VOCABULARY, torch.device("cpu"), positions=positions, limit=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader.read([[1, 2]], SamplingParams(max_new_tokens=98))
        with pytest.raises(ContextLengthError, match="need 101 positions, the model has 100"):
            reader.read([[1, 2]], SamplingParams(max_new_tokens=99))


def test_rotary_positions_go_on_with_a_warning():
    reader = RequestReader(VOCABULARY, torch.device("cpu"), positions=100)
    with pytest.warns(ContextLengthWarning, match="may need 101 positions, the model is made for 100"):
        reader.read([[1, 2]], SamplingParams(max_new_tokens=99))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader.read([[1, 2]], SamplingParams(max_new_tokens=98))
        READER.read([[1, 2]], SamplingParams(max_new_tokens=10**6))
