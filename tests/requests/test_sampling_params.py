"""`SamplingParams` checks its fields when it is built."""

import pytest

import sparsespec_compile as ss
from sparsespec_compile.errors import SamplingError


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"n": True}, "n must be an integer of at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"seed": -3}, "seed must be"),
        ({"stop_strings": "abc"}, "stop_strings must be a sequence of non-empty strings"),
        ({"stop_strings": [""]}, "stop_strings must be a sequence of non-empty strings"),
        ({"stop_token_ids": 2}, "stop_token_ids must be a sequence of token ids"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids must be a sequence of token ids"),
        ({"logprobs": 5}, "logprobs must be True or False"),
        ({"beam": 5}, r"unknown setting\(s\) beam. Allowed, by name: max_new_tokens"),
    ],
)
def test_settings_that_are_wrong(settings, text):
    with pytest.raises(SamplingError, match=text):
        ss.SamplingParams(**settings)
