"""A model's twin for a capture: modules and configurations of its own on the parameters and buffers of the model.

A capture runs the model in evaluation mode and under another attention implementation, and `torch.export` puts
stand-ins where the parameters are. All of that happens to the twin. The model itself is never changed, so other threads
may go on using it, and nothing has to be put back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import ATTENTION_SETTING, EXPERTS_SETTING, experts_of_another_table, implementations
from .interface import EXPERTS, IMPLEMENTATION, REPLACED_EXPERTS, model_configs

_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict)


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A twin of `model` that is ready to be captured.

    It is in evaluation mode, runs without `Module.compile`, and every part of it uses `IMPLEMENTATION` for attention
    and for experts, whose plain implementation loops over them and cannot be captured. Where experts have a table of
    their own, which does not know that name, they use `EXPERTS` instead; where the user chose another one, that.
    Modules and configurations are found in attributes, containers, bound methods, partials and closures; any other
    object that a module holds is shared with the model.
    """
    twin = _Copier().copy(model)
    for module in twin.modules():
        module.__dict__.update(training=False, _compiled_call_impl=None)
    others = {id(getattr(module, "config", None)) for module in twin.modules() if experts_of_another_table(module)}
    for config in model_configs(twin):
        setattr(config, ATTENTION_SETTING, IMPLEMENTATION)
        if implementations(config)[EXPERTS_SETTING] in REPLACED_EXPERTS:
            setattr(config, EXPERTS_SETTING, EXPERTS if id(config) in others else IMPLEMENTATION)
    return twin


class _Copier:
    """Copies modules, configurations, and whatever leads to one. Each object has one copy."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        self._originals: list[Any] = []  # kept alive, so that no id is used twice

    def copy(self, value: Any) -> Any:
        """The copy of `value`, or `value` itself if it leads to no module and no configuration."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, (nn.Module, PreTrainedConfig)) and not isinstance(value, torch.jit.ScriptModule):
            return self._object(value)
        make = _KINDS.get(type(value))
        if make is None or not _leads_to_a_module(value, set()):
            return value
        return make(self, value)

    def note(self, value: Any, copy: Any) -> Any:
        """Makes `copy` the copy of `value`."""
        self._copies[id(value)] = copy
        self._originals.append(value)
        return copy

    def _object(self, value: Any) -> Any:
        copy = self.note(value, object.__new__(type(value)))
        for name, held in vars(value).items():
            # Registries of modules, parameters, buffers and hooks: what is put in or taken out later is the twin's.
            own = type(held) in (dict, OrderedDict, list, set)
            copy.__dict__[name] = _container(self, held) if own else self.copy(held)
        return copy


def _leads_to_a_module(value: Any, seen: set[int]) -> bool:
    if isinstance(value, (nn.Module, PreTrainedConfig)):
        return True
    if type(value) not in _KINDS or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_leads_to_a_module(held, seen) for held in _held_by(value))


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    if isinstance(value, FunctionType):
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*defaults, *vars(value).values(), *map(_content, value.__closure__ or ())]
    return list(value.values()) if isinstance(value, dict) else list(value)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that has no value yet
        return None


def _container(copier: _Copier, value: Any) -> Any:
    if isinstance(value, dict):
        copy = copier.note(value, type(value)())
        copy.update((key, copier.copy(held)) for key, held in value.items())
        return copy
    return copier.note(value, type(value)(map(copier.copy, value)))


def _method(copier: _Copier, value: MethodType) -> MethodType:
    return copier.note(value, MethodType(copier.copy(value.__func__), copier.copy(value.__self__)))


def _partial(copier: _Copier, value: partial) -> partial:
    keywords = {name: copier.copy(held) for name, held in value.keywords.items()}
    copy = copier.note(value, partial(copier.copy(value.func), *map(copier.copy, value.args), **keywords))
    vars(copy).update((name, copier.copy(held)) for name, held in vars(value).items())  # as of functools.wraps
    return copy


def _function(copier: _Copier, value: FunctionType) -> FunctionType:
    """With cells of its own, which are filled once the function is known: it may be in one of them."""
    cells = value.__closure__ or ()
    new_cells = tuple(CellType() for _ in cells)
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, None, new_cells)
    copier.note(value, copy)
    copy.__qualname__, copy.__module__, copy.__doc__ = value.__qualname__, value.__module__, value.__doc__
    copy.__defaults__ = copier.copy(value.__defaults__)
    copy.__kwdefaults__ = copier.copy(value.__kwdefaults__)
    vars(copy).update((name, copier.copy(held)) for name, held in vars(value).items())
    for cell, new in zip(cells, new_cells, strict=True):
        new.cell_contents = copier.copy(_content(cell))
    return copy


_KINDS: dict[type, Callable[[_Copier, Any], Any]] = {
    **dict.fromkeys(_CONTAINERS, _container),
    MethodType: _method,
    partial: _partial,
    FunctionType: _function,
}
