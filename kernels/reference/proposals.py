"""Drafts from the text itself in plain torch: the oracle of the Triton kernel and the implementation on CPU."""

import torch
from torch import Tensor

from ..checks import check_proposals
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
