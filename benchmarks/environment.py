"""What a result was measured on, to stand beside every figure."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from countdown.device import usable_device

__all__ = ["environment", "require_gpu", "usable_device"]


def require_gpu() -> None:
    """Ends a command that measures a GPU where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("This measures a GPU, and torch finds none: run it on the GPU's machine.")


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions, for the head of a result file."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "hardware": hardware,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
