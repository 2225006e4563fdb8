"""What stands between a module and the forward pass of its class: hooks, and a `forward` of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..compat import autocast_dtype, before_compile, forward_hooks, global_forward_hooks
from ..errors import MixedPrecisionError, UnsupportedModelError

HARMLESS_HOOKS = frozenset(
    {
        ("transformers.utils.output_capturing", "output_capturing_hook"),
        ("transformers.modeling_utils", "make_inputs_require_grads"),
        ("peft.peft_model", "make_inputs_require_grad"),
        ("peft.mixed_model", "make_inputs_require_grad"),
        ("peft.utils.other", "make_inputs_require_grad"),
        ("torch.utils.module_tracker", "_fw_pre_hook"),
        ("torch.utils.module_tracker", "_fw_post_hook"),
    }
)
"""Module and name of hooks that change no value: they note outputs that were asked for, let gradients through to the
inputs, or follow which module runs."""

NOISE_HOOKS = frozenset({("transformers.integrations.neftune", "neftune_post_forward_hook")})
"""Module and name of hooks that add noise to values in training mode, and otherwise change none."""


def hooks_of(module: nn.Module) -> list[object]:
    """A module's hooks around its forward pass that may change values, in the order in which they run."""
    return [hook for hook in forward_hooks(module) if not is_harmless(hook)]


def global_hooks() -> list[object]:
    """The hooks around the forward pass of every module of the process that may change values."""
    return [hook for hook in global_forward_hooks() if not is_harmless(hook)]


def adds_noise_in_training(module: nn.Module) -> bool:
    """Whether a module has one of `NOISE_HOOKS`."""
    return any(_is_one_of(NOISE_HOOKS, hook) for hook in forward_hooks(module))


def is_harmless(hook: object) -> bool:
    """Whether a hook changes no value in evaluation mode: it is one of `HARMLESS_HOOKS` or `NOISE_HOOKS`."""
    return _is_one_of(HARMLESS_HOOKS | NOISE_HOOKS, hook)


def _is_one_of(known: frozenset[tuple[str, str]], hook: object) -> bool:
    """Whether a hook has one of these names, and was defined in that very module."""
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, FunctionType):
        return False
    name = str(function.__globals__.get("__name__"))
    defined = sys.modules.get(name)
    return (name, function.__name__) in known and defined is not None and vars(defined) is function.__globals__


def own_forward(module: nn.Module) -> object:
    """The `forward` that was set on this very module; None when there is none, or when it does what the class's does.

    That of the class may be compiled by `torch.compile`, and have lost decorators of transformers, as Accelerate leaves
    it when it unwraps a model.
    """
    forward: Any = before_compile(vars(module).get("forward"))
    if isinstance(forward, MethodType) and forward.__self__ is module:
        for function in _layers(type(module).forward):
            if function is forward.__func__:
                return None
            if not _is_of_transformers(function):
                break
    return forward


def check_precision(modules: Mapping[str, nn.Module]) -> None:
    """Raises MixedPrecisionError when one of a model's modules, given by path, was wrapped to run under autocast."""
    for path, module in modules.items():
        if is_mixed_precision(module):
            raise MixedPrecisionError(
                f"{path or type(module).__name__}: its forward was wrapped to run under autocast, as Accelerate's "
                "prepare does with mixed_precision. Allowed: models that compute in the dtype of their parameters. "
                "Load it in the dtype it shall run in, and unwrap it with accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False)."
            )


@contextmanager
def without_equal_autocast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A block in which `module` has no wrapper, as Accelerate's mixed precision sets it, that runs it in `dtype`.

    Where its parameters have that dtype, too, the wrapper changes how values are rounded on the way, and no more.
    """
    wrapper = vars(module).get("forward")
    layers: list[Any] = list(_layers(wrapper))
    casts = [nth for nth, function in enumerate(layers) if autocast_dtype(function) is dtype]
    if not casts:
        yield
        return
    vars(module)["forward"] = MethodType(layers[casts[-1] + 1], module)
    try:
        yield
    finally:
        vars(module)["forward"] = wrapper


def check_global_hooks() -> None:
    """Raises UnsupportedModelError when hooks of the whole process may change what modules give, compiled ones too."""
    hooks = global_hooks()
    if hooks:
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise UnsupportedModelError(
            f"{name} is registered as a forward hook of every module of the process (register_module_forward_hook or "
            "_pre_hook), and may change what any module gives. Allowed: hooks on the modules of a model. Remove it, or "
            "register it on those."
        )


def is_mixed_precision(module: nn.Module) -> bool:
    """Whether a module's own `forward` runs under autocast, as Accelerate's mixed precision sets it."""
    return any(map(_casts, _layers(vars(module).get("forward"))))


def is_of_transformers(function: object) -> bool:
    """Whether a function is written in transformers, whatever arguments are bound to it or torch has wrapped it in."""
    while not _is_of_transformers(function):
        if isinstance(function, partial):
            function = function.func
        elif isinstance(function, FunctionType) and str(function.__globals__.get("__name__")).startswith("torch."):
            function = vars(function).get("__wrapped__")
        else:
            return False
    return True


def _layers(function: object) -> Iterator[object]:
    """A function, and what it wraps, from the outermost in."""
    while function is not None:
        yield function
        function = getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)


def _is_of_transformers(function: object) -> bool:
    return isinstance(function, FunctionType) and str(function.__globals__.get("__name__")).startswith("transformers.")


def _casts(function: object) -> bool:
    return type(function).__name__ == "ConvertOutputsToFp32" or autocast_dtype(function) is not None
