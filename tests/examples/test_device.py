"""A device that torch has not is named before anything is loaded."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from countdown.device import usable_device


def test_a_device_that_is_there():
    assert usable_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["toaster", f"cuda:{torch.cuda.device_count() + 7}"])
def test_a_device_that_is_not(name):
    with pytest.raises(argparse.ArgumentTypeError, match=f"torch cannot use '{name}' here"):
        usable_device(name)
