"""Compiles the Triton kernels of some layers, or of other ops, for one GPU architecture, without a GPU.

Prints what each needs as JSON, by name. Run as a script in a fresh process (`compile_for_target.py 90 Gemma-2 Phi-3`):
the interpreter leaves traces in triton.language that would get in the compiler's way. The launchers are called as they
are; their kernels are compiled instead of started.
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
from sparsespec_compile.kernels.drafting import ngrams, pillars
from sparsespec_compile.kernels.launch import DeviceLimits, Promise, promised
from sparsespec_compile.kernels.ops import QUANTISED_DTYPES, ExpertsCall, ExpertsSettings
from sparsespec_compile.kernels.products import experts, quantised
from sparsespec_compile.kernels.sampling import draw

SINKS = "sinks"
"""In the name of a layer with attention sinks."""

CHUNKS = "chunks"
"""In the name of a layer whose window is chunks."""

LAYERS = {
    "Qwen3-8B": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, single rows": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, single rows, most slots": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, unscored": (32, 8, 128, torch.bfloat16, 0, 0.0, 16),
    "Qwen3-8B, prefilling": (32, 8, 128, torch.bfloat16, 0, 0.0, 1024),
    "Gemma-2": (8, 4, 256, torch.bfloat16, 4096, 50.0, 16),
    "Phi-3": (32, 32, 96, torch.float16, 2047, 0.0, 16),
    "float32": (7, 1, 64, torch.float32, 0, 0.0, 16),
    "gpt-oss, sinks": (64, 8, 64, torch.bfloat16, 128, 0.0, 16),
    "gpt-oss, sinks, single rows": (64, 8, 64, torch.bfloat16, 0, 0.0, 16),
    "71 heads": (71, 1, 64, torch.bfloat16, 0, 0.0, 16),
    "Llama-4, chunks": (40, 8, 128, torch.bfloat16, 8192, 0.0, 16),
    "Llama-4, chunks, single rows": (40, 8, 128, torch.bfloat16, 8192, 0.0, 16),
    "Llama-4, chunks, prefilling": (40, 8, 128, torch.bfloat16, 8192, 0.0, 1024),
}
"""Name: query heads, KV heads, head dimension, dtype, window, soft-cap, rows of the step.

What is promised stands in the name."""

MOST_SLOTS = "most slots"
"""In the name of what is compiled for as many requests as settings allow."""

PROMISES = {"single rows": Promise.SMALL_TILES, "unscored": Promise.NO_SCORES}

SHARED_KIB = {80: 164, 86: 100, 90: 228}
"""Of a multiprocessor, by compute capability."""

TARGETS = {
    80: ("Phi-3", "float32", "Qwen3-8B, single rows", "Llama-4, chunks"),
    86: ("Qwen3-8B",),
    90: (
        "Qwen3-8B",
        "Qwen3-8B, unscored",
        "Qwen3-8B, single rows",
        "Qwen3-8B, single rows, most slots",
        "Qwen3-8B, prefilling",
        "Gemma-2",
        "gpt-oss, sinks",
        "gpt-oss, sinks, single rows",
        "71 heads",
        "Llama-4, chunks",
        "Llama-4, chunks, single rows",
        "Llama-4, chunks, prefilling",
    ),
}
"""Layers to compile, by compute capability."""

SELECTION, PROPOSALS, DRAWING, PRODUCT, EXPERTS = "selection", "proposals", "drawing ", "product ", "experts "
MIXTURES = {
    "Qwen3-30B-A3B": (128, 8, 2048, 768, torch.bfloat16, False, ExpertsSettings("silu")),
    "gpt-oss-20b": (32, 4, 2880, 2880, torch.bfloat16, True, ExpertsSettings("swish", 1.702, 7.0, 1.0, True)),
    "Nemotron": (16, 2, 512, 304, torch.float16, False, ExpertsSettings("relu2")),
    "in float32": (16, 2, 512, 256, torch.float32, False, ExpertsSettings("gelu")),
}
"""Name: experts, choices of a row, width, hidden values, dtype, whether matrices are transposed and biased, settings.
Those with relu2 have no gate."""

OTHERS = (
    *(f"{EXPERTS}of 64 rows, {name}" for name in MIXTURES),
    *(f"{EXPERTS}of {rows} rows, Qwen3-30B-A3B" for rows in (2, 2048)),
    *(f"{PRODUCT}of {rows} rows with {kind}" for rows, kind in ((2, "int8"), (64, "int8"), (64, "fp8"))),
    SELECTION,
    f"{SELECTION}, {MOST_SLOTS}",
    f"{PROPOSALS}, {MOST_SLOTS}",
    *(f"{DRAWING}{str(dtype).removeprefix('torch.')}" for dtype in draw.DROPPED),
)
"""What is compiled besides layers, for the oldest and the newest of these capabilities."""

POINTERS = {
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}
_PROCESSORS = 100

OPTIONS = ("num_warps", "num_stages", "maxnreg")

Launch = tuple[JITFunction, dict[str, Any]]


def main() -> None:
    capability, layers = int(sys.argv[1]), sys.argv[2:]
    target = GPUTarget("cuda", capability, 32)
    limits = DeviceLimits("none", capability, _PROCESSORS, SHARED_KIB[capability] * 1024)
    for module in (launcher, ngrams, pillars, quantised, experts):
        module.device_limits = lambda _: limits
    launches: list[Launch] = []
    programs = 1

    def note(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        nonlocal programs
        programs = max(1, grid[0] // _PROCESSORS)
        return lambda *a, **k: launches.append((kernel, _by_name(kernel, a, k)))

    JITFunction.__getitem__ = note
    needs = {}
    for layer in layers:
        launches.clear()
        _launch(layer)
        needs[layer] = [(*_compile(*launch, target), programs if layer in LAYERS else 1) for launch in launches]
    print(json.dumps(needs))


def _launch(layer: str) -> None:
    slots = MOST_REQUESTS if MOST_SLOTS in layer else 64
    if layer in LAYERS:
        with promised(next((kind for name, kind in PROMISES.items() if name in layer), Promise.NOTHING)):
            _launch_attention(slots, *LAYERS[layer], SINKS in layer, CHUNKS in layer)
    elif layer.startswith(SELECTION):
        _launch_select(slots)
    elif layer.startswith(PROPOSALS):
        slot = torch.zeros(slots, dtype=torch.int32)
        ngrams.propose_ngrams(torch.zeros(slots + 1, 1024, dtype=torch.int64), slot, slot, 12)
    elif layer.startswith(EXPERTS):
        _launch_experts(int(layer.split()[2]), *MIXTURES[layer.partition(", ")[2]])
    elif layer.startswith(PRODUCT):
        _launch_product(int(layer.split()[2]), QUANTISED_DTYPES[layer.split()[-1]])
    else:
        _launch_draw(getattr(torch, layer.removeprefix(DRAWING)))


def _by_name(kernel: JITFunction, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(kernel.arg_names, positional, strict=False)), **named}


def _launch_attention(
    slots: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
    rows: int,
    has_sinks: bool,
    chunked: bool,
) -> None:
    q, k = torch.zeros(rows, q_heads, dim, dtype=dtype), torch.zeros(rows, kv_heads, dim, dtype=dtype)
    kv = torch.zeros(4, kv_heads, 16, 2 * dim, dtype=dtype)
    scores, index = torch.zeros(64, kv_heads, 48), torch.zeros(slots, kv_heads, 16, dtype=torch.int32)
    slot = torch.zeros(slots, dtype=torch.int32)
    table = torch.zeros(slots, 16, dtype=torch.int32)
    step = (slot, slot, slot, slot, table, slot, slot, slot, slot)
    sinks = torch.zeros(q_heads, dtype=dtype) if has_sinks else None
    launcher.dual_mode_attention(q, k, k, kv, scores, *step, index, dim**-0.5, window, softcap, chunked, sinks)


def _launch_select(slots: int) -> None:
    slot = torch.zeros(slots, dtype=torch.int32)
    index = torch.zeros(slots, 8, 16, dtype=torch.int32)
    pillars.select_pillars(torch.zeros(64, 8, 48), slot, slot, slot, index, slot)


def _launch_product(rows: int, dtype: torch.dtype) -> None:
    """Qwen3-8B's output projection, whose tiles are shared by programs."""
    x, weight = torch.zeros(rows, 4096, dtype=torch.bfloat16), torch.zeros(4096, 4096, dtype=dtype)
    scale = torch.zeros(4096)
    quantised.quantise_rows(x.new_zeros(4096, 4096), weight, scale)
    quantised.quantised_product(x, weight, scale)


def _launch_experts(
    rows: int,
    count: int,
    chosen: int,
    width: int,
    inner: int,
    dtype: torch.dtype,
    transposed: bool,
    settings: ExpertsSettings,
) -> None:
    columns = inner if settings.activation == "relu2" else 2 * inner
    with torch.device("meta"):
        up, down = torch.empty(count, columns, width, dtype=dtype), torch.empty(count, width, inner, dtype=dtype)
        if transposed:
            up, down = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (up, down))
        biases = (up[:, :, 0].clone(), down[:, :, 0].clone()) if transposed else (None, None)
        index, weight = torch.empty(rows, chosen, dtype=torch.int64), torch.empty(rows, chosen)
        x = torch.empty(rows, width, dtype=dtype)
        experts.experts(*ExpertsCall(x, index, weight, up, down, *biases, settings).arguments())


def _launch_draw(dtype: torch.dtype) -> None:
    real, whole = torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    draw.draw_tokens(torch.zeros(8, 151936, dtype=dtype), real, whole, real, real, whole, whole)


def _compile(kernel: JITFunction, arguments: dict[str, Any], target: GPUTarget) -> tuple[str, int, int, int]:
    """Name, bytes of stack a thread, bytes of shared memory and 16-byte asynchronous copies.

    Arguments divisible by 16 are known to be, and strides of 1."""
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    signature, constants, hints = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        constant = parameter.is_constexpr or value is None or (name.startswith("stride_") and value == 1)
        signature[name] = "constexpr" if constant else _type(value)
        if constant:
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
