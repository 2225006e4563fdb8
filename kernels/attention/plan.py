"""Who does what: every program of the attention kernel works out its own share from the step tensors.

A unit of work is one tile of rows of a request with one KV head. Requests with few tiles stand in a line, each unit as
long as the blocks of keys it reads plus what starting it costs, and each program takes one equal stretch of the line:
bytes are shared out evenly however lengths are mixed, and a unit may be split over programs (stream-K, Osama et al.
2023, over bytes of KV). Verifications all stand there. Long prompts have tiles enough to share those out whole.
"""

import triton
import triton.language as tl

from .. import ops
from .tiles import DRAFT, IDLE, VERIFY, last_hidden

MEASURING_POSITIONS = tl.constexpr(ops.MEASURING_POSITIONS)
MEASURING_PILLARS = tl.constexpr(ops.MEASURING_PILLARS)

MAX_STREAM_TILES = tl.constexpr(4)
"""Above this many tiles a request is scheduled tile by tile. Verifications always stand in the line, the only path that
writes scores."""


@triton.jit
def tiles_of(kind, count, scored, GROUP: tl.constexpr, SMALL_M: tl.constexpr, BIG_M: tl.constexpr):
    """Whether requests take small tiles (drafts, and what fits one and has no scores), rows of a tile, number of tiles.

    Only large tiles give out scores, and then of all their rows: a verification's are no higher than what it scores.
    """
    small = (kind == DRAFT) | ((count * GROUP <= SMALL_M) & ((scored == 0) | (kind != VERIFY)))
    rows = tl.where(small, SMALL_M // GROUP, BIG_M // GROUP)
    rows = tl.where((kind == VERIFY) & (scored > 0), tl.minimum(rows, scored), rows)
    return small, rows, (count + rows - 1) // rows


@triton.jit
def reading_of(
    kind,
    position,
    pillars,
    recent,
    window,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """What rows from ``position`` on read: a number of pillars, then everything from a first position on.

    Except for drafts it is a multiple of BLOCK_N, so that blocks lie in as few pages as possible.
    """
    draft = kind == DRAFT
    start = tl.where(draft, recent, 0)
    if HAS_WINDOW:
        start = tl.maximum(start, last_hidden(position, 0, window, CHUNKED) + 1)
    return tl.where(draft, pillars, 0), tl.where(draft, start, start // BLOCK_N * BLOCK_N)


@triton.jit
def measuring_pillars(pillars, recent, end):
    """How many of the pillars, from the first on, measure scores beside everything from ``recent`` on."""
    return tl.minimum(pillars, tl.maximum(MEASURING_POSITIONS - (end - recent), MEASURING_PILLARS))


@triton.jit
def cost_of_unit(emits, pillars, recent, end, BLOCK_N: tl.constexpr, OVERHEADS: tl.constexpr):
    """Cost of a unit before its first block, in blocks: to start it, and to read what measures its scores.

    Of several tiles only the last does that, but units of a request are alike in the line. OVERHEADS is (of a unit,
    of one that gives out scores besides).
    """
    measured = (measuring_pillars(pillars, recent, end) + end - recent + BLOCK_N - 1) // BLOCK_N
    # Keys without values.
    return OVERHEADS[0] + tl.where(emits, OVERHEADS[1] + (measured + 1) // 2, 0)


@triton.jit
def emits_scores(kind, scored, tile_rows, EMITS: tl.constexpr):
    """Whether scores come out of the attention pass itself, of a request's last tile, which must hold all scored rows.

    Of a verification alone: what measures its looks is known before. Never without EMITS.
    """
    return (kind == VERIFY) & (scored > 0) & (scored <= tile_rows) & EMITS


@triton.jit
def rows_of_tile(tile, tiles, tile_rows, count):
    """First row of a tile in the line, and the row behind its last: the first tile is the one that may not be full."""
    end = count - (tiles - 1 - tile) * tile_rows
    return tl.maximum(end - tile_rows, 0), end


@triton.jit
def _combine(line, longest, whole, count, end, line_2, longest_2, whole_2, count_2, end_2):
    return line + line_2, tl.maximum(longest, longest_2), whole + whole_2, count + count_2, tl.maximum(end, end_2)


@triton.jit
def plan_requests(
    step,
    requests,
    kv_heads,
    window,
    GROUP: tl.constexpr,
    SMALL_M: tl.constexpr,
    BIG_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    OVERHEADS: tl.constexpr,
    EMITS: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Of each request [REQUESTS]: its cost in the line and its units outside of it, one of which is 0.

    And over all requests the cost, that of the longest unit, the units outside, the rows, and the row behind the last
    that has a request.
    """
    request_mode, row_start, row_count, cached_length, score_rows, pillar_count, recent_start = step
    slot = tl.arange(0, REQUESTS)
    inside = slot < requests
    kind = tl.load(request_mode + slot, mask=inside, other=IDLE)
    count = tl.load(row_count + slot, mask=inside, other=0)
    cached = tl.load(cached_length + slot, mask=inside, other=0)
    scored = tl.load(score_rows + slot, mask=inside, other=0)
    pillars = tl.load(pillar_count + slot, mask=inside, other=0)
    recent = tl.load(recent_start + slot, mask=inside, other=0)
    first_row = tl.load(row_start + slot, mask=inside, other=0)
    count = tl.where(kind == IDLE, 0, count)
    _, tile_rows, tiles = tiles_of(kind, count, scored, GROUP, SMALL_M, BIG_M)
    read, start = reading_of(kind, cached, pillars, recent, window, BLOCK_N, HAS_WINDOW, CHUNKED)
    blocks = (read + cached + count - start + BLOCK_N - 1) // BLOCK_N
    emits = emits_scores(kind, scored, tile_rows, EMITS)
    cost = blocks + cost_of_unit(emits, pillars, recent, cached + count, BLOCK_N, OVERHEADS)
    stands_out = (tiles > MAX_STREAM_TILES) & (kind != VERIFY)
    line = tl.where(stands_out, 0, tiles * cost) * kv_heads
    whole = tl.where(stands_out, tiles * kv_heads, 0)
    row_end = tl.where(count > 0, first_row + count, 0)
    longest = tl.where(stands_out | (count == 0), 0, cost)
    # One exchange between warps for all of them.
    sums = tl.reduce((line, longest, whole, count, row_end), 0, _combine)
    return line, whole, sums


@triton.jit
def locate(ends, at):
    """The request whose stretch of a line holds ``at``, and where it begins; ``ends`` [REQUESTS] never decrease."""
    before = ends <= at
    return tl.sum(before.to(tl.int32), 0), tl.max(tl.where(before, ends, 0), 0)


@triton.jit
def share_of_line(total, longest, PART_COST: tl.constexpr, UNIT_OVERHEAD: tl.constexpr):
    """The length of a stretch, and where this program's begins and ends.

    Parts of a unit are read side by side and joined one after the other, so n parts of b blocks take b / n to read and
    n times a part's cost to join: a stretch is no shorter than the square root of that cost times the longest unit, at
    which both take the same. A stretch is a multiple of the longest unit if that is longer by no more than
    starting a part takes and half as much again, for joining it: where units are alike, none is cut then.
    """
    share = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    worth_joining = (tl.sqrt(longest * (PART_COST / 16.0)) + 0.5).to(tl.int32)
    share = tl.maximum(share, tl.minimum(longest, worth_joining))
    some = tl.maximum(longest, 1)
    whole = (share + some - 1) // some * some
    share = tl.where(whole <= share + UNIT_OVERHEAD * 3 // 2, whole, share)
    begin = tl.minimum(tl.program_id(0) * share, total)
    return share, begin, tl.minimum(begin + share, total)
