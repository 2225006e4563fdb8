"""Drafts by an earlier place that is like a text's end, in the text itself or in another one of the batch.

A program searches one text for one request. Then a program for each request takes the best place, and writes what
followed it. Which tokens of a place are equal is one number, bit k for the k-th last token, so a token costs a load, a
comparison and an "or", and the rank of a place follows from the bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_proposals
from ..ops import NGRAM_EQUAL, NGRAM_SUFFIX, NGRAM_TOKENS

_CHUNK = 1024
"""Positions that a program compares at a time."""


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write the tokens behind the place that is most like each text's end to that end; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    texts = length.shape[0]
    found = torch.empty(texts, texts, dtype=torch.int64, device=tokens.device)
    places = tokens, tokens.stride(0), tokens.shape[1], length, wanted, found
    constants = {"TOKENS": NGRAM_TOKENS, "SUFFIX": NGRAM_SUFFIX, "EQUAL": NGRAM_EQUAL}
    search_kernel[(texts, texts)](*places, **constants, CHUNK=_CHUNK)
    blocks = {"TEXTS": triton.next_power_of_2(texts), "LANES": triton.next_power_of_2(max(most, 1))}
    write_kernel[(texts,)](*places, texts, most, **blocks)


@triton.jit
def search_kernel(
    tokens,
    stride,
    width,
    length,
    wanted,
    found,
    TOKENS: tl.constexpr,
    SUFFIX: tl.constexpr,
    EQUAL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Search a text for a request: ``rank * width + position`` of the best place, or -1."""
    request, source = tl.program_id(0), tl.program_id(1)
    if tl.load(wanted + request) <= 0:
        return
    newest, last = tl.load(length + request), tl.load(length + source)
    end = tokens + request.to(tl.int64) * stride + newest
    text = tokens + source.to(tl.int64) * stride
    own = (request == source).to(tl.int32)
    best = tl.full((CHUNK,), 0, tl.int32)
    place = tl.full((CHUNK,), 0, tl.int32)
    for start in range(0, last, CHUNK):
        position = start + tl.arange(0, CHUNK)
        alike = position < last
        equal = tl.zeros((CHUNK,), tl.int32)
        back = 0
        # In most texts few places are like the end for more than a few tokens. Four loads are under way at a time.
        while (back < TOKENS) & (tl.max(alike.to(tl.int32), 0) > 0):
            for _ in tl.static_range(4):
                here = tl.load(text + position - back, mask=alike & (position >= back), other=-1)
                there = tl.load(end - back, mask=newest >= back, other=-2)
                equal |= (here == there).to(tl.int32) << back
                back += 1
            compared = (1 << (back - 2)) - 1
            alike = alike & ((equal & 3) != 0) & ((_three_unequal(equal) & compared) == 0)
        rank = _rank(equal, own, SUFFIX, EQUAL)
        better = (rank > 0) & (rank >= best)
        best = tl.where(better, rank, best)
        place = tl.where(better, position, place)
    encoded = tl.where(best > 0, best.to(tl.int64) * width + place, -1)
    tl.store(found + request * tl.num_programs(1) + source, tl.max(encoded, 0))


@triton.jit
def _rank(equal, own, SUFFIX: tl.constexpr, EQUAL: tl.constexpr):
    """Order of places by their equal tokens, 0 for what is none: levels of suffixes by their bits, and two above."""
    whole: tl.constexpr = (1 << SUFFIX) - 1
    unequal = _three_unequal(equal)
    count = _ones(equal & ((unequal & -unequal) - 1))
    suffix = ((~equal & (equal + 1)) - 1) & whole
    rank = suffix * 64 + own * 32 + count
    rank = tl.where(count >= EQUAL, whole * 64 + count * 2 + own, rank)
    rank = tl.where(suffix == whole, (whole + 1) * 64 + count * 2 + own, rank)
    return tl.where((equal & 3) != 0, rank, 0)


@triton.jit
def _three_unequal(equal):
    """Bits k of which k, k + 1 and k + 2 are unequal."""
    return ~(equal | (equal >> 1) | (equal >> 2))


@triton.jit
def _ones(bits):
    """Number of ones among 24 bits."""
    bits -= (bits >> 1) & 0x555555
    bits = (bits & 0x333333) + ((bits >> 2) & 0x333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F
    return (bits + (bits >> 8) + (bits >> 16)) & 31


@triton.jit
def write_kernel(tokens, stride, width, length, wanted, found, texts, most, TEXTS: tl.constexpr, LANES: tl.constexpr):
    """Write what followed a request's best place."""
    request = tl.program_id(0)
    count = tl.minimum(tl.load(wanted + request), most)
    if count <= 0:
        return
    newest = tl.load(length + request)
    lane = tl.arange(0, TEXTS)
    of_text = tl.load(found + request * texts + lane, mask=lane < texts, other=-1)
    best = tl.max(of_text, 0)
    # Without a place the newest token repeats.
    source = tl.where(best < 0, request, tl.min(tl.where(of_text == best, lane, TEXTS), 0))
    match = tl.where(best < 0, newest - 1, best % width)
    nth = tl.arange(0, LANES)
    target = newest + 1 + nth
    write = (nth < count) & (target < width)
    # Behind the end of a text its last period repeats.
    follows_at = match + 1 + nth % (tl.load(length + source) - match)
    follows = tl.load(tokens + source.to(tl.int64) * stride + follows_at, mask=write, other=0)
    tl.store(tokens + request.to(tl.int64) * stride + target, follows, mask=write)
