"""Drafts by the latest earlier occurrence of a text's last tokens: one program a request, one pass over its text."""

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_proposals
from ..ops import NGRAM_TOKENS

_CHUNK = 1024
"""Positions that a program compares at a time."""


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write the tokens after the latest earlier occurrence of each text's suffix to its end; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    lanes = triton.next_power_of_2(max(most, 1))
    propose_kernel[(length.shape[0],)](
        tokens,
        tokens.stride(0),
        tokens.shape[1],
        length,
        wanted,
        most,
        SUFFIX=NGRAM_TOKENS,
        CHUNK=_CHUNK,
        LANES=lanes,
    )


@triton.jit
def propose_kernel(
    tokens, stride, width, length, wanted, most, SUFFIX: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr
):
    """Search and write for the request of this program."""
    request = tl.program_id(0)
    count = tl.minimum(tl.load(wanted + request), most)
    newest = tl.load(length + request)
    if (count <= 0) | (newest <= 0):
        return
    text = tokens + request.to(tl.int64) * stride
    best = tl.full((CHUNK,), -1, tl.int64)
    for start in range(0, newest, CHUNK):
        position = start + tl.arange(0, CHUNK)
        equal = position < newest
        matched = tl.zeros((CHUNK,), tl.int64)
        for back in tl.static_range(SUFFIX):
            inside = equal & (position >= back)
            here = tl.load(text + position - back, mask=inside, other=0)
            there = tl.load(text + tl.maximum(newest - back, 0))
            equal = inside & (here == there)
            matched += equal.to(tl.int64)
        # Prefer the longest match, then the latest.
        best = tl.maximum(best, tl.where(matched > 0, matched * width + position, -1))
    found = tl.max(best, 0)
    if found < 0:
        return
    match = found % width
    lane = tl.arange(0, LANES)
    target = newest + 1 + lane
    write = (lane < count) & (target < width)
    # Past the end of the text, its last period repeats.
    follows = tl.load(text + match + 1 + lane % (newest - match), mask=write, other=0)
    tl.store(text + target, follows, mask=write)
