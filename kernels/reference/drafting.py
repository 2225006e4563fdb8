"""N-gram drafts and the selection of pillars in plain torch: the oracle of the Triton kernels, and the CPU's own."""

import torch
from torch import Tensor

from ..checks import check_proposals, check_select
from ..ops import NGRAM_TOKENS


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write what followed the latest earlier occurrence of each text's suffix behind the text; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    width = tokens.shape[1]
    for b, (newest, count) in enumerate(zip(length.tolist(), wanted.tolist(), strict=True)):
        count = min(count, most, width - newest - 1)
        if count <= 0 or newest <= 0:
            continue
        text = tokens[b, : newest + 1]
        match = _latest_match(text)
        if match is not None:
            nth = torch.arange(count, device=tokens.device) % (newest - match)
            tokens[b, newest + 1 : newest + 1 + count] = text[match + 1 + nth]


def _latest_match(text: Tensor) -> int | None:
    """Position at which the latest earlier occurrence of the text's longest repeated suffix ends; None without one.

    Suffixes of up to ``NGRAM_TOKENS`` tokens count; an occurrence may overlap the suffix itself.
    """
    newest = text.shape[0] - 1
    equal = text[:newest] == text[newest]
    matched = equal.int()
    for back in range(1, min(NGRAM_TOKENS, newest + 1)):
        shifted = torch.zeros_like(equal)
        shifted[back:] = text[: newest - back] == text[newest - back]
        equal = equal & shifted
        matched += equal
    longest = int(matched.max())
    return int((matched == longest).nonzero()[-1]) if longest else None


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
