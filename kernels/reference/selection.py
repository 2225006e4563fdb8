"""Selection of the pillars in plain torch: the oracle of the Triton kernel and the implementation on CPU."""

import torch
from torch import Tensor

from ..checks import check_select


def select_pillars(
    scores: Tensor,
    score_slot: Tensor,
    scored_length: Tensor,
    budget: Tensor,
    pillar_index: Tensor,
    pillar_count: Tensor,
) -> None:
    """Keep the positions with the highest scores of each request and head; see ``kernels.ops``."""
    check_select(scores, score_slot, scored_length, budget, pillar_index, pillar_count)
    requests = zip(score_slot.tolist(), scored_length.tolist(), budget.tolist(), strict=True)
    for b, (slot, length, wanted) in enumerate(requests):
        if length < 0:
            continue
        length = min(length, scores.shape[2])
        count = min(max(wanted, 0), length, pillar_index.shape[2])
        pillar_index[b, :, :count] = _highest(scores[slot, :, :length], count)
        pillar_count[b] = count


def _highest(scores: Tensor, count: int) -> Tensor:
    """Positions [H, count], ascending, of the highest scores [H, n]; the lower position wins a tie."""
    key = _ordered_bits(scores)
    if count == 0:
        return key[:, :0]
    last = key.topk(count, dim=1).values[:, -1:]
    above, equal = key > last, key == last
    room = count - above.sum(1, keepdim=True)
    taken = above | (equal & (equal.cumsum(1) <= room))
    return taken.nonzero()[:, 1].view(-1, count)


def _ordered_bits(scores: Tensor) -> Tensor:
    """int32 keys in the order of the float32 scores. Negative floats grow downwards in their bits: turn those over."""
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
