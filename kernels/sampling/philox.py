"""Counter-based Gumbel noise: the same numbers for a (seed, position, token), whoever else is in the batch."""

import torch
from torch import Tensor

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
"""The low 32 bits: a seed or a position is taken apart into two words by it."""


def _multiply(factor: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product.

    The whole product would overflow int64, which C++ need not wrap: so in two halves of 48 bits.
    """
    upper, lower = (value >> 16) * factor, (value & 0xFFFF) * factor
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words for each counter and key.

    Args:
        counter: four int64 tensors of values in [0, 2**32), broadcastable with each other and with the key.
        key: two int64 tensors likewise.

    Returns:
        Four int64 tensors of values in [0, 2**32).
    """
    a, b, c, d = counter
    key_a, key_b = key
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIERS[0], a)
        high_c, low_c = _multiply(_MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_STEPS[0]) & LOW, (key_b + _KEY_STEPS[1]) & LOW
    return a, b, c, d


def gumbel_noise(seed: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise for the token at `position` of the request with `seed`.

    Args:
        seed: int64 [R].
        position: int64 [R], the position in its sequence of the token to be drawn.
        vocabulary: number of tokens V.

    Returns:
        float32 [R, V]. Row r depends on seed[r] and position[r] alone.
    """
    blocks = torch.arange(-(-vocabulary // 4), device=seed.device)
    zero = torch.zeros_like(blocks)
    seed, position = seed[:, None], position[:, None]
    words = philox((blocks, position & LOW, position >> 32, zero), (seed & LOW, (seed >> 32) & LOW))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocabulary]
    # -log(-log(u)) takes its large values where u is next to 1, which float32 cannot resolve; 1 - u can, so draw that.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    exponential = -torch.log1p(-uniform.clamp(max=1.0 - 2.0**-24))
    return -torch.log(exponential)
