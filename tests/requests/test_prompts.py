"""Prompts in every form that callers have them, and what is none."""

from array import array

import numpy as np
import pytest
import torch

from sparsespec_compile.errors import PromptError
from sparsespec_compile.requests.prompts import pad, token_list, unpad

VOCABULARY = 50
IDS = torch.tensor([[3, 4, 5]])
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 4, 5],
        (3, 4, 5),
        range(3, 6),
        array("i", [3, 4, 5]),
        [np.int64(3), np.int32(4), 5],
        np.array([3, 4, 5]),
        np.array([3, 4, 5], dtype=np.uint16),
        torch.tensor([3, 4, 5]),
        torch.tensor([3, 4, 5], dtype=torch.int32),
    ],
    ids=lambda prompt: f"{type(prompt).__name__} {getattr(prompt, 'dtype', '')}",
)
def test_tokens_of_a_prompt(prompt):
    tokens = token_list(0, prompt, VOCABULARY)
    assert tokens == [3, 4, 5]
    assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "must be a sequence of token ids, got 'text'"),
        (3, "must be a sequence of token ids, got 3"),
        ([1.5], "must be a sequence of token ids"),
        ([True], "must be a sequence of token ids"),
        ([np.bool_(True)], "must be a sequence of token ids"),
        (np.array([1.5]), r"one-dimensional array of integers.*float64 of shape \[1\]"),
        (np.array([True]), "one-dimensional array of integers"),
        (np.array([[1, 2]]), r"one-dimensional array of integers.*shape \[1, 2\]"),
        (np.array(3), r"shape \[\]"),
        (torch.tensor([1.0]), "one-dimensional array of integers"),
        (torch.tensor([True]), "one-dimensional array of integers"),
        (torch.tensor([[1]]), r"shape \[1, 1\]"),
        ([], "Prompt 7 is empty or holds tokens outside 0 to 49"),
        (np.array([], dtype=np.int64), "Prompt 7 is empty"),
        ([1, VOCABULARY], "outside 0 to 49"),
        ([-1], "outside 0 to 49"),
    ],
)
def test_what_is_no_prompt(prompt, message):
    with pytest.raises(PromptError, match=message):
        token_list(7, prompt, VOCABULARY)


@pytest.mark.parametrize(
    ("input_ids", "mask", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), None, "empty.*at least one token"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "empty"),
        (IDS, torch.zeros_like(IDS), "Prompt 0 is empty"),
        (IDS.float(), None, r"torch.int64 or torch.int32, got torch.float32.*\.long\(\)"),
        (IDS[0], None, r"\[batch, width\], got \[3\]"),
        (IDS.tolist(), None, "must be a tensor.*got list"),
        (IDS.to("meta"), None, r"is on meta, the model on cpu.*\.to\('cpu'\)"),
        (IDS, torch.ones(1, 2), r"shape \[1, 2\], input_ids \[1, 3\]"),
        (IDS, torch.tensor([[1, 1, 0]]), "Pad on the left"),
        (IDS, torch.tensor([[1, 0, 1]]), "Pad on the left"),
        (IDS + VOCABULARY, None, rf"token {VOCABULARY + 5}; the model has tokens 0 to {VOCABULARY - 1}"),
        (IDS - 9, None, "token -6"),
    ],
)
def test_what_is_no_padded_batch(input_ids, mask, message):
    with pytest.raises(PromptError, match=message):
        unpad(input_ids, mask, None, CPU, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_padding_goes_and_comes(dtype):
    ids = torch.tensor([[0, 0, 5], [6, 7, 8]], dtype=dtype)
    assert unpad(ids, ids.ne(0), None, CPU, VOCABULARY) == unpad(ids, None, 0, CPU, VOCABULARY) == [[5], [6, 7, 8]]
    padded = pad(ids, [[9], [10, 11]], 1)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [[0, 0, 5, 9, 1], [6, 7, 8, 10, 11]]
