"""Drawing tokens in plain torch: the oracle of the Triton kernels and the implementation on CPU."""

import math

import torch
from torch import Tensor

from ..checks import check_draw
from ..sampling.philox import gumbel_noise


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
