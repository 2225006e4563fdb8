"""Prompts in every form that callers have them, and what is none."""

from array import array

import numpy as np
import pytest
import torch

from sparsespec_compile.errors import PromptError
from sparsespec_compile.requests.prompts import pad, token_list, unpad

from ..support.tokenizer import letters

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


def chatting():
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ message.content }}{% endfor %}{% if add_generation_prompt %}ab{% endif %}"
    )
    return tokenizer


def test_texts_and_chats_are_encoded():
    tokenizer = chatting()
    assert token_list(0, "acad", VOCABULARY, tokenizer) == [2, 3]
    chat = [{"role": "user", "content": "ac"}, {"role": "assistant", "content": "ad"}]
    assert token_list(0, chat, VOCABULARY, tokenizer) == [2, 3, 1]


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "message"),
    [
        (
            [{"role": "user", "content": "ac"}],
            letters(),
            "Prompt 7 is a chat, .* template failed: .*chat_template",
        ),
        ([{"role": "system", "content": "ac"}], chatting(), "Prompt 7 is a chat, .* failed: TemplateError: no system"),
        ("", chatting(), "Prompt 7 is empty"),
    ],
)
def test_texts_and_chats_that_cannot_be_encoded(prompt, tokenizer, message):
    with pytest.raises(PromptError, match=message):
        token_list(7, prompt, VOCABULARY, tokenizer)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("text", "Prompt 7 is a text, which needs a tokenizer of transformers, got NoneType"),
        ([{"role": "user", "content": "text"}], "Prompt 7 is a chat, which needs a tokenizer"),
        ([{"role": "user", "content": "text"}, 3], "must be a text, a chat or token ids"),
        ({"role": "user", "content": "text"}, "must be a text, a chat or token ids"),
        (3, r"must be a text, a chat or token ids, got 3.*Prompts come in a list, a single one too: \[prompt\]"),
        (b"ab", "must be a text, a chat or token ids, got b'ab'"),
        ([1.5], "must be a text, a chat or token ids"),
        ([True], "must be a text, a chat or token ids"),
        ([np.bool_(True)], "must be a text, a chat or token ids"),
        (np.array([1.5]), r"one-dimensional array of integers.*float64 of shape \[1\]"),
        (np.array([True]), "one-dimensional array of integers"),
        (np.array([[1, 2]]), r"one-dimensional array of integers.*shape \[1, 2\]"),
        (np.array(3), r"shape \[\]"),
        (torch.tensor([1.0]), "one-dimensional array of integers"),
        (torch.tensor([True]), "one-dimensional array of integers"),
        (torch.tensor([[1]]), r"shape \[1, 1\]"),
        ([], "Prompt 7 is empty. Each prompt needs at least one token"),
        (np.array([], dtype=np.int64), "Prompt 7 is empty"),
        ([1, VOCABULARY], "Prompt 7 holds token 50; the model has tokens 0 to 49"),
        ([-1, 3], "Prompt 7 holds token -1; the model has tokens 0 to 49"),
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


def test_a_tokenizer_that_fails_is_named():
    with pytest.raises(PromptError, match="Prompt 3 is a text, and the tokenizer failed: AttributeError"):
        token_list(3, "text", VOCABULARY, str)
