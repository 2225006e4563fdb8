"""Every kernel compiles for Ampere and Hopper on a machine without a GPU, and fits registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .compile_for_target import LAYERS

STACK_BYTES = 64
"""ptxas parks a few scalars outside registers to let one more block run beside; a tile that does not fit takes
hundreds of bytes."""

SHARED_BYTES = 99 * 1024
"""What a block gets on the smallest of the GPUs from Ampere on."""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_target.py")
    command = [sys.executable, str(script), str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    compiled = {(layer, name) for layer, name, _, _ in kernels}
    expected = {(layer, f"{name}_kernel") for layer in LAYERS for name in ("write", "attention", "score")}
    assert compiled == expected | {("selection", "select_kernel")}
    for layer, name, stack, shared in kernels:
        assert stack <= STACK_BYTES, f"{name} for {layer} spills {stack} bytes a thread"
        assert shared <= SHARED_BYTES, f"{name} for {layer} takes {shared} bytes of shared memory"
