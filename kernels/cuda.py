"""What the ops run on CUDA tensors: the Triton launchers, imported when the first CUDA tensor arrives.

So the package imports on a machine without Triton; there, a CUDA tensor raises KernelUnavailableError.
"""

from importlib import import_module
from types import ModuleType

from torch import Tensor

from .errors import KernelUnavailableError


def dual_mode_attention(*arguments: Tensor | float) -> Tensor:
    """``triton_attention.dual_mode_attention``."""
    return _load("triton_attention").dual_mode_attention(*arguments)


def draw_tokens(*arguments: Tensor) -> Tensor:
    """``triton_draw.draw_tokens``."""
    return _load("triton_draw").draw_tokens(*arguments)


def select_pillars(*arguments: Tensor) -> None:
    """``triton_select.select_pillars``."""
    _load("triton_select").select_pillars(*arguments)


def _load(module: str) -> ModuleType:
    try:
        return import_module(f".{module}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise KernelUnavailableError(
            "the tensors are on CUDA, whose kernels need Triton, and Triton is not installed: "
            "install it with `pip install triton`, or move model and tensors to the CPU"
        ) from error
