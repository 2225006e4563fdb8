"""Every kernel compiles for Ampere and Hopper on a machine without a GPU, and fits registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .compile_for_target import EXPERTS, LAYERS, OTHERS, PRODUCT, PROMISES, PROPOSALS, SELECTION, SHARED_KIB, TARGETS

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

DRAWING_KERNELS = ["filter_kernel", "draw_kernel", "join_kernel"]

PROGRAMS = {
    "Qwen3-8B, single rows, most slots": 4,
    "Qwen3-8B": 2,
    "Qwen3-8B, unscored": 2,
    "Qwen3-8B, single rows": 4,
    "Qwen3-8B, prefilling": 1,
}

CASES = [
    pytest.param(90, ["Qwen3-8B, unscored", SELECTION], id="two of Hopper's"),
    *(
        pytest.param(capability, layers[start::2], id=f"attention-{capability}-{start}", marks=pytest.mark.slow)
        for capability, layers in TARGETS.items()
        for start in range(min(2, len(layers)))
    ),
    *(
        pytest.param(
            capability,
            [name for name in OTHERS if capability >= 89 or not name.endswith("fp8")],
            id=f"others-{capability}",
            marks=pytest.mark.slow,
        )
        for capability in (80, 90)
    ),
]


@pytest.mark.parametrize(("capability", "layers"), CASES)
def test_kernels_compile_and_fit(capability: int, layers: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_target.py")
    command = [sys.executable, str(script), str(capability), *layers]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    needs = json.loads(run.stdout)
    assert list(needs) == list(layers)
    for layer, kernels in needs.items():
        check(capability, layer, kernels)


def check(capability: int, layer: str, kernels: list[list]) -> None:
    """That the kernels of a layer are those that it takes, and fit."""
    expected = expected_kernels(layer)
    assert [name for name, *_ in kernels] == expected, layer
    shared_kib = SHARED_KIB[capability]
    for name, stack, shared, copies, programs in kernels:
        what = f"{name} of {layer}"
        most = DRAW_STACK_BYTES if expected == DRAWING_KERNELS else STACK_BYTES
        if name == "score_kernel":
            most = SCORE_STACK_BYTES
        elif capability == 90:
            most = FITTING.get(layer, most)
        assert stack <= most, f"{what} spills {stack} bytes a thread"
        # Programs are persistent: one that waits for another to end would have nothing left to do.
        assert programs * (shared + 1024) <= shared_kib * 1024, f"{what}: {programs} programs of {shared} bytes"
        if name == "attention_kernel" and layer != "float32":
            assert copies, f"{what} does not fetch keys ahead, 16 bytes at a time"
        if name in ("up_kernel", "down_kernel"):
            assert stack == 0, what
            assert 2 * (shared + 1024) <= shared_kib * 1024, (
                f"{what}: two programs of a multiprocessor keep memory busy"
            )
            assert copies or "float32" in layer, f"{what} does not fetch weights ahead, 16 bytes at a time"
        if name in ("product_kernel", "search_kernel", "write_kernel"):
            assert stack == 0, what
        if name == "product_kernel":
            assert copies, f"{what} does not fetch weights ahead, 16 bytes at a time"
        if capability == 90 and layer.startswith("Qwen3-8B"):
            assert programs == PROGRAMS[layer], what


def expected_kernels(layer: str) -> list[str]:
    if layer in LAYERS:
        scored = not any(name in layer for name in PROMISES)
        return ["attention_kernel", "score_kernel"] if scored else ["attention_kernel"]
    if layer.startswith(PRODUCT):
        return ["quantise_kernel", "product_kernel"]
    if layer.startswith(EXPERTS):
        return ["plan_kernel", "up_kernel", "down_kernel", "sum_kernel"]
    if layer.startswith(PROPOSALS):
        return ["search_kernel", "write_kernel"]
    return ["select_kernel"] if layer.startswith(SELECTION) else DRAWING_KERNELS
