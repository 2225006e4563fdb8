"""Gumbel noise in a kernel: the words of ``kernels.philox``, and float32 logarithms that keep their relative precision.

With u from a word (24 significant bits, in [2**-33, 1 - 2**-24]) the noise is -log(e) for the exponential
e = -log(1 - u). Where u is small, 1 - u has lost most of it, so e = u * log(w) / (w - 1) with w = 1 - u as rounded:
both factors see the same w, w - 1 is exact, and log(w) / (w - 1) hardly changes within the rounding of w (by less than
2**-24 of it). With a logarithm within 1 ulp, a quotient within 2 and a product within 1/2, e is off by less than 2**-21
of itself, so the noise by less than 2**-21 + |noise| * 2**-23: at most 3.3e-6 at the largest, 22.9.
"""

import triton
import triton.language as tl

LOG_2 = tl.constexpr(0.6931471805599453)


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
