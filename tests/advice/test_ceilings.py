"""Ceilings of devices that are not known: measured once, and kept for the device, torch and driver."""

import json
import os
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from sparsespec_compile.advice import ceilings
from sparsespec_compile.advice.ceilings import H200, ceilings_of, measured_ceilings
from sparsespec_compile.errors import CeilingsCacheWarning, CeilingsError

DEVICE = "NVIDIA Test 80GB PCIe/2"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ceilings, "_measured", {})
    return tmp_path / "sparsespec_compile" / "ceilings"


class Measure:
    """A measurement of so many bytes a second; counts its calls."""

    def __init__(self, read=1e12):
        self.calls = 0
        self.read = read

    def __call__(self):
        self.calls += 1
        return replace(H200, name=DEVICE, read_bytes_per_s=self.read)


def new_process(monkeypatch):
    monkeypatch.setattr(ceilings, "_measured", {})


def test_measured_once_and_kept(monkeypatch, folder):
    measure = Measure()
    first = measured_ceilings(DEVICE, measure)
    new_process(monkeypatch)
    assert measured_ceilings(DEVICE, measure) == first == replace(H200, name=DEVICE, read_bytes_per_s=1e12)
    assert measure.calls == 1
    (file,) = folder.iterdir()
    assert file.name.startswith(f"NVIDIA-Test-80GB-PCIe-2-torch-{torch.__version__}-driver-")


@pytest.mark.parametrize("change", ["device", "torch", "driver"])
def test_another_device_torch_or_driver_is_measured_anew(monkeypatch, folder, change):
    measure = Measure()
    measured_ceilings(DEVICE, measure)
    new_process(monkeypatch)
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    if change == "driver":
        monkeypatch.setattr(ceilings, "_driver_version", lambda: "99000")
    measured_ceilings("Another" if change == "device" else DEVICE, measure)
    assert measure.calls == len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"version": 1, "ceilings": null}',
        b'{"version": 1, "ceilings": {"name": "x"}}',
        json.dumps({"version": 1, "ceilings": {**vars(H200), "read_bytes_per_s": -1}}).encode(),
    ],
)
def test_a_damaged_file_is_replaced(monkeypatch, folder, content):
    measured_ceilings(DEVICE, Measure(1e12))
    (file,) = folder.iterdir()
    file.write_bytes(content)
    new_process(monkeypatch)
    with pytest.warns(CeilingsCacheWarning, match="holds no ceilings, and is replaced"):
        assert measured_ceilings(DEVICE, Measure(2e12)).read_bytes_per_s == 2e12
    new_process(monkeypatch)
    assert measured_ceilings(DEVICE, Measure(3e12)).read_bytes_per_s == 2e12


def test_a_file_of_another_version_is_replaced(monkeypatch, folder):
    measured_ceilings(DEVICE, Measure())
    (file,) = folder.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    new_process(monkeypatch)
    assert measured_ceilings(DEVICE, Measure(2e12)).read_bytes_per_s == 2e12


@pytest.mark.parametrize("where", ["no folder", "unwritable"])
def test_without_a_folder_each_process_measures_once(monkeypatch, tmp_path, where):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    if where == "unwritable":
        monkeypatch.setattr(ceilings, "_read", lambda path: None)
    measure = Measure()
    with pytest.warns(CeilingsCacheWarning, match=r"cannot be (read from|kept in)"):
        first = measured_ceilings(DEVICE, measure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CeilingsCacheWarning)
        assert measured_ceilings(DEVICE, measure) == first
    assert measure.calls == 1


def test_many_write_at_once(monkeypatch, folder):
    """Whoever reads meanwhile sees a whole file; nothing else is left behind."""
    found, errors = [], []

    def work(nth):
        try:
            for _ in range(20):
                ceilings._write(ceilings._path(DEVICE), Measure(nth * 1e12)())
                found.append(ceilings._read(ceilings._path(DEVICE)).read_bytes_per_s)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(nth,)) for nth in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(found) <= {nth * 1e12 for nth in range(1, 9)}
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H200 NVL", True),
        ("NVIDIA GH200 480GB", False),
        ("NVIDIA H200 MIG 1g", False),
    ],
)
def test_a_device_is_known_by_its_whole_name(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(ceilings, "_measure", lambda device, name: Measure()())
    assert (ceilings_of("cuda:0") is H200) == known


def test_what_cannot_be_measured_is_named(monkeypatch):
    """As where another process has taken the device's memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    def full(device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.cuda, "device", full)
    with pytest.raises(CeilingsError, match=r"could not be measured \(out of memory\). Free memory"):
        ceilings_of("cuda")


@pytest.mark.gpu
def test_a_device_is_measured_in_a_second_or_two():
    name = torch.cuda.get_device_name()
    got = ceilings._measure(torch.device("cuda"), name)
    assert 1e11 < got.read_bytes_per_s < 2e13
    assert 1e13 < got.flops_per_s < 5e15
    # Beside other tests on the same GPU a share of its speed is measured.
    if ceilings._is(H200, name) and "PYTEST_XDIST_WORKER" not in os.environ:
        assert got.read_bytes_per_s == pytest.approx(H200.read_bytes_per_s, rel=0.15)
        assert got.flops_per_s == pytest.approx(H200.flops_per_s, rel=0.25)
