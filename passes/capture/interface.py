"""Sends the attention, mask and experts calls of a captured model to a recorder, through transformers' interfaces.

The names registered here stay registered, as transformers cannot remove them. Outside of `recording` they raise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from ..compat import register_experts
from ..errors import AttentionInterfaceError

IMPLEMENTATION = "sparsespec_capture"
"""Attention and experts implementation of models that are captured."""

EXPERTS = "grouped_mm"
"""Implementation of experts with a table of their own, as quantised ones have. It runs all experts without a loop over
data-dependent token lists."""

REPLACED_EXPERTS = frozenset({"eager", "grouped_mm"})
"""Implementations of experts that a capture replaces. Another one was chosen by the user, and stays."""


class Recorder(Protocol):
    """Receives the attention, mask and experts calls of a forward pass."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: dict) -> Tensor:
        """Takes an attention call; returns its output `[1, T, Hq, Dv]`."""
        ...

    def mask(self, options: dict) -> Tensor | None:
        """Takes a request for a mask; returns what the model passes to its attention calls."""
        ...

    def experts(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Takes a call of experts on x `[T, H]`, index and weight `[T, K]`; returns their output `[T, H]`."""
        ...


_active: ContextVar[Recorder | None] = ContextVar("sparsespec_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Sends the calls of models that use `IMPLEMENTATION` to `recorder`."""
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


def is_recording() -> bool:
    """Whether a model is being captured, in this thread."""
    return _active.get() is not None


def _recorder() -> Recorder:
    recorder = _active.get()
    if recorder is None:
        raise AttentionInterfaceError(
            f"implementation {IMPLEMENTATION!r} of attention or experts was called outside a capture. It is only for "
            "the compiler; choose 'sdpa' or 'eager' with model.set_attn_implementation, 'grouped_mm' with "
            "model.set_experts_implementation."
        )
    return recorder


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None, **options: Any
) -> tuple[Tensor, None]:
    return _recorder().attend(module, query, key, value, attention_mask, options), None


def _mask(**options: Any) -> Tensor | None:
    return _recorder().mask(options)


def call_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' experts interface calls in a capture: sends a call of experts to the recorder."""
    return _recorder().experts(module, hidden_states, top_k_index, top_k_weights)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
register_experts(IMPLEMENTATION, call_experts)


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
