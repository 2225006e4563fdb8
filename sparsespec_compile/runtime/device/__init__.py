"""The device that steps run on, behind one interface."""

import torch

from sparsespec_compile.runtime.device.cpu import CpuDevice
from sparsespec_compile.runtime.device.cuda import CudaDevice
from sparsespec_compile.runtime.device.interface import Device


def open_device(device: torch.device) -> Device:
    """The implementation for tensors on `device`, a CUDA GPU or the CPU."""
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
