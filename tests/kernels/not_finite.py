"""Steps in which keys and values of some rows are not finite: who sees them gives NaN, who does not takes no notice."""

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import Mode

from .cases import Case, Request, Shape
from .naive import expected_output, expected_scores

HIDDEN = [
    Request(Mode.DRAFT, cached=23, pillars=5, recent=17),
    Request(Mode.VERIFY, cached=30, rows=5, score_rows=5, pillars=6, recent=25),
    Request(Mode.PREFILL, cached=8, rows=11, score_rows=4),
    Request(Mode.DRAFT, cached=21, rows=4, pillars=4, recent=19),
    Request(Mode.VERIFY, cached=37, rows=3),
    Request(Mode.PREFILL, cached=5, rows=83),
    Request(Mode.VERIFY, cached=20, rows=2, score_rows=2, pillars=3, recent=20),
]
"""Every mode and tile. The last request stays as it is."""

SHAPES = {
    "gqa": Shape(),
    "window": Shape(window=6),
    "groups of 7, page 16": Shape(q_heads=7, kv_heads=1, page_size=16),
    "chunks": Shape(window=7, chunked=True),
    "groups of 7, window": Shape(q_heads=7, kv_heads=1, page_size=16, window=13),
    "long values": Shape(key_dim=8, value_dim=24, page_size=16, window=33),
}


def with_not_finite(case: Case, bad: float) -> Case:
    """The case with ``bad`` in one value of the middle row of each request but the last, and in some of their keys.

    And in a cached token that a window hides from all rows of a request, or from all but its first.
    """
    shape = case.shape
    for b, request in enumerate(case.requests[:-1]):
        row = request.rows // 2 if request.rows > 1 else None
        if row is not None:
            at = case.row_start[b] + row
            dim = 3 + b % 2
            case.tensors["v"][at, -1, dim] = bad
            case.history[b][-1, request.cached + row, shape.key_dim + dim] = bad
            if b % 2:
                case.tensors["k"][at, -1, 0] = bad
                case.history[b][-1, request.cached + row, 0] = bad
        if shape.window and request.cached > shape.window + 1 and request.mode != Mode.DRAFT:
            first = shape.first_seen(request.cached)
            for position in {min(first, request.cached - 1), first - 1}:
                page, slot = case.tensors["page_table"][b, position // shape.page_size], position % shape.page_size
                case.tensors["kv"][page, -1, slot, 0] = torch.nan  # as the op writes it
                case.tensors["kv"][page, -1, slot, shape.key_dim :] = 0.0
                case.history[b][-1, position] = torch.nan
    return case


def check_hidden(case: Case, output: Tensor, actual: Case, error: Tensor | float) -> None:
    """The output [T, Hq, Dv] and scores of a step against the definition; the written pool holds finite values."""
    expected = expected_output(case).to(output.device)
    seen = ~expected.isfinite().all(-1)
    assert seen.any()
    assert not output[seen].isfinite().all(-1).any()
    excess = (output.double() - expected).abs() - error
    assert excess[~seen].max() <= 0
    scores = expected_scores(case).to(output.device)
    asked = zip(case.requests[:-1], case.tensors["score_slot"].tolist(), strict=False)
    unspecified = {slot for request, slot in asked if request.score_rows}
    specified = [slot for slot in range(len(scores)) if slot not in unspecified]
    found = actual.tensors["scores"][specified].double()
    torch.testing.assert_close(found, scores[specified], rtol=1e-4, atol=1e-6)
    for b, request in enumerate(case.requests):
        for position in range(request.cached, request.length):
            page = case.tensors["page_table"][b, position // case.shape.page_size]
            token = actual.tensors["kv"][page, :, position % case.shape.page_size].cpu()
            keys, values = token.split((case.shape.key_dim, case.shape.value_dim), -1)
            kept = case.history[b][:, position, case.shape.key_dim :].isfinite()
            assert values.isfinite().all()
            assert torch.equal(keys.isnan().any(-1), ~kept.all(-1))
