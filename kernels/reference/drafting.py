"""N-gram drafts and the selection of pillars in plain torch: the oracle of the Triton kernels, and the CPU's own."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_proposals, check_select
from ..ops import NGRAM_EQUAL, NGRAM_SUFFIX, NGRAM_TOKENS


def propose_ngrams(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Write what followed the place that is most like each text's end behind the text; see ``kernels.ops``."""
    check_proposals(tokens, length, wanted, most)
    room = tokens.shape[1] - 1 - length
    asked = [(b, count) for b, count in enumerate(torch.minimum(wanted.clamp(max=most), room).tolist()) if count > 0]
    if not asked:
        return
    texts, lengths = tokens[: length.shape[0]], length.tolist()
    end = max(lengths) + 1
    # Behind one another, each with as many tokens before it as are compared, so that no comparison leaves its text.
    line = pad(texts[:, :end], (NGRAM_TOKENS, 0), value=_NONE)
    known = torch.arange(-NGRAM_TOKENS, end, device=tokens.device)
    known = ((known >= 0) & (known < length[:, None])).flatten()
    for b, count in asked:
        newest = lengths[b]
        source, place = _best_place(line, known, b, newest)
        nth = torch.arange(count, device=tokens.device) % (lengths[source] - place)
        texts[b, newest + 1 : newest + 1 + count] = texts[source, place + 1 + nth]


_NONE = -1
"""No token."""


def _best_place(line: Tensor, known: Tensor, b: int, newest: int) -> tuple[int, int]:
    """Text and position that are most like the end of text b; without any, the position before its newest token.

    Args:
        line: texts, each behind NGRAM_TOKENS times no token [B, NGRAM_TOKENS + positions].
        known: [elements of line], whether a position is before the newest token of its text.
        b: number of the text.
        newest: position of its newest token.
    """
    last = line[b, newest + 1 : newest + 1 + NGRAM_TOKENS].flip(0)
    last = last.masked_fill(last == _NONE, _NONE - 1)  # which does not equal what is before another text
    width, line = line.shape[1], line.flatten()
    known = known.clone()
    known[1:] &= (line[1:] == last[0]) | (line[:-1] == last[1])
    at = known.nonzero().flatten()
    if not len(at):
        return b, newest - 1
    own = (at // width == b).int()
    rank = _rank(_equal_bits(line, at, last), own)
    at = at[rank == rank.max()]
    source, place = at // width, at % width - NGRAM_TOKENS
    latest = place.max()
    return int(source[place == latest].min()), int(latest)


def _equal_bits(line: Tensor, at: Tensor, last: Tensor) -> Tensor:
    """Which tokens up to each place `at` [n] of a line equal the last ones, the newest first: bit k, int32 [n]."""
    back = torch.arange(NGRAM_TOKENS, device=at.device)
    power = torch.pow(2.0, back)  # sums of which are exact in float32

    def bits(at: Tensor, part: slice) -> Tensor:
        return ((line[at[:, None] - back[part]] == last[part]).float() @ power[part]).int()

    equal = bits(at, slice(_FIRST))
    # Few places go on: three unequal tokens in a row end most of them early.
    further = ((_three_unequal(equal) & ((1 << (_FIRST - 2)) - 1)) == 0).nonzero().flatten()
    equal[further] |= bits(at[further], slice(_FIRST, None))
    return equal


_FIRST = 8
"""Tokens that are compared at every place."""


def _rank(equal: Tensor, own: Tensor) -> Tensor:
    """The order of places but for their positions, by the bits of their equal tokens; own: 1 for the text's own."""
    three = _three_unequal(equal)
    count = _ones(equal & ((three & -three) - 1))
    suffix = ((~equal & (equal + 1)) - 1) & _WHOLE
    level = torch.where(suffix == _WHOLE, _WHOLE + 1, torch.where(count >= NGRAM_EQUAL, _WHOLE, suffix))
    return level * 64 + torch.where(level >= _WHOLE, count * 2 + own, own * 32 + count)


_WHOLE = (1 << NGRAM_SUFFIX) - 1
"""The bits of a suffix that is long enough; those of shorter ones are less."""


def _three_unequal(equal: Tensor) -> Tensor:
    """Bits k of which k, k + 1 and k + 2 are unequal."""
    return ~(equal | (equal >> 1) | (equal >> 2))


def _ones(bits: Tensor) -> Tensor:
    """Number of ones among NGRAM_TOKENS bits."""
    ones = _ONES.to(bits.device)
    return ones[bits & 0xFFF] + ones[bits >> 12]


_ONES = torch.tensor([number.bit_count() for number in range(1 << 12)], dtype=torch.int32, device="cpu")


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
