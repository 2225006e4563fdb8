"""Every kernel compiles for Ampere and Hopper on a machine without a GPU, and fits registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .compile_for_target import DRAWING, OTHERS, PROMISES, SELECTION, TARGETS

STACK_BYTES = 2048
"""A program parks what it knows of its unit of work outside registers while it attends, a few loads for each block of
keys; a tile that does not fit takes thousands of bytes."""

DRAW_STACK_BYTES = 32
"""A few values that the loop over tokens does not use, with some compilers."""


SCORE_STACK_BYTES = 3072
"""Of the kernel for scores of prompts, which runs once for each: float32 products, which are unrolled, take most."""

FITTING = {
    "Qwen3-8B": 320,
    "Qwen3-8B, unscored": 16,
    "Qwen3-8B, single rows": 16,
    "Qwen3-8B, single rows, most slots": 96,
    "selection, most slots": 96,
}
"""Stack on Hopper. Without scores all of attention fits, and with them nearly all, for as many requests as settings
allow; twice as many take 350 bytes."""

PROGRAMS = {
    "Qwen3-8B, single rows, most slots": 4,
    "Qwen3-8B": 2,
    "Qwen3-8B, unscored": 2,
    "Qwen3-8B, single rows": 4,
    "Qwen3-8B, prefilling": 1,
}

FAST = ((80, "Phi-3"), (90, "Qwen3-8B"), (90, SELECTION), (90, f"{DRAWING}bfloat16"))

CASES = [
    pytest.param(capability, name, marks=() if (capability, name) in FAST else pytest.mark.slow)
    for capability, (_, layers) in TARGETS.items()
    for name in (*layers, *OTHERS)
]


@pytest.mark.parametrize(("capability", "layer"), CASES)
def test_kernels_compile_and_fit(capability: int, layer: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_target.py")
    command = [sys.executable, str(script), str(capability), layer]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    drawing = ["filter_kernel", "draw_kernel", "join_kernel"]
    attending = (
        ["attention_kernel"] if any(name in layer for name in PROMISES) else ["attention_kernel", "score_kernel"]
    )
    expected = ["select_kernel"] if layer.startswith(SELECTION) else drawing if layer in OTHERS else attending
    assert [name for name, *_ in kernels] == expected
    shared_kib = TARGETS[capability][0]
    for name, stack, shared, copies, programs in kernels:
        most = DRAW_STACK_BYTES if name in drawing else STACK_BYTES
        if name == "score_kernel":
            most = SCORE_STACK_BYTES
        elif capability == 90:
            most = FITTING.get(layer, most)
        assert stack <= most, f"{name} spills {stack} bytes a thread"
        # Programs are persistent: one that waits for another to end would have nothing left to do.
        assert programs * (shared + 1024) <= shared_kib * 1024, f"{programs} programs of {shared} bytes do not fit"
        if name == "attention_kernel" and layer != "float32":
            assert copies, f"{name} does not fetch keys ahead, 16 bytes at a time"
        if capability == 90 and layer.startswith("Qwen3-8B"):
            assert programs == PROGRAMS[layer]
