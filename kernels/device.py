"""What the launchers need to know about a device."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class DeviceLimits:
    """Size of a device.

    Attributes:
        name: as the driver gives it.
        capability: compute capability, 90 for 9.0.
        multiprocessors: how many it has.
        shared_bytes: shared memory of one of them. A program takes 1 KiB more of it than its own tiles.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int


INTERPRETER = DeviceLimits("interpreter", 90, 5, 228 * 1024)
"""What Triton's interpreter stands for: few multiprocessors, so that small tests split work between programs."""


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of the device that tensors are on."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )
