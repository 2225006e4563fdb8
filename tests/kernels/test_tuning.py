"""Which tiles a launch takes: the user's file, then the shipped one, then the default; a broken file is named."""

import argparse
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="Triton is published for Linux only")

from sparsespec_compile.kernels import tuning
from sparsespec_compile.kernels.device import DeviceLimits
from sparsespec_compile.kernels.errors import TuningCacheWarning
from sparsespec_compile.kernels.tiling import Layer, Tiling, default_tiling, is_large_step
from sparsespec_compile.kernels.workload import Heads

LIMITS = DeviceLimits("NVIDIA Test", 90, 132, 228 * 1024)
LAYER = Layer(4, 128, 128, torch.bfloat16, 16)
DEFAULT = default_tiling(LAYER, False, LIMITS)
OTHER = replace(DEFAULT, block_n=32, big_n=16, unit_overhead=7)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file, not there yet; nothing is shipped."""
    path = tmp_path / "deep" / "tiles.json"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(path))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    tuning._entries.cache_clear()
    yield path
    tuning._entries.cache_clear()


def choose(large_step: bool = False) -> object:
    return tuning.tiling_for(LAYER, large_step, LIMITS)


def test_without_files_the_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == DEFAULT


def test_the_users_file_comes_before_the_shipped_one(files: Path) -> None:
    key = tuning.entry_key(LAYER, False, LIMITS)
    tuning.save({key: OTHER}, tuning.SHIPPED)
    assert choose() == OTHER
    tuning.save({key: DEFAULT}, files)
    assert choose() == DEFAULT
    assert choose(large_step=True) == default_tiling(LAYER, True, LIMITS)


def test_saving_keeps_other_entries_and_leaves_no_other_file(files: Path) -> None:
    for large, tiling in ((False, OTHER), (True, DEFAULT)):
        tuning.save({tuning.entry_key(LAYER, large, LIMITS): tiling}, files)
    assert len(json.loads(files.read_text())["entries"]) == 2
    assert [path.name for path in files.parent.iterdir()] == [files.name]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"version": 0, "entries": {}}', "version 0, 3 is read"),
        ('{"version": 3}', "KeyError"),
        (json.dumps({"version": 3, "entries": {"a": {"big_m": 64}}}), r"an entry has the fields \['big_m'\]"),
        (json.dumps({"version": 3, "entries": {"a": {**asdict(OTHER), "block_n": 48}}}), "block_n is 48; allowed"),
        (json.dumps({"version": 3, "entries": {"a": {**asdict(OTHER), "big_ahead": 0}}}), "big_ahead is 0; allowed"),
        (json.dumps({"version": 3, "entries": {"a": {**asdict(OTHER), "big_n": 64}}}), "big_n is 64 and block_n 32"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(files: Path, content: str, problem: str) -> None:
    files.parent.mkdir()
    files.write_text(content)
    with pytest.warns(TuningCacheWarning, match=f"{re.escape(str(files))} cannot be used .*{problem}.*tune"):
        assert choose() == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == DEFAULT, "one warning a process"


def test_the_shipped_file_can_be_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning._read(Path(tuning.__file__).with_name("tuned.json"))


def test_default_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tuning.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "sparsespec_compile" / "tiles.json"


def test_only_prefilling_steps_are_large() -> None:
    assert not is_large_step(64 * 9, 32, 64), "all slots verify"
    assert not is_large_step(256 * 9, 32, 256)
    assert is_large_step(8192, 32, 1)
    assert is_large_step(2048, 32, 64)
    assert not is_large_step(300, 32, 1)


def test_default_tiles_fill_a_multiprocessor() -> None:
    """Two programs share one where a step is small and heads are not wide, and a prompt's tiles are higher."""
    assert (DEFAULT.programs_per_sm, DEFAULT.big_m, DEFAULT.registers) == (2, 64, None)
    large = default_tiling(LAYER, True, LIMITS)
    assert (large.programs_per_sm, large.big_m, large.registers) == (1, 128, None)
    assert replace(DEFAULT, programs_per_sm=3).registers == 168


def test_candidates_differ_and_hold_the_default() -> None:
    from sparsespec_compile.kernels.tune import candidate_tilings

    candidates = candidate_tilings(DEFAULT)
    assert candidates[0] == DEFAULT
    assert len(set(candidates)) == len(candidates) > 15
    for candidate in candidates:
        tuning._checked(asdict(candidate))


def test_the_search_goes_on_around_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two changes that pay only together, and the candidates differ from each other by one."""
    from sparsespec_compile.kernels import tune

    def times(made: object, tiling: Tiling) -> dict[str, float]:
        return {"step": 1.0 - 0.1 * (tiling.block_n == 32) - 0.1 * (tiling.scored_overhead == 3)}

    monkeypatch.setattr(tune, "_compile", lambda heads, large, candidates, options, console: candidates)
    monkeypatch.setattr(tune, "_copies", lambda *_: [])
    monkeypatch.setattr(tune, "_times", times)
    monkeypatch.setattr(tune, "device_limits", lambda _: LIMITS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    options = argparse.Namespace(output=tmp_path / "tiles.json")
    heads = Heads(32, 8, 128, 128, torch.bfloat16, 16)
    tune._tune(heads, False, {"step": []}, options, Console(quiet=True))
    (found,) = json.loads(options.output.read_text())["entries"].values()
    assert (found["block_n"], found["scored_overhead"]) == (32, 3)


def test_tuning_without_a_gpu_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec_compile.kernels import tune
    from sparsespec_compile.kernels.errors import KernelUnavailableError

    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelUnavailableError, match="run this on the GPU's machine"):
        tune.main()
