"""Every kernel compiles for Ampere and Hopper on a machine without a GPU, and fits registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .compile_for_target import TARGETS

STACK_BYTES = 2048
"""A program parks what it knows of its unit of work outside registers while it attends, a few loads for each block of
keys; a tile that does not fit takes thousands of bytes."""

DRAW_STACK_BYTES = 32
"""A few values that the loop over tokens does not use, with some compilers."""


@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_target.py")
    command = [sys.executable, str(script), str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    shared_kib, layers = TARGETS[capability]
    compiled = {(layer, name) for layer, name, *_ in kernels}
    drawing = ("filter_kernel", "draw_kernel", "join_kernel")
    drawn = {(f"drawing torch.{dtype}", name) for dtype in ("float32", "bfloat16", "float16") for name in drawing}
    assert compiled == {(layer, "attention_kernel") for layer in layers} | {("selection", "select_kernel")} | drawn
    for layer, name, stack, shared, copies, programs in kernels:
        assert stack <= STACK_BYTES, f"{name} for {layer} spills {stack} bytes a thread"
        assert shared < shared_kib * 1024, f"{name} for {layer} takes {shared} bytes of shared memory"
        if name in drawing:
            assert stack <= DRAW_STACK_BYTES, f"{name} for {layer} spills {stack} bytes a thread"
        if name == "attention_kernel" and layer != "float32":
            assert copies, f"{name} for {layer} does not fetch keys ahead, 16 bytes at a time"
        # Programs are persistent: one that waits for another to end would have nothing left to do.
        assert programs * (shared + 1024) <= shared_kib * 1024, f"{name} for {layer}: {programs} do not fit together"
        if capability == 90 and layer.startswith("Qwen3-8B"):
            assert programs == {"Qwen3-8B": 2, "Qwen3-8B, single rows": 4, "Qwen3-8B, prefilling": 1}[layer]
