"""Rotary embeddings whose frequencies follow the longest sequence of a call: 'longrope' and 'dynamic'.

Such a module would let packed requests change each other. But up to a number of positions its frequencies are always
the same, and what it gives is a function of the position. A capture takes that from a table, which the module itself
has filled; texts end where the frequencies would change. HuggingFace's own texts are the same up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import PositionError
from .interface import model_configs

CHANGING = frozenset({"dynamic", "longrope"})
"""Rope types whose frequencies follow the longest sequence of a call."""


def positions_of(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text that the model is meant for, or that it computes at all; None = not known."""
    nominal = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    known = [nominal, steady_positions(model)]
    return min((int(one) for one in known if one is not None), default=None)


def steady_positions(model: nn.Module) -> int | None:
    """How many positions there are before frequencies change; None = they never do."""
    return min((_steady(*one) for one in _changing(model)), default=None)


def rewritten(module: nn.Module) -> frozenset[str]:
    """Names of what such a module keeps of its latest calls: frequencies, longest sequence. No table reads them."""
    layers = [layer_type for layer_type, kind in _kinds(module).items() if kind in CHANGING]
    prefixes = ["" if layer_type is None else f"{layer_type}_" for layer_type in layers]
    kept = ("inv_freq", "long_inv_freq", "max_seq_len_cached")
    return frozenset(f"{prefix}{name}" for prefix in prefixes for name in kept)


def check_rotary(model: PreTrainedModel) -> None:
    """Refuses frequencies that follow the longest sequence where it is not known from which position on they do.

    Raises:
        PositionError: a configuration asks for them, and no module of it says what it computes, or up to where.
    """
    known = {id(vars(module).get("config")) for module in model.modules() if _kinds(module)}
    for config in model_configs(model):
        asked = _rope_types(getattr(config, "rope_parameters", None)) & CHANGING
        if asked and id(config) not in known:
            raise PositionError(
                f"{type(model).__name__} has rotary embeddings of type {sorted(asked)}, whose frequencies follow the "
                "longest sequence of a call, so requests would change each other, and none of its modules says from "
                "where on they do. Allowed: 'default', 'linear', 'yarn', 'llama3', and modules with the attributes "
                "config and rope_type, as transformers' own have them. Set another rope_type in config.rope_parameters "
                "before the model is built."
            )
    steady_positions(model)


def tabulate(twin: PreTrainedModel) -> None:
    """Makes the rotary modules of a twin give what they compute from a table, where frequencies would change.

    A table is filled at the first call for its kind of layers and dtype, which is one of the rehearsal.
    """
    for module in {id(module): module for module, _, _ in _changing(twin)}.values():
        # What the module writes into its buffers is not to reach the model.
        module._buffers.update({name: None if one is None else one.clone() for name, one in module._buffers.items()})
        module.forward = _Table(module, module.forward)


class _Table:
    """Takes the place of a rotary module's `forward(x, position_ids, layer_type=None)`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward
        self.kinds = {layer_type: _steady(module, layer_type, kind) for _, layer_type, kind in _changing(module)}

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        further = {} if layer_type is None else {"layer_type": layer_type}
        if layer_type not in self.kinds:
            return self.forward(x, position_ids, **further)
        name = f"table_{layer_type}_{str(x.dtype).removeprefix('torch.')}"
        names = [one for one in self.module._buffers if one.startswith(name)]
        if not names:
            every = torch.arange(self.kinds[layer_type], device=position_ids.device)[None]
            # A short call makes the module reset what a longer one has left behind; a call with all positions does not.
            self.forward(x, every[:, :1], **further)
            given = self.forward(x, every, **further)
            for number, table in enumerate(given if isinstance(given, tuple) else (given,)):
                self.module.register_buffer(f"{name}_{number}", self._checked(table, every), persistent=False)
            names = [one for one in self.module._buffers if one.startswith(name)]
        found = tuple(getattr(self.module, one)[position_ids] for one in names)
        return found if len(found) > 1 else found[0]

    def _checked(self, table: object, every: Tensor) -> Tensor:
        if isinstance(table, Tensor) and table.shape[:2] == every.shape:
            return table[0].clone()
        shown = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise PositionError(
            f"{type(self.module).__name__} gives {shown} for positions {tuple(every.shape)}. Allowed: tensors whose "
            "first dimensions are those of the positions. Use a model with 'default' in config.rope_parameters."
        )


def _changing(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """Modules with frequencies that change, the type of layers they are for (None = all), and the rope type."""
    for module in model.modules():
        for layer_type, kind in _kinds(module).items():
            if kind in CHANGING:
                yield module, layer_type, kind


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The rope types that a rotary module computes, by the type of layers; none for another module."""
    found = vars(module).get("rope_type")
    kinds = found if isinstance(found, dict) else {None: found}
    return {layer_type: kind for layer_type, kind in kinds.items() if isinstance(kind, str)}


def _steady(module: nn.Module, layer_type: str | None, kind: str) -> int:
    """Positions before the frequencies of a module change."""
    own = vars(module)
    if kind == "longrope":
        parameters = getattr(own.get("config"), "rope_parameters", None) or {}
        end = (parameters if layer_type is None else parameters[layer_type]).get("original_max_position_embeddings")
    else:
        end = own.get("original_max_seq_len")
    if isinstance(end, int) and end > 0:
        return end
    raise PositionError(
        f"{type(module).__name__} has rotary embeddings of type {kind!r}, and its configuration does not say from "
        "which position on their frequencies change. Allowed: original_max_position_embeddings in rope_parameters for "
        "'longrope', max_position_embeddings for 'dynamic'. Set it, or choose another rope_type."
    )


def _rope_types(parameters: object) -> set[str]:
    """Rope types in a `rope_parameters` setting, which is a dictionary or one for each type of layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    own = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return own.union(*nested)
