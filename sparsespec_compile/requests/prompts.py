"""Prompts as callers give them: ragged lists, and HuggingFace's left-padded batches, in and out."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsespec_compile.errors import PromptError

Prompt = Sequence[int] | Tensor | np.ndarray
"""Token ids: a sequence of integers, Python's or NumPy's, or an array or tensor [tokens] of integers on any device."""

_ENCODE = "Encode texts with the model's tokenizer: tokenizer(text).input_ids."


def token_list(index: int, prompt: Prompt, vocabulary: int) -> list[int]:
    """The tokens of prompt number `index` of a batch.

    Raises:
        PromptError: not token ids, an empty prompt, or tokens outside [0, vocabulary).
    """
    tokens = _integers(index, prompt)
    if not tokens or not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise PromptError(
            f"Prompt {index} is empty or holds tokens outside 0 to {vocabulary - 1}, the model's. Use its own "
            "tokenizer; for an empty prompt give its bos_token_id."
        )
    return tokens


def _integers(index: int, prompt: Any) -> list[int]:
    if isinstance(prompt, Tensor | np.ndarray):
        floating = prompt.is_floating_point() if isinstance(prompt, Tensor) else prompt.dtype.kind not in "iu"
        if floating or prompt.dtype == torch.bool or prompt.ndim != 1:
            raise PromptError(
                f"Prompt {index} must be a one-dimensional array of integers, token ids, got {prompt.dtype} of shape "
                f"{list(prompt.shape)}. {_ENCODE}"
            )
        return [int(token) for token in prompt.tolist()]
    if not isinstance(prompt, str) and isinstance(prompt, Sequence):
        if all(type(token) is int for token in prompt):
            return list(prompt)
        if all(isinstance(token, Integral) and not isinstance(token, bool) for token in prompt):
            return [int(token) for token in prompt]
    raise PromptError(f"Prompt {index} must be a sequence of token ids, got {prompt!r:.80}. {_ENCODE}")


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
        if not 0 <= min(row) <= max(row) < vocabulary:
            raise PromptError(
                f"Prompt {index} holds token {min(row) if min(row) < 0 else max(row)}; the model has tokens 0 to "
                f"{vocabulary - 1}. Use the model's own tokenizer."
            )
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
