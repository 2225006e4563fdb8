"""What all tests share: one thread a process, no network, and which tests run by default.

Tests marked `gpu` are skipped where there is no CUDA device. Tests marked `slow` run with `--slow`, or where the
expression of `-m` names them; those that are also marked `gpu` run wherever `gpu` tests do, as no test is slow there.
`--part I/N` takes one of N parts of the slow tests.
"""

import os
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Scripts that tests start take one thread too: threads that wait for each other spin, and starve those of other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow, too")
    parser.addoption(
        "--part",
        type=part_of,
        metavar="I/N",
        default=(0, 1),
        help="of the tests marked slow, run those of part I of N (0 <= I < N), by checksums of their names",
    )


def part_of(text):
    part, _, parts = text.partition("/")
    if not 0 <= int(part) < int(parts):
        raise pytest.UsageError(f"--part must be I/N with 0 <= I < N, got {text}")
    return int(part), int(parts)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    wanted = config.option.slow or "slow" in config.option.markexpr
    part, parts = config.option.part
    left_out = {item for item in items if is_slow(item) and not (wanted and checksum(item) % parts == part)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, all tests of a file run in one process: what a fixture of the file compiles is compiled once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.option.dist == "load" else None


def checksum(item):
    return zlib.crc32(item.nodeid.encode())


def is_slow(item):
    return item.get_closest_marker("slow") and not item.get_closest_marker("gpu")
