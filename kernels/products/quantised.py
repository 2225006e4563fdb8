"""8-bit copies of weights, and products of few rows with them: quantise, widen, multiply.

Copies: one program a row of a weight, which reads it twice, the second time from a cache.

A row of a copy lies in memory as pairs of bytes, so that one 16-bit element holds two weights that are K / 2 apart.
Matrix instructions take 16-bit elements from registers as they are loaded, two in a register, and a few operations make
two weights of the low bytes or of the high bytes there. Single bytes would have to be loaded two at a time and moved
to where they belong first.

Products: weights stand on the left of the matrix instruction, whose left side is 64 high at least and comes from
registers, where they are widened; rows stand on the right, 16 wide at least. So few rows leave little of an instruction
unused. Where the columns of a weight make too few tiles to keep all multiprocessors reading, several programs share a
tile, each with a stretch of K, and the last of them to end adds their parts up in a fixed order.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_quantise, check_quantised_product
from ..launch import INTERPRETER, DeviceLimits, counters, device_limits, refuse_fp8
from ..ops import LARGEST, SMALLEST

_MOST_CHUNK = 2048

_ROUND = tl.constexpr(1.5 * 2**23)
"""Added to a float32 of magnitude below 2**22 and taken away again, it rounds half to even."""

_SMALLEST = tl.constexpr(SMALLEST)


def quantise_rows(weight: Tensor, out_weight: Tensor, out_scale: Tensor, paired: bool = True) -> None:
    """Write a weight's 8-bit form; see ``kernels.ops``.

    Raises:
        KernelUnavailableError: fp8 on a device without conversions to it.
    """
    check_quantise(weight, out_weight, out_scale)
    refuse_fp8(out_weight)
    columns, inner = weight.shape
    if columns == 0:
        return
    quantise_kernel[(columns,)](
        weight,
        weight.stride(0),
        inner,
        out_weight,
        out_scale,
        LARGEST_UNIT=LARGEST[out_weight.dtype],
        WHOLE=out_weight.dtype == torch.int8,
        PAIRED=paired,
        CHUNK=min(triton.next_power_of_2(max(inner // 2, 1)), _MOST_CHUNK),
        num_warps=8,
    )


@triton.jit
def quantise_kernel(
    weight,
    stride,
    inner,
    out_weight,
    out_scale,
    LARGEST_UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    PAIRED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find the row's largest magnitude, then write its units and its scale."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    found = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, inner, CHUNK):
        found = tl.maximum(found, tl.abs(_finite(weight + row * stride, start + lane, inner)))
    magnitude = tl.max(found, 0)
    kept = magnitude >= _SMALLEST
    divisor = tl.where(kept, magnitude, 1.0)
    tl.store(out_scale + row, tl.where(kept, tl.math.div_rn(magnitude, LARGEST_UNIT), 0.0))
    per_unit = tl.where(kept, tl.math.div_rn(divisor * 0.0 + LARGEST_UNIT, divisor), 0.0)
    half = inner // 2
    for start in range(0, half, CHUNK):
        target = 2 * start + tl.arange(0, 2 * CHUNK)
        if PAIRED:
            early = _finite(weight + row * stride, start + lane, half)
            late = _finite(weight + row * stride + half, start + lane, half)
            units = tl.interleave(early, late) * per_unit
        else:
            units = _finite(weight + row * stride, target, inner) * per_unit
        if WHOLE:
            units = (units + _ROUND) - _ROUND
        units = tl.minimum(tl.maximum(units, -LARGEST_UNIT), LARGEST_UNIT).to(out_weight.dtype.element_ty)
        tl.store(out_weight + row * inner + target, units, mask=target < inner)


@triton.jit
def _finite(row, column, inner):
    """Weights as float32, those that are not finite as 0."""
    value = tl.load(row + column, mask=column < inner, other=0.0).to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


_CONVERSIONS = {
    # The low seven bits of a weight in a bfloat16 between 128 and 256; the sign bit turns the -128 beside it into -256.
    ("int8", "bf16"): """
        lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA;
        lop3.b32 b, t, 0x00800080, 0xC300C300, 0xEA;
        mov.b32 c, 0x3F803F80;
        fma.rn.bf16x2 $0, a, c, b;""",
    # The weight plus 128 in a float16 between 1024 and 2048.
    ("int8", "fp16"): """
        lop3.b32 a, t, 0x00ff00ff, 0x64806480, 0x6A;
        mov.b32 b, 0xE480E480;
        add.rn.f16x2 $0, a, b;""",
    # Exponent and fraction where bfloat16 has them, and 2**120 for what its exponent counts from.
    ("fp8", "bf16"): """
        shr.u32 b, t, 4;
        and.b32 b, b, 0x07f007f0;
        lop3.b32 a, t, 0x80008000, b, 0xEA;
        mov.b32 c, 0x7B807B80;
        mov.b32 b, 0x80008000;
        fma.rn.bf16x2 $0, a, c, b;""",
    # The same in float16, and 2**8.
    ("fp8", "fp16"): """
        shr.u32 b, t, 1;
        and.b32 b, b, 0x3f803f80;
        lop3.b32 a, t, 0x80008000, b, 0xEA;
        mov.b32 c, 0x5C005C00;
        mul.rn.f16x2 $0, a, c;""",
}
"""Instructions from a register t, which has a weight in the low byte of each half (int8) or in the high byte (fp8)."""

_MOVE = {
    ("int8", False): "mov.b32 t, $1;",
    ("int8", True): "shr.u32 t, $1, 8;",
    ("fp8", False): "shl.b32 t, $1, 8;",
    ("fp8", True): "mov.b32 t, $1;",
}
"""To t from a register of two pairs, for the low and for the high bytes."""


def instructions(kind: str, dtype: str, high: bool) -> str:
    """PTX that makes two numbers of the low or of the high bytes of two 16-bit elements."""
    return f"{{ .reg .b32 t, a, b, c; {_MOVE[kind, high]} {_CONVERSIONS[kind, dtype]} }}"


@triton.jit
def widened(pairs, value, PTX: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr):
    """Weights of the first half of K of 16-bit pairs, or of the second, in value's dtype. PTX "": for any device."""
    if PTX == "":
        narrow = ((pairs if HIGH else pairs << 8) >> 8).to(tl.int8)
        # By way of float32: Triton's interpreter has no direct way to bfloat16.
        if FP8:
            wide = narrow.to(tl.float8e4nv, bitcast=True).to(tl.float32).to(value.dtype)
        else:
            wide = narrow.to(tl.float32).to(value.dtype)
    else:
        wide = tl.inline_asm_elementwise(PTX, "=r,r", [pairs], dtype=value.dtype, is_pure=True, pack=2)
    return wide


_LONG = 4096
"""Pairs of a column beyond which a program has enough of them to share a tile of many columns."""

_MOST_PARTS = 8

_PTX_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Tile:
    """How a product is divided.

    Attributes:
        rows: of a tile, a power of two, 16 at least.
        columns: of a tile, a power of two, 64 at least for Hopper's own matrix instructions.
        pairs: of weights that a program takes at a time from each of its columns.
        parts: programs that share a tile.
        warps: of a program, 4 or 8.
        stages: blocks of pairs that are fetched ahead, and the one at work.
    """

    rows: int
    columns: int
    pairs: int
    parts: int
    warps: int
    stages: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory that blocks of pairs and of rows of this dtype take."""
        return self.stages * self.pairs * 2 * (self.columns + self.rows * dtype.itemsize)


def quantised_product(x: Tensor, weight: Tensor, scale: Tensor, tile: Tile | None = None) -> Tensor:
    """``x @ (weight * scale[:, None]).T``; see ``kernels.ops``.

    ``tile`` None chooses by shapes and device. Equal calls give equal bits.

    Raises:
        KernelUnavailableError: fp8 on a device without conversions from it.
    """
    check_quantised_product(x, weight, scale)
    refuse_fp8(weight)
    columns, inner = weight.shape
    rows = x.reshape(-1, inner)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(rows.shape[0], columns)
    if out.numel():
        limits = device_limits(x.device)
        chosen = tile or tile_for(rows.shape[0], columns, inner // 2, rows.dtype, limits)
        in_ptx = limits != INTERPRETER and rows.dtype in _PTX_DTYPES
        _launch(rows, weight, scale, out, chosen, in_ptx)
    return out.view(*x.shape[:-1], columns)


def tile_for(rows: int, columns: int, pairs: int, dtype: torch.dtype, limits: DeviceLimits) -> Tile:
    """The tile for a product of [rows, 2 * pairs] and [columns, 2 * pairs], which fits the device.

    Measured on an H200 (benchmarks/LOG.md, 2026-11-30). Few rows want many programs that read, many want wide tiles.
    """
    processors = limits.multiprocessors
    if dtype == torch.float32:
        tile = Tile(16, 64, 32, 1, 4, 3)
    elif rows <= 16:
        tile = Tile(16, 128, 64, _parts(columns, 128, 0.9 * processors), 8, 6 if pairs > _LONG else 4)
    elif rows > 64:
        tile = Tile(128, 128, 64, _parts(columns, 128, 0.7 * processors), 8, 4)
    elif columns >= 128 * processors:
        tile = Tile(64, 128, 64, 1, 4, 4)
    elif pairs > _LONG:
        tile = Tile(64, 128, 64, _parts(columns, 128, 0.9 * processors), 4, 6)
    else:
        tile = Tile(64, 64, 128, _parts(columns, 64, 0.7 * processors), 4, 4)
    while tile.shared_bytes(dtype) > limits.shared_bytes - 2048 and tile.stages > 1:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def _parts(columns: int, width: int, programs: float) -> int:
    """Programs that share a tile of so many columns, so that there are so many programs; a power of two."""
    tiles, parts = triton.cdiv(columns, width), 1
    while tiles * parts < programs and parts < _MOST_PARTS:
        parts *= 2
    return parts


def _launch(rows: Tensor, weight: Tensor, scale: Tensor, out: Tensor, tile: Tile, in_ptx: bool) -> None:
    columns, pairs = weight.shape[0], weight.shape[1] // 2
    parts = tile.parts
    while pairs % (parts * tile.pairs) and parts > 1:
        parts //= 2
    grid = triton.cdiv(columns, tile.columns), triton.cdiv(rows.shape[0], tile.rows)
    tiles = grid[0] * grid[1]
    fp8 = weight.dtype == torch.float8_e4m3fn
    ptx = ["", ""]
    if in_ptx:
        ptx = [instructions("fp8" if fp8 else "int8", _PTX_DTYPES[rows.dtype], high) for high in (False, True)]
    sums = torch.empty(tiles * parts * tile.columns * tile.rows if parts > 1 else 0, device=out.device)
    product_kernel[(grid[0] * parts, grid[1])](
        rows,
        weight.view(torch.int16),
        scale,
        out,
        sums,
        counters(out.device, tiles) if parts > 1 else sums,
        rows.shape[0],
        columns,
        rows.stride(0),
        PAIRS=pairs,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_PAIRS=tile.pairs,
        PARTS=parts,
        EVEN=pairs % (parts * tile.pairs) == 0,
        STAGES=tile.stages,
        FP8=fp8,
        PTX_LOW=ptx[0],
        PTX_HIGH=ptx[1],
        # Float32 products on tensor cores would be rounded to 10 bits.
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x,
    weight,
    scale,
    out,
    parts,
    counts,
    rows,
    columns,
    stride_row,
    # Known when the kernel is compiled, so that the loop is known to run: else matrix instructions wait for each other.
    PAIRS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
    PTX_LOW: tl.constexpr,
    PTX_HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the result, or its part. What lies past the last column or row is read from it and not stored."""
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    stretch: tl.constexpr = PAIRS // PARTS
    lane = tl.arange(0, BLOCK_PAIRS)
    first = part * stretch + lane
    weights = weight + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * PAIRS + first[None, :]
    values = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride_row + first[None, :]
    sums = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
    for start in tl.range(0, stretch, BLOCK_PAIRS, num_stages=STAGES):
        if EVEN:
            pair = tl.load(weights + start)
            early, late = tl.load(values + start), tl.load(values + start + PAIRS)
        else:
            inside = (start + lane < stretch)[None, :]
            pair = tl.load(weights + start, mask=inside, other=0)
            early = tl.load(values + start, mask=inside, other=0.0)
            late = tl.load(values + start + PAIRS, mask=inside, other=0.0)
        sums = tl.dot(widened(pair, early, PTX_LOW, False, FP8), tl.trans(early), sums, input_precision=PRECISION)
        sums = tl.dot(widened(pair, late, PTX_HIGH, True, FP8), tl.trans(late), sums, input_precision=PRECISION)
    if PARTS > 1:
        at = tl.program_id(1) * (tl.num_programs(0) // PARTS) + tile
        shared = parts + at.to(tl.int64) * (PARTS * BLOCK_COLUMNS * BLOCK_ROWS)
        shared += tl.arange(0, BLOCK_COLUMNS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        tl.store(shared + part * (BLOCK_COLUMNS * BLOCK_ROWS), sums)
        # All threads have stored before the one that counts releases what they stored.
        tl.debug_barrier()
        if tl.atomic_add(counts + at, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.store(counts + at, 0)
            sums = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
            for nth in tl.static_range(PARTS):
                sums += tl.load(shared + nth * (BLOCK_COLUMNS * BLOCK_ROWS), cache_modifier=".cg")
            _finish(sums, scale, out, row, column, rows, columns)
    else:
        _finish(sums, scale, out, row, column, rows, columns)


@triton.jit
def _finish(sums, scale, out, row, column, rows, columns):
    """Scale the sums [columns, rows] of a tile and store them."""
    sums *= tl.load(scale + column, mask=column < columns, other=0.0)[:, None]
    targets = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(targets, tl.trans(sums).to(out.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])
