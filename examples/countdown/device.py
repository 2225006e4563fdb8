"""The device of a command's option."""

import argparse

import torch


def usable_device(name: str) -> str:
    """A device that torch can use here, for argparse's `type`."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter is what a torch without CUDA raises
        first_line, *_ = str(error).split("\n")
        raise argparse.ArgumentTypeError(f"torch cannot use {name!r} here: {first_line}") from error
    return name
