"""Pinned host memory: what is asked of the driver, and that pages are touched before, and given back in order."""

import gc

import pytest
import torch

from sparsespec_compile.runtime.device import devices as module
from sparsespec_compile.runtime.device.devices import pinned


class Driver:
    """Stands in for the CUDA runtime and notes its calls."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[tuple] = []
        self.error = error

    def cudaHostRegister(self, address: int, count: int, flags: int) -> int:
        self.calls.append(("pin", address, count))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unpin", address))
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "check_error", _check)
    return made


def _check(error):
    if error:
        raise RuntimeError(f"CUDA error {error}")


def test_memory_is_pinned_whole_and_unpinned_with_its_tensor(driver):
    tensor = pinned((3, 5), torch.float16)
    address = tensor.data_ptr()
    assert driver.calls == [("pin", address, 30)]
    assert address % 4096 == 0, "no page is shared with other memory, which may be pinned too"
    assert tensor.shape == (3, 5)
    assert not tensor.any()
    tensor[1] = 7
    page = tensor[1]
    del tensor
    gc.collect()
    assert driver.calls[1:] == [("unpin", address)]
    assert page.tolist() == [7] * 5, "a view keeps the memory, if not the pinning"


def test_pages_are_there_before_the_driver_is_asked(driver, monkeypatch):
    """It would get them one by one, and nobody else through to it meanwhile."""
    touched = []
    zero = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: touched.append(len(driver.calls)) or zero(tensor))
    pinned((4, 4), torch.float32)
    assert touched == [0]


def test_memory_that_cannot_be_pinned_is_given_back(driver):
    driver.error = 2
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        pinned((4, 4), torch.float32)
    gc.collect()
    assert [name for name, *_ in driver.calls] == ["pin"]


def test_memory_that_is_not_there(driver, monkeypatch):
    def refuse(*arguments):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(module.mmap, "mmap", refuse)
    with pytest.raises(OSError, match="allocate"):
        pinned((4, 4), torch.float32)
    assert not driver.calls


@pytest.mark.gpu
def test_the_gpu_copies_from_and_to_it():
    there = torch.arange(2**20, dtype=torch.float32, device="cuda")
    host = pinned((2**20,), torch.float32)
    assert host.is_pinned()
    host.copy_(there, non_blocking=True)
    back = torch.empty_like(there)
    back.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, there)
    assert torch.equal(host, there.cpu())
