"""The package without Triton: it imports and works on CPU, and says what is missing when a CUDA tensor arrives."""

import subprocess
import sys

import pytest

from sparsespec_compile import kernels
from sparsespec_compile.kernels.errors import KernelUnavailableError

CPU_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from sparsespec_compile.kernels import ops
q = torch.ones(1, 2, 3, 4)
print(ops.attention_site(q, q, q, 1.0, 0, 0.0, False, 0, None).shape)
"""


def test_cpu_needs_no_triton() -> None:
    run = subprocess.run([sys.executable, "-c", CPU_WITHOUT_TRITON], cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 3, 2, 4])" in run.stdout


@pytest.mark.parametrize("op", kernels.LAUNCHERS)
def test_cuda_without_triton_is_a_named_error(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launchers = tuple(f"sparsespec_compile.kernels.{module}" for module in kernels.LAUNCHERS.values())
    for name in [name for name in sys.modules if name.startswith(launchers)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(KernelUnavailableError, match="install it with `pip install triton`"):
        kernels.run_on_cuda(op)
