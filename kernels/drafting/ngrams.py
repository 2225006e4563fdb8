"""Drafts by an earlier place that is like a text's end, in the text itself or in another one of the batch.

A search goes through one text, or a part of it, for one request, in two phases. The first compares two tokens at every
position and lists the places, a few positions in a hundred. The second takes places from the list as soon as it holds a
batch of them, compares all tokens and ranks them. Then a program for each request takes the best place, and writes what
followed it. Which tokens of a place are equal is one number, bit k for the k-th last token, and the rank of a place
follows from the bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_proposals
from ..launch import device_limits
from ..ops import NGRAM_EQUAL, NGRAM_SUFFIX, NGRAM_TOKENS

_LANES, _ROWS, _BATCH = 32, 16, 32
"""Threads of a warp, positions that each compares before it lists places, and places that are ranked together."""

_PROGRAMS_PER_SM, _REGISTERS = 32, 64
"""Programs of one warp each, as many as a multiprocessor takes, and the registers of a thread that this leaves."""

_MOST_PARTS = 16
"""Of a text, where there are too few texts for all programs."""


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write the tokens behind the place that is most like each text's end to that end; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    texts = length.shape[0]
    if texts == 0:
        return
    processors = device_limits(tokens.device).multiprocessors
    parts = max(1, min(processors * _PROGRAMS_PER_SM // texts**2, _MOST_PARTS))
    searches = texts * texts * parts
    processors = min(processors, searches)
    each = triton.cdiv(searches, processors)
    programs = processors * min(each, _PROGRAMS_PER_SM)
    found = torch.empty(texts, texts, parts, dtype=torch.int64, device=tokens.device)
    lists = torch.empty(programs, _ROWS * _LANES + 2 * _BATCH, dtype=torch.int32, device=tokens.device)
    places = tokens, tokens.stride(0), tokens.shape[1], length, wanted, found
    blocks = {"TEXTS": triton.next_power_of_2(texts), "LANES": _LANES, "ROWS": _ROWS, "BATCH": _BATCH}
    constants = {"TOKENS": NGRAM_TOKENS, "SUFFIX": NGRAM_SUFFIX, "EQUAL": NGRAM_EQUAL}
    options = {"num_warps": 1, "maxnreg": _REGISTERS}
    search_kernel[(programs,)](*places, lists, texts, parts, processors, each, **blocks, **constants, **options)
    blocks = {"FOUND": triton.next_power_of_2(texts * parts), "LANES": triton.next_power_of_2(max(most, 1))}
    write_kernel[(texts,)](*places, texts, parts, most, **blocks)


# A kernel is compiled anew for each pattern of divisible sizes and addresses; no load here gets wider by them.
_ANY_VALUE = ("stride", "width", "texts", "parts", "processors", "each")
_ANY_ADDRESS = ("tokens", "length", "wanted", "found", "lists")


@triton.jit(do_not_specialize=_ANY_VALUE, do_not_specialize_on_alignment=_ANY_ADDRESS)
def search_kernel(
    tokens,
    stride,
    width,
    length,
    wanted,
    found,
    lists,
    texts,
    parts,
    processors,
    each,
    TEXTS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    SUFFIX: tl.constexpr,
    EQUAL: tl.constexpr,
):
    """Search texts for requests: ``rank * width + position`` of the best place of each part of a text, or -1."""
    lane = tl.arange(0, TEXTS)
    if tl.max(tl.load(wanted + lane, mask=lane < texts, other=0), 0) <= 0:
        return
    # Programs that share a multiprocessor, and its cache, have numbers that differ by multiples of their number: they
    # search the same text for several requests.
    program, programs = tl.program_id(0), tl.num_programs(0)
    listed = lists + program.to(tl.int64) * (ROWS * LANES + 2 * BATCH)
    first = program % processors * each
    behind = tl.minimum(first + each, texts * texts * parts)
    for search in range(first + program // processors, behind, programs // processors):
        request, source, part = search % texts, search // texts // parts, search // texts % parts
        if tl.load(wanted + request) > 0:
            best = _best_place(
                tokens + source.to(tl.int64) * stride,
                tl.load(length + source),
                tokens + request.to(tl.int64) * stride,
                tl.load(length + request),
                listed,
                width,
                (request == source).to(tl.int32),
                part,
                parts,
                LANES,
                ROWS,
                BATCH,
                TOKENS,
                SUFFIX,
                EQUAL,
            )
            tl.store(found + (request * texts + source).to(tl.int64) * parts + part, best)


@triton.jit
def _best_place(
    text,
    last,
    end,
    newest,
    listed,
    width,
    own,
    part,
    parts,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    SUFFIX: tl.constexpr,
    EQUAL: tl.constexpr,
):
    """Every ``parts``-th chunk of a text is searched, from chunk ``part`` on, for what is like another one's end."""
    CHUNK: tl.constexpr = ROWS * LANES
    ranked = listed + CHUNK + BATCH
    lane, nth = tl.arange(0, LANES), tl.arange(0, BATCH)
    row = tl.arange(0, ROWS)[:, None]
    here = tl.load(_ids(end + newest))
    before = tl.load(_ids(end + newest - 1), mask=newest > 0, other=-2)
    ending = tl.load(_ids(end + newest - lane), mask=(lane < TOKENS) & (newest >= lane), other=-2)
    best = tl.zeros((BATCH,), tl.int32)
    place = tl.zeros((BATCH,), tl.int32)
    count = 0
    for start in range(part * CHUNK, last, parts * CHUNK):
        position = start + row * LANES + lane[None, :]
        token = text + start + lane[None, :] + row * LANES
        within = position < last
        equal = tl.load(_ids(token), mask=within, other=-1) == here
        equal |= tl.load(_ids(token - 1), mask=within & (position > 0), other=-1) == before
        # Bit r of a lane for its position in row r. Lanes append their places one after the other.
        rest = tl.sum(equal.to(tl.int32) << row, 0)
        places = _ones(rest)
        at = count + tl.cumsum(places, 0) - places
        count += tl.sum(places, 0)
        while tl.max(rest, 0) > 0:
            lowest = rest & -rest
            tl.store(listed + at, start + _ones(lowest - 1) * LANES + lane, mask=rest > 0)
            at += 1
            rest -= lowest
        tl.debug_barrier()  # threads read what others listed
        while (count >= BATCH) | ((count > 0) & (start + parts * CHUNK >= last)):
            taken = tl.minimum(count, BATCH)
            count -= taken
            candidate = tl.load(listed + count + nth, mask=nth < taken, other=-1)
            bits = _equal_bits(text, candidate, ending, lane, TOKENS)
            # Lanes hold the tokens of one place at a time; through memory each gets the bits of a place of its own.
            tl.store(ranked + nth, bits)
            tl.debug_barrier()
            rank = _rank(tl.load(ranked + nth), own, SUFFIX, EQUAL)
            better = (rank > best) | ((rank == best) & (candidate > place))
            best = tl.where(better, rank, best)
            place = tl.where(better, candidate, place)
            tl.debug_barrier()
    encoded = tl.where(best > 0, best.to(tl.int64) * width + place, -1)
    return tl.max(encoded, 0)


@triton.jit
def _equal_bits(text, place, ending, back, TOKENS: tl.constexpr):
    """Which tokens up to each place equal the last ones ``ending``, ``back`` of them before the newest."""
    compared = (back[None, :] < TOKENS) & (place[:, None] >= back[None, :])
    tokens = tl.load(_ids(text - back[None, :] + place[:, None]), mask=compared, other=-1)
    return tl.sum((tokens == ending[None, :]).to(tl.int32) << back[None, :], 1)


@triton.jit
def _ids(token):
    """Where the ids of tokens are: in their lower halves, which come first."""
    return token.to(tl.pointer_type(tl.int32))


@triton.jit
def _rank(equal, own, SUFFIX: tl.constexpr, EQUAL: tl.constexpr):
    """Order of places by their equal tokens, 0 for what is none: levels of suffixes by their bits, and two above."""
    whole: tl.constexpr = (1 << SUFFIX) - 1
    unequal = ~(equal | (equal >> 1) | (equal >> 2))  # bits k of which k, k + 1 and k + 2 are unequal
    count = _ones(equal & ((unequal & -unequal) - 1))
    suffix = ((~equal & (equal + 1)) - 1) & whole
    rank = suffix * 64 + own * 32 + count
    rank = tl.where(count >= EQUAL, whole * 64 + count * 2 + own, rank)
    rank = tl.where(suffix == whole, (whole + 1) * 64 + count * 2 + own, rank)
    return tl.where((equal & 3) != 0, rank, 0)


@triton.jit
def _ones(bits):
    """Number of ones among 24 bits."""
    bits -= (bits >> 1) & 0x555555
    bits = (bits & 0x333333) + ((bits >> 2) & 0x333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F
    return (bits + (bits >> 8) + (bits >> 16)) & 31


@triton.jit
def write_kernel(
    tokens,
    stride,
    width,
    length,
    wanted,
    found,
    texts,
    parts,
    most,
    FOUND: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write what followed a request's best place."""
    request = tl.program_id(0)
    count = tl.minimum(tl.load(wanted + request), most)
    if count <= 0:
        return
    newest = tl.load(length + request)
    lane = tl.arange(0, FOUND)
    searched = texts * parts
    of_part = tl.load(found + request.to(tl.int64) * searched + lane, mask=lane < searched, other=-1)
    best = tl.max(of_part, 0)
    # Without a place the newest token repeats.
    source = tl.where(best < 0, request, tl.min(tl.where(of_part == best, lane, FOUND), 0) // parts)
    match = tl.where(best < 0, newest - 1, best % width)
    nth = tl.arange(0, LANES)
    target = newest + 1 + nth
    write = (nth < count) & (target < width)
    # Behind the end of a text its last period repeats.
    follows_at = match + 1 + nth % (tl.load(length + source) - match)
    follows = tl.load(tokens + source.to(tl.int64) * stride + follows_at, mask=write, other=0)
    tl.store(tokens + request.to(tl.int64) * stride + target, follows, mask=write)
