"""Notices that a model is no longer the one that was compiled.

The graph holds the model's parameters and buffers themselves, and as constants everything else that the forward pass
reads: numbers, flags, the code of functions, hooks. All of it is read once more before a generation, and compared. An
attribute counts when code of the forward pass names it, unless it is known to change no text (`HARMLESS`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..capture.interface import model_configs
from ..capture.rotary import rewritten
from ..capture.wrappers import adds_noise_in_training, check_precision, global_hooks, hooks_of, own_forward
from ..compat import implementing_functions
from ..errors import StaleParametersError, TrainingModeError
from .readings import PLAIN, Freezer, Group, Place, attribute_names, describe, difference, package, place, underlying

HARMLESS = frozenset(
    {
        *vars(nn.Module()),
        "forward",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "router_aux_loss_coef",
        "return_dict",
        "use_return_dict",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_output_capturing_hooks_installed",
        "dtype",
        "torch_dtype",
    }
)
"""Names of attributes, of modules and of configurations, that are left out: what torch keeps in every module and
`forward`, which are read in other ways; and what says how losses, gradients, attention and experts are computed, and
what a call gives beside the logits."""

RANDOM_IN_TRAINING = re.compile(r"drop(_|$)|dropout|jitter")
"""Names of attributes that, where they are floats, are rates at which values are dropped or noise is added in training
mode. They do not count otherwise."""

_NOT_READ = frozenset(
    {"__init__", "__init_subclass__", "__repr__", "extra_repr", "_init_weights", "init_weights", "reset_parameters"}
)
"""Functions of a class that no forward pass calls."""

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_KNOWN = frozenset({"transformers", "sparsespec_compile"})
"""Packages whose attention and experts functions compute what a model's own code does."""

_BASES = frozenset((*PreTrainedModel.__mro__, *GenerationMixin.__mro__))


class ModelRecord:
    """What the capture could read of a model, at the end of its compilation.

    Attributes:
        model: the model.
        again: the call that compiles it again, for errors.
    """

    again = "optimize(model)"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        names = _names_read(model) - HARMLESS
        self._random = frozenset(filter(RANDOM_IN_TRAINING.search, names))
        self._names = names
        self._configs = model_configs(model)
        self._attributes: dict[tuple[str, ...], list[str]] = {}
        self._compiled = self._read(_modules(model))

    def require(self) -> None:
        """Refuses a model that is not the one that was compiled. Takes about 5 us for each module.

        Raises:
            StaleParametersError: something that the capture read has changed since; the text says what.
            MixedPrecisionError: that is a wrapper under which the model computes in another dtype.
            TrainingModeError: the model drops values at random.
        """
        modules = _modules(self.model)
        found = self._read(modules)
        change = None if found == self._compiled else difference(self._compiled, found, "")
        if change is not None:
            check_precision(modules)
            raise StaleParametersError(
                f"{_explain(*change)}, but the compiled graph still computes as before. Undo that, or call "
                f"{self.again} again. Allowed: changes of parameters in place, such as an optimizer's step, "
                "parameter.copy_() or load_state_dict."
            )
        self._require_no_randomness(modules)

    def changed_modules(self) -> list[str]:
        """Paths of the modules that are no longer what they were, are new or gone; other things by their names."""
        before, after = (
            dict(zip(group.names, group.values, strict=True))
            for group in (self._compiled, self._read(_modules(self.model)))
        )
        return [str(name) for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]

    def _read(self, modules: dict[str, nn.Module]) -> Group:
        freezer = Freezer((self._names - self._random).__contains__, modules.values())
        kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in map(type, modules.values())}
        names = [*modules, "global hooks", "implementations", *(f"class {name}" for name in kinds)]
        values = [self._module(freezer, module) for module in modules.values()]
        values += [freezer.freeze(global_hooks()), freezer.freeze(list(map(_foreign_implementations, self._configs)))]
        values += [self._class(freezer, kind) for kind in kinds.values()]
        return Group("model", tuple(names), tuple(values))

    def _module(self, freezer: Freezer, module: nn.Module) -> Group:
        own = vars(module)
        left_out = rewritten(module) if "rope_type" in own else frozenset()
        names = ["class"]
        values: list[Any] = [type(module)]
        if not isinstance(module, _DROPOUT):
            for name in self._attributes_of(own):
                value = own[name]
                if name in left_out or (type(value) is float and name in self._random):
                    continue
                names.append(name)
                values.append(value if type(value) in PLAIN else freezer.freeze(value))
        for tensors in (own["_parameters"], own["_buffers"]):
            for name, tensor in tensors.items():
                if tensor is not None and name not in left_out:
                    names.append(name)
                    values.append(place(tensor))
        forward = own_forward(module) if "forward" in own else None
        if forward is not None:
            names.append("forward")
            values.append(freezer.freeze(forward))
        hooks = hooks_of(module) if own["_forward_hooks"] or own["_forward_pre_hooks"] else []
        names += [f"hook {number}" for number in range(len(hooks))]
        values += map(freezer.freeze, hooks)
        return Group("module", tuple(names), tuple(values))

    def _attributes_of(self, own: dict[str, Any]) -> list[str]:
        """Which of a module's attributes are read; equal layers share the answer."""
        key = tuple(own)
        found = self._attributes.get(key)
        if found is None:
            found = self._attributes[key] = [name for name in own if name in self._names]
        return found

    def _class(self, freezer: Freezer, kind: type) -> Group:
        """What modules of a class read from it: its functions and plain values."""
        found: dict[str, Any] = {}
        for base in kind.__mro__:
            for name, value in vars(base).items() if base not in _BASES else ():
                if name in found or not (name == "forward" or name in self._names):
                    continue
                function = value if type(value) is FunctionType else underlying(value)
                if function is not None or type(value) in PLAIN:
                    found[name] = freezer.freeze(value if function is None else function)
        return Group("class", tuple(found), tuple(found.values()))

    def _require_no_randomness(self, modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            if module.training:
                cause = _randomness(module, self._random)
                if cause is not None:
                    raise TrainingModeError(
                        f"{path} is in training mode with {cause}, so the model's own text is random. Call "
                        "model.eval() before generating and model.train() after it, or switch it off."
                    )


def _foreign_implementations(config: PreTrainedConfig) -> list[object]:
    """The attention and experts functions that a configuration has chosen, None for those of transformers."""
    chosen = [(function, underlying(function)) for function in implementing_functions(config).values()]
    return [None if written is not None and package(written) in _KNOWN else function for function, written in chosen]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by path, each once; the model itself under the name of its class."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path or type(module).__name__] = module
        prefix = path + "." if path else ""
        children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
        pending.extend(reversed(children))
    return found


def _names_read(model: nn.Module) -> frozenset[str]:
    """Names of all attributes that the forward pass may read."""
    modules = list(model.modules())
    functions: list[object] = []
    for base in {base for kind in set(map(type, modules)) for base in kind.__mro__} - _BASES:
        functions += [value for name, value in vars(base).items() if name not in _NOT_READ]
    for module in modules:
        functions += [*hooks_of(module), own_forward(module)]
    return attribute_names(functions)


def _randomness(module: nn.Module, names: Iterable[str]) -> str | None:
    """The settings that make this module's output random, or dependent on its batch, in training mode."""
    if isinstance(module, _DROPOUT):
        return f"p={module.p}" if module.p > 0 else None
    if isinstance(module, _BATCH_NORM):
        return "statistics of the batch"
    if adds_noise_in_training(module):
        return "NEFTune's noise"
    own = vars(module)
    rates = ((name, own.get(name)) for name in names)
    return next((f"{name}={rate}" for name, rate in rates if isinstance(rate, float) and rate > 0), None)


def _explain(where: str, before: object, after: object) -> str:
    if isinstance(before, Place) or isinstance(after, Place):
        return (
            f"{where} was moved, replaced, added or removed since the model was compiled (model.to, half, loading with "
            f"assign=True): it was {describe(before)}, and is {describe(after)} now"
        )
    return f"{where} was {describe(before)} when the model was compiled, and is {describe(after)} now"
