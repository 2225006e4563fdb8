"""Which tiles a launch takes: the user's file, then the shipped one, then the default; a broken file is named."""

import argparse
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="Triton is published for Linux only")

from sparsespec_compile.kernels.errors import TuningCacheWarning
from sparsespec_compile.kernels.launch import DeviceLimits, Promise, StepKind, kind_of_step, promised
from sparsespec_compile.kernels.ops import Mode
from sparsespec_compile.kernels.tuning import tiling as tiles
from sparsespec_compile.kernels.tuning.measure import Heads, Work, make_step
from sparsespec_compile.kernels.tuning.tiling import Layer, Tiling, default_tiling, parts_together

LIMITS = DeviceLimits("NVIDIA Test", 90, 132, 228 * 1024)
LAYER = Layer(4, 128, 128, torch.bfloat16, 16)
DEFAULT = default_tiling(LAYER, StepKind.MIXED, LIMITS)
OTHER = replace(DEFAULT, block_n=32, big_n=16, unit_overhead=7)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file, not there yet; nothing is shipped."""
    path = tmp_path / "deep" / "tiles.json"
    monkeypatch.setenv(tiles.CACHE_VARIABLE, str(path))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "shipped.json")
    tiles._entries.cache_clear()
    yield path
    tiles._entries.cache_clear()


def choose(kind: StepKind = StepKind.MIXED) -> object:
    return tiles.tiling_for(LAYER, kind, LIMITS)


def test_without_files_the_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == DEFAULT


def test_the_users_file_comes_before_the_shipped_one(files: Path) -> None:
    key = tiles.entry_key(LAYER, StepKind.MIXED, LIMITS)
    tiles.save({key: OTHER}, tiles.SHIPPED)
    assert choose() == OTHER
    tiles.save({key: DEFAULT}, files)
    assert choose() == DEFAULT
    for kind in (StepKind.SMALL_TILES, StepKind.UNSCORED, StepKind.PREFILL):
        assert choose(kind) == default_tiling(LAYER, kind, LIMITS) != DEFAULT


def test_saving_keeps_other_entries_and_leaves_no_other_file(files: Path) -> None:
    for kind, tiling in ((StepKind.MIXED, OTHER), (StepKind.PREFILL, DEFAULT)):
        tiles.save({tiles.entry_key(LAYER, kind, LIMITS): tiling}, files)
    assert len(json.loads(files.read_text())["entries"]) == 2
    assert [path.name for path in files.parent.iterdir()] == [files.name]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"version": 0, "entries": {}}', "version 0, 4 is read"),
        ('{"version": 4}', "KeyError"),
        (json.dumps({"version": 4, "entries": {"a": {"big_m": 64}}}), r"an entry has the fields \['big_m'\]"),
        (json.dumps({"version": 4, "entries": {"a": {**asdict(OTHER), "block_n": 48}}}), "block_n is 48; allowed"),
        (json.dumps({"version": 4, "entries": {"a": {**asdict(OTHER), "big_ahead": 0}}}), "big_ahead is 0; allowed"),
        (json.dumps({"version": 4, "entries": {"a": {**asdict(OTHER), "big_n": 64}}}), "big_n is 64 and block_n 32"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(files: Path, content: str, problem: str) -> None:
    files.parent.mkdir()
    files.write_text(content)
    with pytest.warns(TuningCacheWarning, match=f"{re.escape(str(files))} cannot be used .*{problem}.*kernels.tuning`"):
        assert choose() == DEFAULT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == DEFAULT, "one warning a process"


def test_the_shipped_file_can_be_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles._read(Path(tiles.__file__).with_name("tuned.json"))


def test_default_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tiles.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiles.cache_path() == tmp_path / "sparsespec_compile" / "tiles.json"


def test_kinds_of_steps() -> None:
    for rows, requests in ((64 * 9, 64), (256 * 9, 256), (300, 1), (1, 64)):
        assert kind_of_step(rows, 32, requests) is StepKind.MIXED, "all slots may verify"
    for rows, requests in ((8192, 1), (2048, 64)):
        assert kind_of_step(rows, 32, requests) is StepKind.PREFILL
    with promised(Promise.SMALL_TILES):
        assert kind_of_step(64, 32, 64) is StepKind.SMALL_TILES
        with promised(Promise.ONLY_VERIFICATIONS_SCORED):
            assert kind_of_step(64, 32, 64) is StepKind.MIXED
        with promised(Promise.NO_SCORES):
            assert kind_of_step(64, 32, 64) is StepKind.UNSCORED
            assert kind_of_step(8192, 32, 1) is StepKind.PREFILL
        assert kind_of_step(64, 32, 64) is StepKind.SMALL_TILES
    with pytest.raises(KeyboardInterrupt), promised(Promise.SMALL_TILES):
        raise KeyboardInterrupt
    assert kind_of_step(64, 32, 64) is StepKind.MIXED


def test_a_step_is_measured_under_the_promise_that_an_engine_would_make() -> None:
    drafts, scored = Work(Mode.DRAFT, 9, pillars=2), Work(Mode.VERIFY, 9, 3, 2, True)
    prompt = Work(Mode.PREFILL, 0, 4, scored=True)
    for work, promise in (
        ([drafts], Promise.SMALL_TILES),
        ([drafts, replace(scored, scored=False)], Promise.NO_SCORES),
        ([drafts, scored], Promise.ONLY_VERIFICATIONS_SCORED),
        ([scored, prompt], Promise.NOTHING),
    ):
        assert make_step(Heads(2, 1, 8, 8), work, torch.device("cpu")).promise() is promise


def test_default_tiles_fill_a_multiprocessor() -> None:
    """Two programs share one where a step is small and heads are not wide, and a prompt's tiles are higher."""
    assert (DEFAULT.programs_per_sm, DEFAULT.big_m, DEFAULT.registers) == (2, 64, None)
    large = default_tiling(LAYER, StepKind.PREFILL, LIMITS)
    assert (large.programs_per_sm, large.big_m, large.registers) == (1, 128, None)
    assert replace(DEFAULT, programs_per_sm=3).registers == 168
    single = default_tiling(LAYER, StepKind.SMALL_TILES, LIMITS)
    assert (single.programs_per_sm, single.num_warps, single.big_m, single.registers) == (4, 2, 16, None)


@pytest.mark.parametrize(
    ("layer", "shared", "programs"),
    [
        (LAYER, 100, 2),
        (Layer(4, 256, 256, torch.bfloat16, 16), 228, 4),
        (Layer(4, 256, 256, torch.bfloat16, 16), 100, 2),
        (Layer(7, 64, 64, torch.float16, 16), 228, 4),
    ],
)
def test_programs_of_single_rows_fit_the_shared_memory(layer: Layer, shared: int, programs: int) -> None:
    tiling = default_tiling(layer, StepKind.SMALL_TILES, DeviceLimits("NVIDIA Test", 86, 80, shared * 1024))
    assert tiling.programs_per_sm == programs
    tile = 2 * tiling.block_n * layer.token_bytes + 16 * layer.key_dim * 2
    assert programs * (tile + 1024) <= shared * 1024


def test_programs_of_other_steps_fit_as_well_as_they_can() -> None:
    """Two of them, with shorter blocks if need be; else one."""
    chosen = []
    for kib, capability in ((228, 90), (164, 80), (100, 86)):
        tiling = default_tiling(LAYER, StepKind.MIXED, DeviceLimits("NVIDIA Test", capability, 80, kib * 1024))
        chosen.append((tiling.programs_per_sm, tiling.block_n))
    assert chosen == [(2, 64), (2, 32), (1, 64)]


@pytest.mark.parametrize(
    ("pairs", "dim", "warps", "parts"),
    [(4, 128, 2, 8), (4, 256, 2, 4), (16, 128, 4, 4), (16, 512, 4, 1), (16, 64, 8, 8)],
)
def test_as_many_parts_are_asked_for_at_a_time_as_registers_hold(pairs: int, dim: int, warps: int, parts: int) -> None:
    """64 registers of a thread, 8 parts at most."""
    assert parts_together(pairs, Layer(4, dim, dim, torch.bfloat16, 16), warps) == parts


@pytest.mark.parametrize(
    "layer",
    [
        Layer(17, 128, 128, torch.bfloat16, 16),
        Layer(4, 128, 128, torch.float32, 16),
        Layer(1, 512, 512, torch.float16, 16),
    ],
)
def test_layers_with_no_registers_to_spare_take_one_kind_of_tiles(layer: Layer) -> None:
    mixed = default_tiling(layer, StepKind.MIXED, LIMITS)
    assert default_tiling(layer, StepKind.SMALL_TILES, LIMITS) == replace(mixed, scored_ahead=0)


def test_only_kernels_of_steps_with_scores_can_give_them_out() -> None:
    """The others are smaller by what that takes."""
    for kind in StepKind:
        unscored = kind in (StepKind.SMALL_TILES, StepKind.UNSCORED)
        assert (default_tiling(LAYER, kind, LIMITS).scored_ahead == 0) == unscored


@pytest.mark.parametrize("kind", list(StepKind))
def test_candidates_differ_and_hold_the_default(kind: StepKind) -> None:
    from sparsespec_compile.kernels.tuning.tune import STEPS, candidate_tilings

    default = default_tiling(LAYER, kind, LIMITS)
    candidates = candidate_tilings(default, kind)
    assert candidates[0] == default
    assert STEPS[kind]
    assert len(set(candidates)) == len(candidates) > 15
    for candidate in candidates:
        tiles._checked(asdict(candidate))


def _search(
    monkeypatch: pytest.MonkeyPatch, times: Callable[[Tiling], float], output: Path, *, compiles: bool = True
) -> str:
    """What the search prints where tiles take so long; its file is ``output``."""
    from sparsespec_compile.kernels.tuning import tune

    monkeypatch.setattr(tune, "_compile", lambda heads, kind, candidates, *_: candidates if compiles else [])
    monkeypatch.setattr(tune, "_copies", lambda *_: [])
    monkeypatch.setattr(tune, "_times", lambda made, tiling: {"step": times(tiling)})
    monkeypatch.setattr(tune, "device_limits", lambda _: LIMITS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    heads = Heads(32, 8, 128, 128, torch.bfloat16, 16)
    printed = StringIO()
    console = Console(file=printed, width=200)
    tune._tune(heads, StepKind.MIXED, {"step": []}, argparse.Namespace(output=output), console)
    return printed.getvalue()


def test_the_search_goes_on_around_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two changes that pay only together, and the candidates differ from each other by one."""

    def times(tiling: Tiling) -> float:
        return 1.0 - 0.1 * (tiling.block_n == 32) - 0.1 * (tiling.scored_overhead == 7)

    printed = _search(monkeypatch, times, tmp_path / "tiles.json")
    (found,) = json.loads((tmp_path / "tiles.json").read_text())["entries"].values()
    assert (found["block_n"], found["scored_overhead"]) == (32, 7)
    assert re.search("block_n 32, scored_overhead 7 .* 0.8000", printed)
    assert re.search("default +. 1.0000", printed)


def test_a_search_that_is_stopped_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def times(tiling: Tiling) -> float:
        if tiling.block_n == 32 and tiling.scored_overhead == 7:  # of the second round
            raise KeyboardInterrupt
        return 1.0 - 0.1 * (tiling.block_n == 32) - 0.1 * (tiling.scored_overhead == 7)

    with pytest.raises(KeyboardInterrupt):
        _search(monkeypatch, times, tmp_path / "tiles.json")
    (found,) = json.loads((tmp_path / "tiles.json").read_text())["entries"].values()
    assert (found["block_n"], found["scored_overhead"]) in [(32, 12), (64, 7)]


@pytest.mark.parametrize("kind", list(StepKind))
def test_a_search_keeps_to_what_a_file_may_hold(kind: StepKind) -> None:
    """Around the largest and the smallest that may be kept, which rounds of a search can reach."""
    from sparsespec_compile.kernels.tuning.tune import candidate_tilings

    for bound in (0, 1):
        extreme = Tiling(**{name: tiles._RANGES[name][bound] for name in asdict(DEFAULT)})
        for candidate in candidate_tilings(extreme, kind):
            tiles._checked(asdict(candidate))


def test_no_tiles_at_all_are_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sparsespec_compile.kernels.errors import KernelUnavailableError

    with pytest.raises(KernelUnavailableError, match="no tiles run on this GPU"):
        _search(monkeypatch, lambda tiling: 1.0, tmp_path / "tiles.json", compiles=False)


def test_tuning_without_a_gpu_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec_compile.kernels.errors import KernelUnavailableError
    from sparsespec_compile.kernels.tuning import tune

    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelUnavailableError, match="run this on the GPU's machine"):
        tune.main()
