"""Reads a sliding window out of a transformers mask function.

transformers describes a mask by a function of indices, `mask_function(batch, head, query, key) -> bool`. Which
positions the model lets a token see is whatever that function says, so it is asked, instead of trusting a
configuration field: a chunked, bidirectional or otherwise special mask then cannot be taken for a causal one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SPAN = 1 << 20
"""Positions over which a mask function is looked at. A window this wide or wider counts as none."""


def causal_window(mask_function: MaskFunction) -> int | None:
    """The window of a causal mask: 0 = every earlier position, w > 0 = positions p - w + 1 .. p, None = neither.

    The last row gives the candidate; rows at the start, around the window's first cut and far away must agree with
    it. A chunked mask, for one, looks like a window in some rows and not in those just after a chunk begins.
    """
    visible = _visible(mask_function, SPAN - 1)
    if visible is None:
        return None
    count = int(visible.sum())
    window = 0 if count == SPAN else count
    if count == 0:
        return None
    rows = {0, 1, 2, count - 1, min(count, SPAN - 2), min(count + 1, SPAN - 2), SPAN // 2 + 1, SPAN - 2, SPAN - 1}
    return window if all(_sees_window(mask_function, row, window) for row in rows) else None


def _sees_window(mask_function: MaskFunction, row: int, window: int) -> bool:
    visible = _visible(mask_function, row)
    if visible is None:
        return False
    position = torch.arange(SPAN)
    expected = position <= row
    if window:
        expected &= position > row - window
    return torch.equal(visible, expected)


def _visible(mask_function: MaskFunction, row: int) -> Tensor | None:
    """Which of SPAN keys query `row` sees, bool [SPAN]; None when the function needs more than the indices."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    query = torch.full((1, 1, 1, 1), row)
    key = torch.arange(SPAN).view(1, 1, 1, SPAN)
    try:
        return mask_function(zero, zero, query, key).expand(1, 1, 1, SPAN).reshape(SPAN).bool()
    except (IndexError, RuntimeError):
        return None
