"""Where the Triton kernels run: in Triton's interpreter on CPU, or on the GPU under the mark `gpu`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of the tensors to hand to a Triton launcher. Interpreted kernels take CPU tensors."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield "cuda"
        return
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the CUDA device here")
    _interpret(monkeypatch)
    yield "cpu"


def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every Triton function to the interpreter, and teach that to multiply bfloat16.

    TRITON_INTERPRET alone acts only on functions defined after it is set, those of triton.language included, and other
    test folders may have imported Triton before this one is collected.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is published for Linux only")
    from triton.runtime.jit import JITFunction

    interpreted, multiply = interpreter.InterpretedFunction, interpreter.interpreter_builder.create_dot
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(JITFunction, "__call__", lambda self, *a, **k: interpreted(self.fn)(*a, **k))
    monkeypatch.setattr(JITFunction, "__getitem__", lambda self, grid: interpreted(self.fn)[grid])

    def widened(operand: Any) -> Any:
        """The interpreter keeps bfloat16 as its bits and would multiply those as integers."""
        if operand.dtype.scalar.name != "bf16":
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.interpreter_builder,
        "create_dot",
        lambda a, b, *rest: multiply(widened(a), widened(b), *rest),
    )
