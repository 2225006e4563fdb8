"""What a result was measured on, to stand beside every figure."""

import platform
from typing import Any

import torch
import transformers
import triton


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
