"""Borrows a model for a capture: evaluation mode and a chosen attention implementation, then everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

EXPERTS = "grouped_mm"
"""Implementation of expert layers that runs all experts without a loop over data-dependent token lists."""


@contextmanager
def borrowed(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Within the block the model is in evaluation mode and every part of it uses `attention`.

    Expert layers whose plain implementation loops over the experts (which cannot be captured) use `EXPERTS`. On the
    way out, also after an error, each module has its own training flag, and each configuration its own settings, back.
    """
    training = [(module, module.training) for module in model.modules()]
    configs = [(config, _settings(config)) for config in model_configs(model)]
    try:
        model.eval()
        for config, settings in configs:
            config._attn_implementation_internal = attention
            if settings["_experts_implementation_internal"] == "eager":
                config._experts_implementation_internal = EXPERTS
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


def _settings(config: PreTrainedConfig) -> dict[str, str | None]:
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    return {name: getattr(config, name) for name in names}
