"""Drawing tokens on the device: filters, noise and argmax, in three launches that read the logits once or twice.

1. ``filter_kernel``: a program a row finds the lowest scaled logit that its filters keep; rows without filters leave.
2. ``draw_kernel``: a program for each SPLIT tokens of a row. Of the tokens of a lane it keeps the one with the highest
   bound of logit plus noise, which takes few instructions. Exact values, with their logarithms and division, are for
   the kept ones alone; of the others it gives out the highest bound. What remains is reading, and Philox.
3. ``join_kernel``: the best of a row's programs, the lowest token among equals. Where the bound of what a program left
   aside reaches the best of the whole row, which is rare, all of its tokens are made exact.

Splits depend on the vocabulary alone, so a row's token does not depend on who else is in the call. Where the logits are
those of a part of the vocabulary, tokens are counted from the part's first; the noise and what is given out add it. A
scaled logit plus noise is off by at most 2**-21 + |noise| * 2**-23 + |sum| * 2**-24 (``gumbel``).

Noise has the words of ``philox``, and float32 logarithms that keep their relative precision. With u from a word (24
significant bits, in [2**-33, 1 - 2**-24]) it is -log(e) for the exponential e = -log(1 - u). Where u is small, 1 - u
has lost most of it, so e = u * log(w) / (w - 1) with w = 1 - u as rounded: both factors see the same w, w - 1 is exact,
and log(w) / (w - 1) hardly changes within the rounding of w (by less than 2**-24 of it). With a logarithm within 1 ulp,
a quotient within 2 and a product within 1/2, e is off by less than 2**-21 of itself, so the noise by less than 2**-21 +
|noise| * 2**-23: at most 3.3e-6 at the largest, 22.9.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_draw, check_draw_part
from . import filter as filters

SPLIT = 8192
"""Tokens of a program: 19 programs for a vocabulary of 151,936, so 8 rows fill a GPU."""

BLOCK = 1024
"""Tokens read at once: 8 a thread."""

NUM_WARPS = 4
REGISTERS = 72
"""Of a thread, with which seven programs share a multiprocessor."""

DROPPED = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Lowest bits of a float32 that are 0 in every number of the dtype."""


LOG_2 = tl.constexpr(0.6931471805599453)


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """One token for each row; see ``kernels.ops``."""
    check_draw(logits, temperature, top_k, top_p, min_p, seed, position)
    rows, vocabulary = logits.shape
    if rows == 0:
        return position.new_empty(0)
    heat, count, mass, share = (setting.contiguous() for setting in (temperature, top_k, top_p, min_p))
    lowest = torch.empty(rows, dtype=torch.float32, device=logits.device)
    candidates = torch.empty(rows, filters.ROOM, dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        filters.filter_kernel[(rows,)](
            logits,
            heat,
            count,
            mass,
            share,
            candidates,
            lowest,
            vocabulary,
            logits.stride(0),
            DROPPED=DROPPED[logits.dtype],
            BLOCK=filters.BLOCK,
            MOST=filters.MOST,
            ROOM=filters.ROOM,
            num_warps=filters.NUM_WARPS,
        )
    return _draw(logits, heat, seed, position, lowest, 0)[1]


def draw_part(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, first_token: int
) -> tuple[Tensor, Tensor]:
    """The highest sum of each row among some tokens of the vocabulary, and its token; see ``kernels.ops``."""
    check_draw_part(logits, temperature, seed, position, first_token)
    lowest = torch.full((logits.shape[0],), -math.inf, dtype=torch.float32, device=logits.device)
    return _draw(logits, temperature.contiguous(), seed, position, lowest, first_token)


def _draw(
    logits: Tensor, heat: Tensor, seed: Tensor, position: Tensor, lowest: Tensor, first_token: int
) -> tuple[Tensor, Tensor]:
    """Of the tokens whose scaled logits are not below ``lowest``, those with the highest sums, and these sums."""
    rows, tokens = logits.shape
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    value = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return value, token
    splits = triton.cdiv(tokens, SPLIT)
    best = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    best_token = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    left_aside = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    shared = (logits, heat, seed.contiguous(), position.contiguous(), lowest, best, best_token, left_aside)
    sizes = (tokens, logits.stride(0), first_token)
    with torch.cuda.device_of(logits):
        draw_kernel[(rows, splits)](*shared, *sizes, SPLIT=SPLIT, BLOCK=BLOCK, num_warps=NUM_WARPS, maxnreg=REGISTERS)
        join_kernel[(rows,)](
            *shared,
            value,
            token,
            *sizes,
            splits,
            SPLITS=triton.next_power_of_2(splits),
            SPLIT=SPLIT,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return value, token


@triton.jit(do_not_specialize=["first_token"])
def draw_kernel(
    logits,
    temperature,
    seed,
    position,
    lowest,
    best,
    best_token,
    left_aside,
    vocabulary,
    stride_row,
    first_token,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of the tokens that are kept of SPLIT of a row: its value, what the argmax is over, and its token.

    And a bound of the values of the others, -inf if there are none.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = split * SPLIT
    end = tl.minimum(first + SPLIT, vocabulary)
    heat = tl.load(temperature + row)
    own = logits + row * stride_row
    if heat == 0.0:
        value, token = _highest(own, first, end, BLOCK)
        others = tl.full((BLOCK,), float("-inf"), tl.float32)
    else:
        low = tl.load(lowest + row)
        bound, token, word, others = _candidates(
            own, first, end, first_token, heat, tl.load(seed + row), tl.load(position + row), low, BLOCK
        )
        value = _exact(tl.load(own + token).to(tl.float32), word, heat, low)
        value = tl.where(bound > float("-inf"), value, float("-inf"))  # lanes without a candidate
    place = row * tl.num_programs(1) + split
    top, winner = _first_of_highest(value, token)
    tl.store(best + place, top)
    tl.store(best_token + place, winner)
    tl.store(left_aside + place, tl.max(others, 0))


@triton.jit(do_not_specialize=["first_token", "splits"])
def join_kernel(
    logits,
    temperature,
    seed,
    position,
    lowest,
    best,
    best_token,
    left_aside,
    out_value,
    out_token,
    vocabulary,
    stride_row,
    first_token,
    splits,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token with the highest value of a row, the first of equal ones, and the value."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    place = row * splits + split
    value = tl.load(best + place, mask=split < splits, other=float("-inf"))
    token = tl.load(best_token + place, mask=split < splits, other=0x7FFFFFFF)
    others = tl.load(left_aside + place, mask=split < splits, other=float("-inf"))
    top, winner = _first_of_highest(value, token)
    doubt = tl.max(others, 0)
    if (doubt >= top) & (doubt > float("-inf")):
        heat, low = tl.load(temperature + row), tl.load(lowest + row)
        key, at = tl.load(seed + row), tl.load(position + row)
        for number in range(splits):
            if tl.load(left_aside + row * splits + number) >= top:
                first = number * SPLIT
                end = tl.minimum(first + SPLIT, vocabulary)
                own = logits + row * stride_row
                values, tokens = _highest_with_noise(own, first, end, first_token, heat, key, at, low, BLOCK)
                exact, which = _first_of_highest(values, tokens)
                winner = tl.where(exact > top, which, tl.where(exact == top, tl.minimum(which, winner), winner))
                top = tl.maximum(top, exact)
    tl.store(out_value + row, top)
    tl.store(out_token + row, winner.to(tl.int64) + first_token)


@triton.jit
def _first_of_highest(value, token):
    """The highest of some values, and the lowest of the tokens that have it."""
    top = tl.max(value, 0)
    return top, tl.min(tl.where(value == top, token, 0x7FFFFFFF), 0)


@triton.jit
def _highest(logits, first, end, BLOCK: tl.constexpr):
    """Highest logit and its token in each of BLOCK lanes; -inf and ``first`` where there is none above."""
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32) + first
    for start in range(first, end, BLOCK):
        here, logit = _load(logits, start, end, BLOCK)
        better = logit > value
        value, token = tl.where(better, logit, value), tl.where(better, here, token)
    return value, token


@triton.jit
def _highest_with_noise(logits, first, end, first_token, heat, seed, position, lowest, BLOCK: tl.constexpr):
    """The same of scaled logits that are not below ``lowest``, with noise."""
    value = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32) + first
    for start in range(first, end, BLOCK):
        here, logit = _load(logits, start, end, BLOCK)
        noisy = _exact(logit, noise_words(seed, position, first_token + start, BLOCK), heat, lowest)
        better = noisy > value
        value, token = tl.where(better, noisy, value), tl.where(better, here, token)
    return value, token


@triton.jit
def _candidates(logits, first, end, first_token, heat, seed, position, lowest, BLOCK: tl.constexpr):
    """In each of BLOCK lanes the highest bound, its token, its word, and the highest bound of the other tokens."""
    bound = tl.full((BLOCK,), float("-inf"), tl.float32)
    runner_up = bound
    token = tl.zeros((BLOCK,), tl.int32) + first
    word = tl.zeros((BLOCK,), tl.uint32)
    # A product with the reciprocal is within 2**-22 of the quotient; twice that leaves room for what is added to it.
    above, below = (1.0 + 2.0**-21) / heat, (1.0 - 2.0**-21) / heat
    for start in range(first, end, BLOCK):
        here, logit = _load(logits, start, end, BLOCK)
        wanted = True
        if lowest > float("-inf"):  # in a filtered row, a block with nothing to keep costs nothing more
            wanted = tl.max(logit, 0) * above >= lowest
        if wanted:
            words = noise_words(seed, position, first_token + start, BLOCK)
            scaled = tl.maximum(logit * above, logit * below)
            limit = tl.where(scaled < lowest, float("-inf"), scaled + gumbel_bound(words))
            better = limit > bound
            runner_up = tl.maximum(runner_up, tl.minimum(limit, bound))
            bound = tl.maximum(bound, limit)
            token, word = tl.where(better, here, token), tl.where(better, words, word)
    return bound, token, word, runner_up


@triton.jit
def _exact(logit, word, heat, lowest):
    """Scaled logits plus noise; -inf for those that are not kept."""
    scaled = tl.div_rn(logit, heat)
    return tl.where(scaled < lowest, float("-inf"), scaled + gumbel(word))


@triton.jit
def _load(logits, start, end, BLOCK: tl.constexpr):
    """Tokens [BLOCK] and their logits as float32, -inf past the end."""
    token = start + tl.arange(0, BLOCK)
    return token, tl.load(logits + token, mask=token < end, other=float("-inf")).to(tl.float32)


@triton.jit
def noise_words(seed, position, start, BLOCK: tl.constexpr):
    """The words uint32 [BLOCK] of tokens start, start + 1, ...; ``start`` and BLOCK are multiples of 4."""
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    first, second, third, fourth = tl.philox(seed, counter, low, high, zero)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BLOCK,))


@triton.jit
def gumbel(word):
    """Standard Gumbel noise, float32, of words uint32."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    w = 1.0 - u
    lost = w == 1.0
    exponential = tl.where(lost, u, u * (tl.log(w) / tl.where(lost, -1.0, w - 1.0)))
    return -tl.log(exponential)


@triton.jit
def gumbel_bound(word):
    """At least the noise of a word, without a logarithm; by at most 0.07 where the noise is in 3 .. 16.

    e >= u, so the noise is at most -log(u) <= log(2) * (32 - log2(word)). The bits of a float read as an integer are
    its log2 with straight lines between powers of 2: too low by up to 0.0861. 1e-3 covers what is rounded here and in
    ``gumbel``; the bits of word 0 give 110, above any noise.
    """
    bits = word.to(tl.float32).to(tl.int32, bitcast=True)
    return bits.to(tl.float32) * (-LOG_2 * 2.0**-23) + (LOG_2 * (32 + 127) + 1e-3)
