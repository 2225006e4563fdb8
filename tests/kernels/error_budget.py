"""How far a float32 attention over half or float32 inputs may lie from the float64 result on the same inputs.

Let e = 2**-23, the error of one float32 operation (tensor cores cut off instead of rounding, so not 2**-24); D the key
dimension, n the most keys a row reads, L = |scale| max|q| max|k| with Euclidean norms, a bound on every logit, c the
soft-cap (0 without).

Logits. A dot product of D terms, the scale and the change to base 2 leave an error of (D + 4) e |scale| sum|q_i k_i|,
at most (D + 4) e L. The soft-cap has slope 1 at most, so it does not enlarge this; computing it as
c - 2c / (exp2(y) + 1) adds at most 8 e c. Together: d = (D + 4) e L + 8 e c.

Weights. exp2 turns an absolute error of its argument into a relative error of its result. The argument, a difference
of two logits, is rounded by at most 2 L e; exp2 itself errs by 2 e. Rescaling to a new maximum multiplies by further
such factors, whose arguments add up to one difference of logits: another 2 L e in all, and 4 e for each block of keys.
A unit of work may be split at any block; joining its parts rescales each once more, by at most another 2 L e in all,
and 4 e and one addition for each part, of which there are no more than blocks. The shift itself cancels. Sums run over
blocks of 16 to 64 keys, then over blocks, then over parts: (64 + n / 16) e and n / 16 e. Together, with
10 (64 + n / 16) e for sums, blocks and parts: t = d + 6 L e + 4 e + 10 (64 + n / 16) e, for numerator and denominator
alike.

Output o = sum p_j v_j, with m = sum p_j |v_j|: numerator and denominator err by t each; weights are rounded to the
dtype of v before they are multiplied (unit roundoff u; absolutely 2**-25 for float16 below its normal numbers, and the
denominator is at least 1), and o is rounded to that dtype:
    |error| <= (2 t + u) m + u |o| + n tiny max|v|.

Scores: s_j = min(1, exp2(x_j - n)), where n, at most L + log(keys), is the log-sum-exp of some of the logits: its sum
errs by t, its rounding by (L + 24) e, and the argument x_j - n, at most 2 L + 24, is rounded. min lets errors through
unenlarged. Averaged over the r rows and heads, with room:
    |error| <= (3 t + (4 L + 64 + r) e) s + 2**-126, the smallest normal number, below which exp2 is not exact.
Where scores are given out weights are measured from n, too: nothing is rescaled, and the denominator, which counts what
n counts, is at least 1 less t.

A tenth is added for products of errors, which is plenty while t is below 0.03.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsespec_compile.kernels.reference import attention as reference

from .cases import Case

EPSILON = 2.0**-23
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}


@dataclass(frozen=True)
class Expected:
    """Float64 results and the error allowed on each element."""

    output: Tensor
    output_error: Tensor
    scores: Tensor
    score_error: Tensor
    pool: Tensor


def expect(case: Case, dtype: torch.dtype, device: str = "cpu") -> Expected:
    """What a step, whose values are exact in ``dtype``, must give when computed in that dtype."""
    exact = case.to(torch.float64, device, torch.float64)
    output = reference.dual_mode_attention(*exact.arguments())
    magnitude = reference.dual_mode_attention(*_with_absolute_values(case, device).arguments())
    relative, logit_bound = _relative_error(exact)
    longest = max(request.length for request in case.requests)
    group = case.shape.q_heads // case.shape.kv_heads
    averaged = group * max(request.score_rows for request in case.requests)
    largest_value = exact.tensors["v"].nan_to_num().abs().max()
    u, tiny = ROUNDOFF[dtype], TINY[dtype]
    if dtype == torch.bfloat16 and device == "cpu":
        u *= 2  # Triton's interpreter cuts bfloat16 off where a GPU rounds
    error = (2 * relative + u) * magnitude + u * output.abs() + longest * tiny * largest_value
    score_relative = 3 * relative + (4 * logit_bound + 64 + averaged) * EPSILON
    scores = exact.tensors["scores"]
    return Expected(output, 1.1 * error, scores, 1.1 * score_relative * scores.abs() + 2.0**-126, exact.pool)


def assert_within(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Each element within its own error; where that is 0 (sentinels, rows of no request) equal."""
    excess = ((actual.double() - expected).abs() - error).nan_to_num(nan=torch.inf)
    worst = excess.argmax()
    assert excess.max() <= 0, (
        f"element {torch.unravel_index(worst, actual.shape)}: {actual.flatten()[worst]} is not within "
        f"{error.flatten()[worst]:.3g} of {expected.flatten()[worst]}; {(excess > 0).sum()} of {actual.numel()} fail"
    )


def _relative_error(case: Case) -> tuple[float, float]:
    """t and L of the derivation."""
    shape = case.shape
    keys = case.tensors["kv"][..., : shape.key_dim]
    norms = [tensor.nan_to_num().norm(dim=-1).max().item() for tensor in (case.tensors["q"], keys)]
    bound = abs(shape.scale) * norms[0] * norms[1]
    longest = max(request.length for request in case.requests)
    logit = (shape.key_dim + 4) * bound + 8 * shape.softcap
    return (logit + 6 * bound + 4 + 10 * (64 + longest / 16)) * EPSILON, bound


def _with_absolute_values(case: Case, device: str) -> Case:
    positive = case.to(torch.float64, device, torch.float64)
    positive.tensors["v"].abs_()
    positive.tensors["kv"][..., case.shape.key_dim :].abs_()
    return positive
