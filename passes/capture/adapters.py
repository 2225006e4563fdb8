"""What the compiler knows of PEFT: layers with adapters, the state that they are in, and which adapters are in layers.

An adapter that lies in layers is code and parameters like any other, and is captured with the model. PEFT itself is not
needed: where it was not imported, no model has such layers.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError

_KINDS = (("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper"))
"""Modules and names of the base classes of PEFT's layers, and of its wrappers of whole modules."""

_BASES = ("base_layer", "original_module", "token_adapter")
"""Under which of its attributes such a layer holds what it was put around, or another layer around that."""

_OUTSIDE = frozenset({"POLY", "XLORA", "SHADOW", "CARTRIDGE"})
"""Types of adapters whose text takes more than the layers of the model: inputs, hooks or a cache that PEFT's own model
gives them."""

AdapterState = tuple[Any, ...]
"""Layers with adapters and, of each, which are there, active, merged and enabled, and their factors."""


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers and wrappers in a model, by path."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _KINDS)
    kinds = tuple(kind for kind in found if isinstance(kind, type))
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapter_state(model: nn.Module) -> AdapterState:
    """What adapters a model has and what state they are in; equal states give the same graph on the same parameters."""
    return tuple((path, type(layer), *_state(layer)) for path, layer in adapter_layers(model).items())


def _state(layer: Any) -> AdapterState:
    scaling = getattr(layer, "scaling", None)
    return (
        tuple(layer.active_adapters),
        tuple(layer.merged_adapters),
        bool(layer.disable_adapters),
        tuple(sorted(layer._get_available_adapters())),
        tuple((name, repr(factor)) for name, factor in scaling.items()) if isinstance(scaling, dict) else (),
    )


def settle_adapters(model: nn.Module) -> None:
    """Unmerges adapters that are merged and disabled, as PEFT does at the beginning of the model's next forward pass.

    A capture must not be that forward pass: what runs there is a twin, which would change the parameters that it shares
    with the model, and leave the model's own layers saying that they are merged.
    """
    for layer in adapter_layers(model).values():
        if layer.disable_adapters and layer.merged_adapters and callable(getattr(layer, "unmerge", None)):
            layer.unmerge()


def without_adapters(module: nn.Module) -> nn.Module:
    """The module that PEFT's layers were put around, or `module` itself."""
    held = [module._modules.get(name) for name in _BASES]
    inner = next((one for one in held if one is not None), None)
    return module if inner is None else without_adapters(inner)


def in_adapter(path: str, layers: Collection[str]) -> bool:
    """Whether a parameter is of an adapter, and not of the module that the adapter was put around.

    Args:
        path: of the parameter, in the model.
        layers: paths of the layers with adapters.
    """
    parts = path.split(".")
    owners = (end for end in range(len(parts) - 1, 0, -1) if ".".join(parts[:end]) in layers)
    return any(parts[end] not in _BASES for end in owners)


def inner_model(model: Any) -> Any:
    """The transformers model that a PEFT model is around, whose layers hold the adapters; anything else is returned.

    Raises:
        UnsupportedModelError: adapters that are not in layers alone, such as learned prompts.
    """
    if not callable(getattr(model, "get_base_model", None)):
        return model
    for name, config in dict(getattr(model, "peft_config", None) or {}).items():
        kind = str(getattr(getattr(config, "peft_type", None), "value", type(config).__name__))
        outside = kind in _OUTSIDE or getattr(config, "is_prompt_learning", False)
        if outside or getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"Adapter {name!r} is of type {kind if outside else 'activated LoRA'}, which PEFT computes outside of "
                "the model's layers: the text depends on more than a graph of them. Allowed: adapters in layers, such "
                "as LoRA, DoRA or IA3. Take one of those, or delete_adapter() this one."
            )
    return model.get_base_model()
