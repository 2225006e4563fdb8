"""Experts of a mixture: each row by the matrices that it chose, which are read once for all rows that chose them.

Four launches, none of which waits for the host, on grids that follow from shapes alone:
1. `plan_kernel` lays the (row, choice) pairs out by expert, a program for each expert;
2. `up_kernel` multiplies a tile of an expert's rows by a tile of its up (and gate) columns, and applies the activation;
3. `down_kernel` multiplies those by a tile of its down columns and by the rows' weights, a float32 row for each pair;
4. `sum_kernel` adds up the pairs of a row, in the order of its choices.
Sums over what a product sums over run in order as well, and no program adds to what another has written. So equal calls
give equal bits, and a row's do not depend on the other rows but for which tile it is in.

As in `quantised`, weights stand on the left of the matrix instruction, whose left side is 64 high at least on Hopper,
and rows on the right, 16 wide at least: an expert has few rows in a step that decodes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import LOGIT_DTYPES, check_experts
from ..launch import DeviceLimits, device_limits
from ..ops import ExpertsCall

_MOST_ROWS = 128
_MOST_ROWS_IN_FLOAT32 = 32
"""Of a tile. Products in float32 run on ordinary units, whose sums would not fit into registers."""

_PLANNED = 1024
"""Pairs that a program of the plan looks at in one go."""

_SUMMED = 512
"""Columns that a program of the sum adds up."""


@dataclass(frozen=True)
class Tile:
    """How a product is divided.

    Attributes:
        rows: of a tile, a power of two, 16 at least.
        columns: of each of the matrices that a program reads, a power of two.
        inner: of what is summed over, taken at a time.
        warps: of a program.
        stages: blocks that are fetched ahead, and the one at work.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, matrices: int) -> int:
        """Shared memory that blocks of so many matrices and of rows take."""
        return self.stages * self.inner * itemsize * (matrices * self.columns + self.rows)


def tile_for(pairs: int, count: int, matrices: int, dtype: torch.dtype, limits: DeviceLimits) -> Tile:
    """The tile for so many (row, choice) pairs and experts, which fits the device.

    By reasoning about bytes; not measured yet. A tile has room for twice the mean rows of an expert, so that a second
    tile, which would read the weights again, is rare where choices are even, and finds them in the L2 cache otherwise.
    A block of 128 rows of weights and 64 of what is summed over is 16 KiB; three of them under way in each of the two
    or three programs that fit a multiprocessor are more than the 30 KiB that keep memory busy.
    """
    rows = min(_MOST_ROWS, max(16, triton.next_power_of_2(triton.cdiv(2 * pairs, max(1, count)))))
    tile = Tile(rows, 128 // matrices, 64, 4, 4)
    if dtype == torch.float32:
        tile = Tile(min(rows, _MOST_ROWS_IN_FLOAT32), 64 // matrices, 32, 4, 3)
    while tile.shared_bytes(dtype.itemsize, matrices) > (limits.shared_bytes - 4096) // 2:
        smaller = {"stages": tile.stages - 1} if tile.stages > 2 else {"inner": tile.inner // 2}
        tile = replace(tile, **smaller)
    return tile


def experts(*arguments: Any, tiles: tuple[Tile, Tile] | None = None) -> Tensor:
    """Each row by the experts that it chose; see ``kernels.ops``.

    ``tiles`` of the two products, of equally many rows; None chooses by shapes and device.
    """
    call = ExpertsCall.of(arguments)
    check_experts(call, LOGIT_DTYPES)
    x = call.x if call.x.stride(1) == 1 else call.x.contiguous()
    out = x.new_empty(x.shape)
    rows, chosen = call.choice.shape
    count, columns, _ = call.up.shape
    if not out.numel():
        return out
    if not (chosen and count and columns):
        return _without_products(call, out)
    limits = device_limits(x.device)
    gated = columns == 2 * call.down.shape[2]
    if tiles is None:
        up_tile, down_tile = (tile_for(rows * chosen, count, n, x.dtype, limits) for n in (1 + gated, 1))
    else:
        up_tile, down_tile = tiles
    index, weight = call.choice.contiguous(), call.weight.contiguous()
    order, slots = _plan(index, count, up_tile.rows)
    hidden = x.new_empty(rows * chosen, call.down.shape[2])
    _launch_up(call, x, order, slots, hidden, up_tile)
    made = torch.empty(rows * chosen, x.shape[1], dtype=torch.float32, device=x.device)
    _launch_down(call, hidden, weight, order, slots, made, down_tile)
    sum_kernel[(rows, triton.cdiv(x.shape[1], _SUMMED))](
        made, index, out, count, x.shape[1], CHOSEN=chosen, BLOCK=_SUMMED, num_warps=4
    )
    return out


def _without_products(call: ExpertsCall, out: Tensor) -> Tensor:
    """Where there is nothing to multiply: no choices, no experts, or experts of no columns, which give their biases."""
    out.zero_()
    if call.down_bias is not None and call.choice.numel() and len(call.down_bias):
        inside = (call.choice >= 0) & (call.choice < len(call.down_bias))
        biases = call.down_bias[torch.where(inside, call.choice, 0)].float()
        out.copy_((biases * (call.weight.float() * inside)[..., None]).sum(1))
    return out


def _plan(index: Tensor, count: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert, int32 [pairs]; and of each slot its expert and its first and last row among them, [3, slots].

    A tile of rows of an expert has a slot. How many an expert has is known on the device alone, but there is a place
    for its first one that no other expert needs: its first pair, or, where that makes fewer slots, its first pair in
    units of tiles and one more for each expert before. Slots that are left over are empty.
    """
    pairs = index.numel()
    by_pair = pairs <= pairs // tile_rows + count
    slot_count = pairs if by_pair else pairs // tile_rows + count
    order = torch.empty(pairs, dtype=torch.int32, device=index.device)
    slots = torch.empty(3, slot_count, dtype=torch.int32, device=index.device)
    plan_kernel[(count,)](index, order, slots, pairs, slot_count, TILE=tile_rows, BY_PAIR=by_pair, BLOCK=_PLANNED)
    return order, slots


def _launch_up(call: ExpertsCall, x: Tensor, order: Tensor, slots: Tensor, hidden: Tensor, tile: Tile) -> None:
    columns, inner = hidden.shape[1], x.shape[1]
    settings = call.settings
    bias = hidden if call.up_bias is None else call.up_bias.contiguous()
    up_kernel[(slots.shape[1], triton.cdiv(columns, tile.columns))](
        x,
        call.up,
        bias,
        hidden,
        order,
        slots,
        slots.shape[1],
        columns,
        x.stride(0),
        *call.up.stride(),
        INNER=inner,
        CHOSEN=call.choice.shape[1],
        GATED=call.up.shape[1] == 2 * columns,
        INTERLEAVED=settings.interleaved,
        BIASED=call.up_bias is not None,
        ACTIVATION=settings.activation,
        ALPHA=settings.alpha,
        LIMIT=settings.limit,
        SHIFT=settings.shift,
        **_options(tile, columns, inner, x.dtype),
    )


def _launch_down(
    call: ExpertsCall, hidden: Tensor, weight: Tensor, order: Tensor, slots: Tensor, made: Tensor, tile: Tile
) -> None:
    columns, inner = made.shape[1], hidden.shape[1]
    bias = hidden if call.down_bias is None else call.down_bias.contiguous()
    down_kernel[(slots.shape[1], triton.cdiv(columns, tile.columns))](
        hidden,
        call.down,
        bias,
        weight,
        made,
        order,
        slots,
        slots.shape[1],
        columns,
        *call.down.stride(),
        INNER=inner,
        BIASED=call.down_bias is not None,
        **_options(tile, columns, inner, hidden.dtype),
    )


def _options(tile: Tile, columns: int, inner: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_INNER": tile.inner,
        "WHOLE": columns % tile.columns == 0,
        "EVEN": inner % tile.inner == 0,
        "STAGES": tile.stages,
        # Float32 products on tensor cores would be rounded to 10 bits.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit(do_not_specialize=["pairs", "slot_count"])
def plan_kernel(index, order, slots, pairs, slot_count, TILE: tl.constexpr, BY_PAIR: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs and slots of one expert. Every program looks at all pairs, which are few and in the L2 cache."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    earlier, own = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        chosen = tl.load(index + start + lane, mask=start + lane < pairs, other=-1)
        earlier += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    first = tl.sum(earlier, 0)
    end = first + tl.sum(own, 0)
    place = first
    for start in range(0, pairs, BLOCK):
        chosen = tl.load(index + start + lane, mask=start + lane < pairs, other=-1)
        match = (chosen == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(match, 0) - match, start + lane, mask=match != 0)
        place += tl.sum(match, 0)
    base = first if BY_PAIR else first // TILE + expert
    bound = end if BY_PAIR else end // TILE + expert + 1
    if expert == tl.num_programs(0) - 1:
        bound = slot_count
    for start in range(base, bound, BLOCK):
        slot = start + lane
        if BY_PAIR:
            begin = tl.minimum(slot, end)
            length = tl.where((slot - first) % TILE == 0, TILE, 0)
        else:
            begin = tl.minimum(first + (slot - base) * TILE, end)
            length = tl.full((BLOCK,), TILE, tl.int32)
        inside = slot < bound
        tl.store(slots + slot, tl.zeros((BLOCK,), tl.int32) + expert, mask=inside)
        tl.store(slots + slot_count + slot, begin, mask=inside)
        tl.store(slots + 2 * slot_count + slot, tl.minimum(begin + length, end), mask=inside)


@triton.jit
def _block(at, start, stride, lane, inside, INNER: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """What lies `start` further on, [.., inner]; 0 past the last row (unless WHOLE) and past INNER (unless EVEN)."""
    if EVEN:
        block = tl.load(at + start * stride) if WHOLE else tl.load(at + start * stride, mask=inside[:, None], other=0.0)
    elif WHOLE:
        block = tl.load(at + start * stride, mask=(start + lane < INNER)[None, :], other=0.0)
    else:
        block = tl.load(at + start * stride, mask=inside[:, None] & (start + lane < INNER)[None, :], other=0.0)
    return block


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """In float32. What is not a number stays so."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "swish":
        y = x / (1.0 + tl.exp(-ALPHA * x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) is the logistic function of 2 z.
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    else:
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    return y


@triton.jit(do_not_specialize=["slot_count"])
def up_kernel(
    x,
    up,
    bias,
    hidden,
    order,
    slots,
    slot_count,
    columns,
    stride_row,
    stride_expert,
    stride_column,
    stride_inner,
    # Known when the kernel is compiled, so that the loop is known to run: else matrix instructions wait for each other.
    INNER: tl.constexpr,
    CHOSEN: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of hidden values, in the order of the plan.

    Programs of one tile of columns and neighbouring slots are neighbours: slots of one expert find its weights in the
    cache. Rows past a tile's last one are read from that, and not stored.
    """
    slot, tile = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(slots + slot_count + slot), tl.load(slots + 2 * slot_count + slot)
    if first < end:
        expert = tl.load(slots + slot).to(tl.int64)
        row = first + tl.arange(0, BLOCK_ROWS)
        pair = tl.load(order + tl.minimum(row, end - 1))
        lane = tl.arange(0, BLOCK_INNER)
        column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        values = x + (pair // CHOSEN).to(tl.int64)[:, None] * stride_row + lane[None, :]
        matrix = up + expert * stride_expert + lane[None, :] * stride_inner
        weights = matrix + column.to(tl.int64)[:, None] * stride_column
        sums = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
        if GATED and INTERLEAVED:
            # Both in one block, as they lie: columns in turn would be read one by one.
            both = 2 * tile * BLOCK_COLUMNS + tl.arange(0, 2 * BLOCK_COLUMNS)
            pairs_inside = both < 2 * columns
            weights = matrix + both.to(tl.int64)[:, None] * stride_column
            in_turn = tl.zeros((2 * BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
            for start in tl.range(0, INNER, BLOCK_INNER, num_stages=STAGES):
                rows = _block(values, start, 1, lane, inside, INNER, True, EVEN)
                wide = _block(weights, start, stride_inner, lane, pairs_inside, INNER, WHOLE, EVEN)
                in_turn = tl.dot(wide, tl.trans(rows), in_turn, input_precision=PRECISION)
            in_turn = tl.permute(tl.reshape(in_turn, (BLOCK_COLUMNS, 2, BLOCK_ROWS)), (0, 2, 1))
            sums, others = tl.split(in_turn)
        elif GATED:
            others = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
            further = weights + columns * stride_column
            for start in tl.range(0, INNER, BLOCK_INNER, num_stages=STAGES):
                rows = tl.trans(_block(values, start, 1, lane, inside, INNER, True, EVEN))
                gate = _block(weights, start, stride_inner, lane, inside, INNER, WHOLE, EVEN)
                wide = _block(further, start, stride_inner, lane, inside, INNER, WHOLE, EVEN)
                sums = tl.dot(gate, rows, sums, input_precision=PRECISION)
                others = tl.dot(wide, rows, others, input_precision=PRECISION)
        else:
            for start in tl.range(0, INNER, BLOCK_INNER, num_stages=STAGES):
                rows = _block(values, start, 1, lane, inside, INNER, True, EVEN)
                wide = _block(weights, start, stride_inner, lane, inside, INNER, WHOLE, EVEN)
                sums = tl.dot(wide, tl.trans(rows), sums, input_precision=PRECISION)
        if BIASED:
            step: tl.constexpr = 2 if GATED and INTERLEAVED else 1
            at = bias + expert * ((2 if GATED else 1) * columns) + step * column
            sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
            if GATED:
                at += 1 if INTERLEAVED else columns
                others += tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if LIMIT > 0.0:
                sums = tl.where(sums > LIMIT, LIMIT, sums)
                others = tl.where(others > LIMIT, LIMIT, tl.where(others < -LIMIT, -LIMIT, others))
            sums = _activated(sums, ACTIVATION, ALPHA) * (others + SHIFT)
        else:
            sums = _activated(sums, ACTIVATION, ALPHA)
        out = hidden + row.to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(out, sums.to(hidden.dtype.element_ty), mask=inside[:, None] & (row < end)[None, :])


@triton.jit(do_not_specialize=["slot_count"])
def down_kernel(
    hidden,
    down,
    bias,
    weight,
    made,
    order,
    slots,
    slot_count,
    columns,
    stride_expert,
    stride_column,
    stride_inner,
    INNER: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of what experts give, times the rows' weights, at the places of the pairs."""
    slot, tile = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(slots + slot_count + slot), tl.load(slots + 2 * slot_count + slot)
    if first < end:
        expert = tl.load(slots + slot).to(tl.int64)
        row = first + tl.arange(0, BLOCK_ROWS)
        kept = tl.minimum(row, end - 1)
        lane = tl.arange(0, BLOCK_INNER)
        column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        values = hidden + kept.to(tl.int64)[:, None] * INNER + lane[None, :]
        weights = down + expert * stride_expert + lane[None, :] * stride_inner
        weights += column.to(tl.int64)[:, None] * stride_column
        sums = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
        for start in tl.range(0, INNER, BLOCK_INNER, num_stages=STAGES):
            rows = _block(values, start, 1, lane, inside, INNER, True, EVEN)
            wide = _block(weights, start, stride_inner, lane, inside, INNER, WHOLE, EVEN)
            sums = tl.dot(wide, tl.trans(rows), sums, input_precision=PRECISION)
        if BIASED:
            sums += tl.load(bias + expert * columns + column, mask=inside, other=0.0).to(tl.float32)[:, None]
        pair = tl.load(order + kept)
        sums *= tl.load(weight + pair).to(tl.float32)[None, :]
        out = made + pair.to(tl.int64)[None, :] * columns + column[:, None]
        tl.store(out, sums, mask=inside[:, None] & (row < end)[None, :])


@triton.jit(do_not_specialize=["count"])
def sum_kernel(made, index, out, count, columns, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of a row: what its experts gave, in the order of its choices."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOSEN):
        pair = row * CHOSEN + choice
        expert = tl.load(index + pair)
        # Of a choice that is no expert nothing was written.
        readable = tl.where((expert >= 0) & (expert < count), columns, 0)
        sums += tl.load(made + pair * columns + column, mask=column < readable, other=0.0)
    tl.store(out + row * columns + column, sums.to(out.dtype.element_ty), mask=column < columns)
