"""The package without Triton: it imports and works on CPU, and says what is missing when a CUDA tensor arrives."""

import subprocess
import sys

import pytest

from sparsespec_compile.kernels import cuda
from sparsespec_compile.kernels.errors import KernelUnavailableError

CPU_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from sparsespec_compile.kernels import ops
q = torch.ones(1, 2, 3, 4)
print(ops.attention_site(q, q, q, 1.0, 0, 0.0, 0).shape)
"""


def test_cpu_needs_no_triton() -> None:
    run = subprocess.run([sys.executable, "-c", CPU_WITHOUT_TRITON], cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 3, 2, 4])" in run.stdout


@pytest.mark.parametrize("op", [cuda.dual_mode_attention, cuda.draw_tokens, cuda.select_pillars])
def test_cuda_without_triton_is_a_named_error(op: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sparsespec_compile.kernels.triton_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelUnavailableError, match="install it with `pip install triton`"):
        op()
