"""What all tests share: one thread a process, no network, and which tests run by default.

Tests marked `gpu` are skipped where there is no CUDA device. Tests marked `slow` run with `--slow`, or where the
expression of `-m` names them; those that are also marked `gpu` run wherever `gpu` tests do, as no test is slow there.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    if not config.option.slow and "slow" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if is_slow(item)])
        items[:] = [item for item in items if not is_slow(item)]


def is_slow(item):
    return item.get_closest_marker("slow") and not item.get_closest_marker("gpu")
