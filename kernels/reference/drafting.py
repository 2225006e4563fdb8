"""N-gram drafts and the selection of pillars in plain torch: the oracle of the Triton kernels, and the CPU's own."""

import torch
from torch import Tensor

from ..checks import check_proposals, check_select
from ..ops import NGRAM_TOKENS


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write what followed the longest earlier occurrence of each text's suffix behind the text; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    texts, lengths = tokens[: length.shape[0]], length.tolist()
    for b, (newest, count) in enumerate(zip(lengths, wanted.tolist(), strict=True)):
        count = min(count, most, tokens.shape[1] - newest - 1)
        found = _longest_match(texts, length, b, newest) if count > 0 else None
        if found is not None:
            source, match = found
            nth = torch.arange(count, device=tokens.device) % (lengths[source] - match)
            texts[b, newest + 1 : newest + 1 + count] = texts[source, match + 1 + nth]


def _longest_match(texts: Tensor, length: Tensor, b: int, newest: int) -> tuple[int, int] | None:
    """Text and position at which the best earlier occurrence of a text's suffix ends; None without one.

    Suffixes of up to ``NGRAM_TOKENS`` tokens count; an occurrence in the text itself may overlap the suffix.
    """
    end = int(length.max())
    known = torch.arange(end, device=texts.device) < length[:, None]
    source, place = ((texts[:, :end] == texts[b, newest]) & known).nonzero(as_tuple=True)
    if not len(source):
        return None
    for back in range(1, min(NGRAM_TOKENS, newest + 1)):
        longer = (place >= back) & (texts[source, place - back] == texts[b, newest - back])
        if not longer.any():
            break
        source, place = source[longer], place[longer]
    own = source == b
    if own.any():
        return b, int(place[own].max())
    best = int(place.max())
    return int(source[place == best].min()), best


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
