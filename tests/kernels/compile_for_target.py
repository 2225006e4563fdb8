"""Compiles the Triton kernels of a layer, or of another op, for one GPU architecture, without a GPU.

Prints what each needs as JSON. Run as a script in a fresh process (`compile_for_target.py 90 Gemma-2`): the interpreter
leaves traces in triton.language that would get in the compiler's way. The launchers are called as they are; their
kernels are compiled instead of started.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sparsespec_compile.config import MOST_REQUESTS
from sparsespec_compile.kernels.attention import launcher
from sparsespec_compile.kernels.device import DeviceLimits
from sparsespec_compile.kernels.sampling import draw
from sparsespec_compile.kernels.selection import kernel as selection
from sparsespec_compile.kernels.step_kind import Promise, promised

LAYERS = {
    "Qwen3-8B": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, single rows": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, single rows, most slots": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, unscored": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Gemma-2, single rows": (8, 4, 256, torch.bfloat16, 4096, 50.0, 16),
    "Qwen3-8B, prefilling": (32, 8, 128, torch.bfloat16, 0, 0.0, 1024),
    "Gemma-2": (8, 4, 256, torch.bfloat16, 4096, 50.0, 16),
    "Phi-3": (32, 32, 96, torch.float16, 2047, 0.0, 16),
    "float32": (7, 1, 64, torch.float32, 0, 0.0, 16),
    "71 heads": (71, 1, 64, torch.bfloat16, 0, 0.0, 16),
}
"""Name: query heads, KV heads, head dimension, dtype, window, soft-cap, rows of the step.

What is promised stands in the name."""

MOST_SLOTS = "most slots"
"""In the name of what is compiled for as many requests as settings allow."""

PROMISES = {"single rows": Promise.SINGLE_ROWS, "unscored": Promise.NO_SCORES}

TARGETS = {
    80: (164, ("Phi-3", "float32", "Qwen3-8B, single rows")),
    86: (100, ("Qwen3-8B",)),
    90: (
        228,
        (
            "Qwen3-8B",
            "Qwen3-8B, unscored",
            "Qwen3-8B, single rows",
            "Qwen3-8B, single rows, most slots",
            "Qwen3-8B, prefilling",
            "Gemma-2",
            "Gemma-2, single rows",
            "71 heads",
        ),
    ),
}
"""Compute capability: KiB of shared memory of a multiprocessor, layers to compile."""

SELECTION, DRAWING = "selection", "drawing "
OTHERS = (
    SELECTION,
    f"{SELECTION}, {MOST_SLOTS}",
    *(f"{DRAWING}{str(dtype).removeprefix('torch.')}" for dtype in draw.DROPPED),
)
"""What is compiled besides layers, for each capability."""

POINTERS = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
_PROCESSORS = 100

OPTIONS = ("num_warps", "num_stages", "maxnreg")

Launch = tuple[JITFunction, dict[str, Any]]


def main() -> None:
    capability, layer = int(sys.argv[1]), sys.argv[2]
    target = GPUTarget("cuda", capability, 32)
    limits = DeviceLimits("none", capability, _PROCESSORS, TARGETS[capability][0] * 1024)
    launcher.device_limits = selection.device_limits = lambda _: limits
    launches: list[Launch] = []
    programs = 1

    def note(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        nonlocal programs
        programs = max(1, grid[0] // _PROCESSORS) if layer in LAYERS else 1
        return lambda *a, **k: launches.append((kernel, _by_name(kernel, a, k)))

    JITFunction.__getitem__ = note
    slots = MOST_REQUESTS if MOST_SLOTS in layer else 64
    if layer in LAYERS:
        with promised(next((kind for name, kind in PROMISES.items() if name in layer), Promise.NOTHING)):
            _launch_attention(slots, *LAYERS[layer])
    elif layer.startswith(SELECTION):
        _launch_select(slots)
    else:
        _launch_draw(getattr(torch, layer.removeprefix(DRAWING)))
    print(json.dumps([(*_compile(*launch, target), programs) for launch in launches]))


def _by_name(kernel: JITFunction, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(kernel.arg_names, positional, strict=False)), **named}


def _launch_attention(
    slots: int, q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int, softcap: float, rows: int
) -> None:
    q, k = torch.zeros(rows, q_heads, dim, dtype=dtype), torch.zeros(rows, kv_heads, dim, dtype=dtype)
    kv = torch.zeros(4, kv_heads, 16, 2 * dim, dtype=dtype)
    scores, pillars = torch.zeros(64, kv_heads, 48), torch.zeros(slots, kv_heads, 16, dtype=torch.int32)
    slot = torch.zeros(slots, dtype=torch.int32)
    table = torch.zeros(slots, 16, dtype=torch.int32)
    step = (slot, slot, slot, slot, table, slot, slot, slot, slot)
    launcher.dual_mode_attention(q, k, k, kv, scores, *step, pillars, dim**-0.5, window, softcap)


def _launch_select(slots: int) -> None:
    slot = torch.zeros(slots, dtype=torch.int32)
    pillars = torch.zeros(slots, 8, 16, dtype=torch.int32)
    selection.select_pillars(torch.zeros(64, 8, 48), slot, slot, slot, pillars, slot)


def _launch_draw(dtype: torch.dtype) -> None:
    real, whole = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    draw.draw_tokens(torch.zeros(8, 151936, dtype=dtype), real, whole, real, real, whole, whole)


def _compile(kernel: JITFunction, arguments: dict[str, Any], target: GPUTarget) -> tuple[str, int, int, int]:
    """Name, bytes of stack a thread, bytes of shared memory and 16-byte asynchronous copies.

    Arguments divisible by 16 are known to be."""
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    signature, constants, hints = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        signature[name] = "constexpr" if parameter.is_constexpr else _type(value)
        if parameter.is_constexpr:
            constants[(index,)] = value
        elif _is_known_to_be_divisible(parameter, value):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=target, options=options)
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", compiled.asm["ptx"]))
    return kernel.fn.__name__, _stack_bytes(compiled.asm["cubin"]), compiled.metadata.shared, copies


def _is_known_to_be_divisible(parameter: Any, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not parameter.do_not_specialize_on_alignment
    return not parameter.do_not_specialize and isinstance(value, int) and value % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in memory for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"no resource usage in: {usage}")
    return int(found[1]) + int(found[2])


if __name__ == "__main__":
    main()
