"""Where the Triton kernels run: in Triton's interpreter on CPU, or on the GPU under the mark `gpu`."""

import dataclasses
import warnings
from collections.abc import Iterator
from functools import cache
from inspect import ismodule
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of the tensors to hand to a Triton launcher. Interpreted kernels take CPU tensors."""
    if request.param == "cuda":
        yield "cuda"
        return
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the CUDA device here")
    _interpret(monkeypatch)
    with warnings.catch_warnings():
        # Padding rows of a tile see no key; what they compute from that is not stored.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
        yield "cpu"


@pytest.fixture
def last_program_first(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The interpreter runs the programs of a grid in the opposite order from here on."""
    if device != "cpu":
        pytest.skip("a GPU runs programs in its own order")
    from triton.runtime.interpreter import interpreter_builder as builder

    move = builder.set_grid_idx

    def move_from_the_end(*at: int) -> None:
        move(*(size - 1 - i for size, i in zip(builder.grid_dim, at, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", move_from_the_end)


def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every Triton function to the interpreter, and teach that to multiply bfloat16.

    TRITON_INTERPRET stays as it is. It acts only on functions defined after it is set, those of triton.language
    included, and other test folders may have imported Triton before; and what it acts on is not sent through `call`.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is published for Linux only")
    from triton.runtime.jit import JITFunction

    interpreted, multiply = cache(interpreter.InterpretedFunction), interpreter.interpreter_builder.create_dot
    prepared: set[frozenset[str]] = set()

    @cache
    def languages(function: Any) -> frozenset[str]:
        """The modules of triton.language that a function's own module sees."""
        seen = [value.__name__ for value in function.__globals__.values() if ismodule(value)]
        return frozenset(seen) & {"triton.language", "triton.language.core"}

    def launch(self: Any, grid: Any) -> Any:
        prepared.clear()
        prepared.add(languages(self.fn))
        return interpreted(self.fn)[grid]

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        """A device function. The interpreter replaces what it sees of triton.language in every call, which takes most
        of its time; once in a launch does, as nothing is put back before the launch ends."""
        function, seen = interpreted(self.fn), languages(self.fn)
        if seen in prepared:
            return function.rewrite()(*arguments, **named)
        prepared.add(seen)
        return function(*arguments, **named)

    # What it computes for each sum and product to look for overflows it drops, as it has no `debug`.
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    monkeypatch.setattr(JITFunction, "__call__", call)
    monkeypatch.setattr(JITFunction, "__getitem__", launch)

    def widened(operand: Any) -> Any:
        """The interpreter keeps bfloat16 as its bits and would multiply those as integers."""
        if operand.dtype.scalar.name != "bf16":
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda a, b, *rest: multiply(widened(a), widened(b), *rest))
