"""Floating-point numbers as integers of the same order, for searches bit by bit."""

import triton
import triton.language as tl


@triton.jit
def ordered_bits(value):
    """float32 values as uint32 keys of the same order: the sign bit flipped, and all other bits too below zero."""
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 equals 0.0
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def from_ordered_bits(key, DROPPED: tl.constexpr):
    """The float32 values of keys whose lowest DROPPED bits, which were 0 in every value, have been shifted out."""
    full = key << DROPPED
    bits = tl.where((full >> 31) == 1, full & 0x7FFFFFFF, ((full ^ 0xFFFFFFFF) >> DROPPED) << DROPPED)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def highest_bound(key, weight, target, BITS: tl.constexpr):
    """The highest bound of BITS bits with keys of a total weight of ``target`` at or above it; 0 if all weigh less.

    ``weight``, int32 or float32 and never negative, is of the shape of ``key``; keys of 0 stand for nothing. Sums have
    a fixed order, in which rounding never makes them grow with the bound: the search is exact for these sums.
    """
    bound = tl.full((), 0, tl.uint32)
    for bit in range(BITS - 1, -1, -1):
        higher = bound | (tl.full((), 1, tl.uint32) << bit)
        enough = tl.sum(tl.where(key >= higher, weight, 0), 0) >= target
        bound = tl.where(enough, higher, bound)
    return bound
