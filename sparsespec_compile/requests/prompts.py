"""Prompts as callers give them: texts, chats, token ids, and HuggingFace's left-padded batches, in and out."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.errors import PromptError

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | Tensor | np.ndarray
"""A text; a chat, as a sequence of messages such as `{"role": "user", "content": "Hello"}`; or token ids: a sequence
of integers, Python's or NumPy's, or an array or tensor [tokens] of integers on any device. Texts and chats need a
tokenizer of transformers."""

_ALLOWED = (
    "Allowed: a text or a list of chat messages, with tokenizer=, or a sequence of token ids. Prompts come in a list, "
    "a single one too: [prompt]."
)
_TOKENS_ALONE = (
    "Allowed: a sequence of token ids alone, as this call takes no tokenizer: tokenizer(text).input_ids for a text, "
    "tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) for a chat."
)


def token_list(index: int, prompt: Prompt, vocabulary: int, tokenizer: Any = None) -> list[int]:
    """The tokens of prompt number `index` of a batch.

    Args:
        index: its number, for errors.
        prompt: a text is encoded as it is, with the special tokens that the tokenizer adds; a chat by the tokenizer's
            chat template, up to where the answer begins.
        vocabulary: tokens lie in [0, vocabulary).
        tokenizer: encodes texts and chats; None = there are none.

    Raises:
        PromptError: of another type, a text or chat that cannot be encoded, an empty prompt, or tokens outside [0,
            vocabulary).
    """
    if isinstance(prompt, str) or _is_chat(prompt):
        prompt = _encoded(index, prompt, tokenizer)
    tokens = integers(f"Prompt {index}", prompt)
    if not tokens:
        raise PromptError(
            f"Prompt {index} is empty. Each prompt needs at least one token, for example the tokenizer's bos_token_id."
        )
    _check_vocabulary(index, tokens, vocabulary)
    return tokens


def _check_vocabulary(index: int, tokens: list[int], vocabulary: int) -> None:
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise PromptError(
            f"Prompt {index} holds token {min(tokens) if min(tokens) < 0 else max(tokens)}; the model has tokens 0 to "
            f"{vocabulary - 1}. Use the model's own tokenizer."
        )


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(one, Mapping) for one in prompt)


def _encoded(index: int, prompt: Any, tokenizer: Any) -> list[int]:
    kind = "text" if isinstance(prompt, str) else "chat"
    if not callable(tokenizer):
        raise PromptError(
            f"Prompt {index} is a {kind}, which needs a tokenizer of transformers, got {type(tokenizer).__name__}. "
            "Pass tokenizer=, or give token ids."
        )
    try:
        if kind == "text":
            return list(tokenizer(prompt).input_ids)
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # a chat template is a program: it may raise anything, such as for an unknown role
        failed = "the tokenizer" if kind == "text" else "the tokenizer's chat template"
        raise PromptError(
            f"Prompt {index} is a {kind}, and {failed} failed: {type(error).__name__}: {error}. Give a tokenizer of "
            "transformers, for chats one with a chat_template that takes the messages, or token ids."
        ) from error


def integers(name: str, prompt: Any, *, texts: bool = True) -> list[int]:
    """Token ids that are given as such.

    Args:
        name: of the prompt, for errors.
        prompt: what was given.
        texts: whether texts and chats would have been allowed, likewise.

    Raises:
        PromptError: anything else.
    """
    allowed = _ALLOWED if texts else _TOKENS_ALONE
    if isinstance(prompt, Tensor | np.ndarray):
        floating = prompt.is_floating_point() if isinstance(prompt, Tensor) else prompt.dtype.kind not in "iu"
        if floating or prompt.dtype == torch.bool or prompt.ndim != 1:
            raise PromptError(
                f"{name} must be a one-dimensional array of integers, token ids, got {prompt.dtype} of shape "
                f"{list(prompt.shape)}. {allowed}"
            )
        return [int(token) for token in prompt.tolist()]
    if not isinstance(prompt, str | bytes | bytearray) and isinstance(prompt, Sequence):
        if all(type(token) is int for token in prompt):
            return list(prompt)
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt):
            return [int(token) for token in prompt]
    raise PromptError(f"{name} must be {'a text, a chat or ' if texts else ''}token ids, got {prompt!r:.80}. {allowed}")


def unpad(
    input_ids: Tensor, attention_mask: Tensor | None, padding: int | None, device: torch.device, vocabulary: int
) -> list[list[int]]:
    """The prompts of a left-padded batch, without their padding.

    Args:
        input_ids: int64 or int32 [batch, width].
        attention_mask: [batch, width], zeros then ones in each row; None = zero where `padding` stands.
        padding: the token that is padding where there is no mask; None = there is no padding.
        device: where the model is.
        vocabulary: tokens must lie in [0, vocabulary).

    Raises:
        PromptError: wrong type, shape or device, padding that is not on the left, an empty prompt, unknown tokens.
    """
    _check_tensor("input_ids", input_ids, device)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise PromptError(
            f"input_ids must be torch.int64 or torch.int32, got {input_ids.dtype}. Convert them with .long()."
        )
    if input_ids.numel() == 0:
        raise PromptError(
            f"input_ids is empty, shape {list(input_ids.shape)}. Each prompt needs at least one token, for example the "
            "tokenizer's bos_token_id."
        )
    rows = input_ids.tolist()
    if attention_mask is None and padding is not None:
        attention_mask = input_ids != padding
    if attention_mask is not None:
        rows = _drop_padding(rows, input_ids, attention_mask, device)
    for index, row in enumerate(rows):
        _check_vocabulary(index, row, vocabulary)
    return rows


def pad(input_ids: Tensor, outputs: list[list[int]], pad_token: int | None) -> Tensor:
    """Append each output to its row of `input_ids`, filled up on the right: int64 [batch, width + longest output]."""
    longest = max(len(output) for output in outputs)
    fill = 0 if pad_token is None else pad_token
    new = torch.full((len(outputs), longest), fill, dtype=torch.int64, device="cpu")
    for row, output in zip(new, outputs, strict=True):
        row[: len(output)] = torch.tensor(output, device="cpu")
    return torch.cat([input_ids.long(), new.to(input_ids.device)], dim=1)


def shape_of(value: Tensor, name: str = "input_ids") -> tuple[int, int]:
    """Batch and width of a tensor [batch, width]; PromptError for anything else."""
    if not isinstance(value, torch.Tensor):
        raise PromptError(f"{name} must be a tensor [batch, width], got {type(value).__name__}.")
    if value.dim() != 2:
        raise PromptError(f"{name} must have shape [batch, width], got {list(value.shape)}.")
    return value.shape[0], value.shape[1]


def _check_tensor(name: str, value: Tensor, device: torch.device) -> None:
    shape_of(value, name)
    if value.device != device:
        raise PromptError(f"{name} is on {value.device}, the model on {device}. Move it with .to({str(device)!r}).")


def _drop_padding(
    rows: list[list[int]], input_ids: Tensor, attention_mask: Tensor, device: torch.device
) -> list[list[int]]:
    _check_tensor("attention_mask", attention_mask, device)
    if attention_mask.shape != input_ids.shape:
        raise PromptError(
            f"attention_mask has shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}: give one mask "
            "value for each token."
        )
    mask = attention_mask.ne(0)
    starts = mask.logical_not().sum(dim=1)
    columns = torch.arange(mask.shape[1], device=device)
    if not torch.equal(mask, columns >= starts[:, None]):
        raise PromptError(
            "attention_mask must be zeros (padding) followed by ones in every row; without one, the padding token "
            "counts as zero. Pad on the left: tokenizer.padding_side = 'left'."
        )
    for index, start in enumerate(starts.tolist()):
        if start == mask.shape[1]:
            raise PromptError(f"Prompt {index} is empty: it holds nothing but padding. Leave it out of the batch.")
    return [row[start:] for row, start in zip(rows, starts.tolist(), strict=True)]
