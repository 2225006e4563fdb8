"""Prepares a model for a capture: borrows its settings, and puts a recorder behind transformers' interfaces.

The names registered here stay registered, as transformers offers no way back; outside `recording` they refuse to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from ..compat import ATTENTION_SETTING, EXPERTS_SETTING, implementations
from ..errors import AttentionInterfaceError

IMPLEMENTATION = "sparsespec_capture"


class Recorder(Protocol):
    """What sees a forward pass's attention and mask calls."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: dict) -> Tensor:
        """Takes an attention call; returns its output `[1, T, Hq, Dv]`."""
        ...

    def mask(self, options: dict) -> Tensor | None:
        """Takes a request for a mask; returns what the model shall hand to its attention calls."""
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


EXPERTS = "grouped_mm"
"""Implementation of expert layers that runs all experts without a loop over data-dependent token lists."""


@contextmanager
def borrowed(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Within the block the model is in evaluation mode and every part of it uses `attention`.

    Expert layers whose plain implementation loops over the experts (which cannot be captured) use `EXPERTS`. On the
    way out, also after an error, each module has its own training flag, and each configuration its own settings, back.
    """
    training = [(module, module.training) for module in model.modules()]
    configs = [(config, implementations(config)) for config in model_configs(model)]
    try:
        model.eval()
        for config, settings in configs:
            setattr(config, ATTENTION_SETTING, attention)
            if settings[EXPERTS_SETTING] == "eager":
                setattr(config, EXPERTS_SETTING, EXPERTS)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for config, settings in configs:
            for name, value in settings.items():
                setattr(config, name, value)


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
