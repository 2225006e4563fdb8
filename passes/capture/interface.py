"""Sends the attention and mask calls of a captured model to a recorder, through transformers' interfaces.

The names registered here stay registered, as transformers cannot remove them. Outside of `recording` they raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from ..errors import AttentionInterfaceError

IMPLEMENTATION = "sparsespec_capture"
"""Attention implementation of models that are captured."""

EXPERTS = "grouped_mm"
"""Implementation of expert layers that runs all experts without a loop over data-dependent token lists."""


class Recorder(Protocol):
    """Receives the attention and mask calls of a forward pass."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: dict) -> Tensor:
        """Takes an attention call; returns its output `[1, T, Hq, Dv]`."""
        ...

    def mask(self, options: dict) -> Tensor | None:
        """Takes a request for a mask; returns what the model passes to its attention calls."""
        ...


_active: ContextVar[Recorder | None] = ContextVar("sparsespec_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Sends the attention calls of models that use `IMPLEMENTATION` to `recorder`."""
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


def _recorder() -> Recorder:
    recorder = _active.get()
    if recorder is None:
        raise AttentionInterfaceError(
            f"attention implementation {IMPLEMENTATION!r} was called outside a capture. It is only for the compiler; "
            "choose 'sdpa' or 'eager' with model.set_attn_implementation."
        )
    return recorder


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None, **options: Any
) -> tuple[Tensor, None]:
    return _recorder().attend(module, query, key, value, attention_mask, options), None


def _mask(**options: Any) -> Tensor | None:
    return _recorder().mask(options)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def model_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration object that a module of the model holds, nested ones included, each once."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if not isinstance(config, PreTrainedConfig) or id(config) in found:
            continue
        found[id(config)] = config
        pending.extend(getattr(config, name, None) for name in config.sub_configs)
    return list(found.values())
