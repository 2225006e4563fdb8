"""Drafts by an earlier occurrence of a text's last tokens, in the text itself or in another one of the batch.

A program searches one text for the suffix of one request. Then a program for each request takes the best occurrence,
and writes what followed it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_proposals
from ..ops import NGRAM_TOKENS

_CHUNK = 1024
"""Positions that a program compares at a time."""


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write the tokens after the longest earlier occurrence of each text's suffix to its end; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    texts = length.shape[0]
    found = torch.empty(texts, texts, dtype=torch.int64, device=tokens.device)
    places = tokens, tokens.stride(0), tokens.shape[1], length, wanted, found
    search_kernel[(texts, texts)](*places, SUFFIX=NGRAM_TOKENS, CHUNK=_CHUNK)
    blocks = {"TEXTS": triton.next_power_of_2(texts), "LANES": triton.next_power_of_2(max(most, 1))}
    write_kernel[(texts,)](*places, texts, most, **blocks)


@triton.jit
def search_kernel(tokens, stride, width, length, wanted, found, SUFFIX: tl.constexpr, CHUNK: tl.constexpr):
    """Search a text for a suffix: ``(2 * tokens in common + own text) * width + position`` of the best place, or -1."""
    request, source = tl.program_id(0), tl.program_id(1)
    if tl.load(wanted + request) <= 0:
        return
    newest, last = tl.load(length + request), tl.load(length + source)
    suffix = tokens + request.to(tl.int64) * stride
    text = tokens + source.to(tl.int64) * stride
    own = (request == source).to(tl.int64)
    best = tl.full((CHUNK,), -1, tl.int64)
    for start in range(0, last, CHUNK):
        position = start + tl.arange(0, CHUNK)
        equal = position < last
        matched = tl.zeros((CHUNK,), tl.int64)
        back = 0
        # Most chunks have no place for more than a token or two.
        while (back < SUFFIX) & (back <= newest) & (tl.max(equal.to(tl.int32), 0) > 0):
            here = tl.load(text + position - back, mask=equal & (position >= back), other=-1)
            equal = equal & (here == tl.load(suffix + newest - back))
            matched += equal.to(tl.int64)
            back += 1
        # Prefer the longest match, then the text's own, then the latest.
        best = tl.maximum(best, tl.where(matched > 0, (2 * matched + own) * width + position, -1))
    tl.store(found + request * tl.num_programs(1) + source, tl.max(best, 0))


@triton.jit
def write_kernel(tokens, stride, width, length, wanted, found, texts, most, TEXTS: tl.constexpr, LANES: tl.constexpr):
    """Write what followed a request's best occurrence."""
    request = tl.program_id(0)
    count = tl.minimum(tl.load(wanted + request), most)
    if count <= 0:
        return
    lane = tl.arange(0, TEXTS)
    of_text = tl.load(found + request * texts + lane, mask=lane < texts, other=-1)
    best = tl.max(of_text, 0)
    if best < 0:
        return
    source = tl.min(tl.where(of_text == best, lane, TEXTS), 0)
    match = best % width
    nth = tl.arange(0, LANES)
    target = tl.load(length + request) + 1 + nth
    write = (nth < count) & (target < width)
    # Behind the end of a text its last period repeats.
    place = match + 1 + nth % (tl.load(length + source) - match)
    follows = tl.load(tokens + source.to(tl.int64) * stride + place, mask=write, other=0)
    tl.store(tokens + request.to(tl.int64) * stride + target, follows, mask=write)
