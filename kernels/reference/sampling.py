"""Drawing tokens in plain torch, and its noise: the oracle of the Triton kernels and the implementation on CPU.

Noise is counter-based: the same numbers for a (seed, position, token), whoever else is in the batch.
"""

import math

import torch
from torch import Tensor

from ..checks import check_draw, check_draw_part

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


def gumbel_noise(seed: Tensor, position: Tensor, tokens: int, first: int = 0) -> Tensor:
    """Standard Gumbel noise for the token at `position` of the request with `seed`.

    Args:
        seed: int64 [R].
        position: int64 [R], the position in its sequence of the token to be drawn.
        tokens: how many of the vocabulary, N.
        first: the first of them, a multiple of 4.

    Returns:
        float32 [R, N]. Row r depends on seed[r] and position[r] alone.
    """
    blocks = torch.arange(first // 4, -(-(first + tokens) // 4), device=seed.device)
    zero = torch.zeros_like(blocks)
    seed, position = seed[:, None], position[:, None]
    words = philox((blocks, position & LOW, position >> 32, zero), (seed & LOW, (seed >> 32) & LOW))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :tokens]
    # -log(-log(u)) takes its large values where u is next to 1, which float32 cannot resolve; 1 - u can, so draw that.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    exponential = -torch.log1p(-uniform.clamp(max=1.0 - 2.0**-24))
    return -torch.log(exponential)


def draw_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """One token for each row; see ``kernels.ops``. Only rows that need noise get it, only filtered ones are sorted."""
    check_draw(logits, temperature, top_k, top_p, min_p, seed, position)
    token = logits.argmax(dim=-1)
    sampled = (temperature != 0).nonzero()[:, 0]
    if sampled.numel():
        scaled = logits[sampled].float() / temperature[sampled, None]
        filters = (top_k[sampled], top_p[sampled], min_p[sampled])
        token[sampled] = draw(scaled, lowest_kept(scaled, *filters), seed[sampled], position[sampled])
    return token


def draw_part(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, first_token: int
) -> tuple[Tensor, Tensor]:
    """The highest sum of each row among some tokens of the vocabulary, and its token; see ``kernels.ops``."""
    check_draw_part(logits, temperature, seed, position, first_token)
    value = logits.float()
    sampled = (temperature != 0).nonzero()[:, 0]
    if sampled.numel():
        noise = gumbel_noise(seed[sampled], position[sampled], logits.shape[1], first_token)
        value = value.index_copy(0, sampled, value[sampled] / temperature[sampled, None] + noise)
    top = value.argmax(dim=-1)
    return value.gather(-1, top[:, None])[:, 0], top + first_token


def draw(scaled: Tensor, lowest: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The token int64 [R] whose scaled logit [R, V] plus noise is highest, of those that are not below lowest [R]."""
    noisy = scaled + gumbel_noise(seed, position, scaled.shape[-1])
    return noisy.masked_fill_(scaled < lowest[:, None], -math.inf).argmax(dim=-1)


def lowest_kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest scaled logit that passes every filter, float32 [R]. As thresholds, filters need no scatter back."""
    lowest = scaled.amax(dim=-1) + torch.log(min_p)  # log(0) = -inf keeps all
    ordered = ((top_k > 0) | (top_p < 1.0)).nonzero()[:, 0]
    if ordered.numel():
        found = _lowest_in_order(scaled[ordered], top_k[ordered], top_p[ordered])
        lowest[ordered] = torch.maximum(lowest[ordered], found)
    return lowest


def _lowest_in_order(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The lowest scaled logit that passes top_k [R] and top_p [R], float32 [R]. Probabilities are summed in float64."""
    vocabulary = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values
    count = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    top_k_lowest = ordered.gather(-1, count[:, None] - 1)
    probability = ordered.double().masked_fill_(ordered < top_k_lowest, -math.inf).softmax(dim=-1)
    before = torch.nn.functional.pad(probability.cumsum(dim=-1)[:, :-1], (1, 0))  # of the tokens more likely than this
    within = (before < top_p[:, None]) | (top_p[:, None] >= 1.0)
    kept = within.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.maximum(top_k_lowest, ordered.gather(-1, kept - 1))[:, 0]
