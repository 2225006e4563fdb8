"""Every argument that does not fit is refused by name, with what it is and what it should be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.errors import KernelInputError, SparseSpecError
from sparsespec_compile.kernels.ops import STEP_TENSORS

from .cases import Shape, build
from .steps import MIXED

NAMES = ("q", "k", "v", "kv", "scores", *STEP_TENSORS, "pillar_index", "scale", "window", "softcap", "chunked", "sinks")

Change = Callable[[Tensor], object]

WRONG_ATTENTION: list[tuple[str, Change, str]] = [
    ("q", lambda q: q[0], "q has shape .*; its number of dimensions must be 3"),
    ("q", lambda q: q.int(), "q is torch.int32; allowed on cpu: torch.float16, torch.bfloat16"),
    ("q", lambda q: q[:, :3], "3 query heads over 2 KV heads; the first must be a multiple"),
    ("q", lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "q has last stride 4; it must be 1"),
    ("k", lambda k: k[1:], "k has shape .*; the other arguments call for"),
    ("k", lambda k: k.half(), "k is torch.float16 but q is torch.float32; give both one dtype"),
    ("k", lambda k: k[:, :0], "4 query heads over 0 KV heads"),
    ("v", lambda v: v[:, :1], "v has shape .*; the other arguments call for"),
    ("kv", lambda kv: kv[..., 1:], "kv has shape .*; the other arguments call for"),
    ("kv", lambda kv: kv.double(), "kv is torch.float64 but q is torch.float32"),
    ("kv", lambda kv: kv[0], "kv has shape .*; its number of dimensions must be 4"),
    ("scores", lambda scores: scores.double(), "scores is torch.float64; allowed on cpu: torch.float32"),
    ("scores", lambda scores: scores[:, :1], "scores has shape .*; the other arguments call for"),
    ("scores", lambda scores: scores[..., ::2], "scores has last stride 2; it must be 1"),
    ("request_mode", lambda mode: mode[0], r"request_mode has shape \(\); its number of dimensions must be 1"),
    ("row_count", lambda count: count.long(), r"row_count is torch.int64; it must be torch.int32: call .to"),
    ("row_start", lambda start: start[1:], "row_start has shape .*; the other arguments call for"),
    ("page_table", lambda table: table[0], "page_table has shape .*; its number of dimensions must be 2"),
    ("page_table", lambda table: table[1:], "page_table has shape .*; the other arguments call for"),
    ("pillar_index", lambda index: index[1:], "pillar_index has shape .*; the other arguments call for"),
    ("pillar_index", lambda index: index[..., :0], "pillar_index has room for 0 pillars; its last dimension must be 1"),
    ("pillar_index", lambda index: index[..., ::2], "pillar_index has last stride 2; it must be 1"),
    ("sinks", lambda _: torch.zeros(3), "sinks has shape .*; the other arguments call for"),
    ("sinks", lambda _: torch.zeros(8)[::2], "sinks has last stride 2; it must be 1"),
    ("sinks", lambda _: torch.zeros(4, dtype=torch.int32), "sinks is torch.int32; allowed on cpu"),
    ("scale", lambda _: float("nan"), "scale is nan; it must be finite"),
    ("window", lambda _: -1, "window is -1; give the number of positions a row sees, or 0 for all"),
    ("softcap", lambda _: -2.0, "softcap is -2.0; give a finite positive cap, or 0 for none"),
    ("softcap", lambda _: float("inf"), "softcap is inf"),
    ("chunked", lambda _: True, "chunked attention without a window; give the length of a chunk"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_ATTENTION)
def test_dual_mode_attention_refuses(name: str, change: Change, message: str) -> None:
    case = build(Shape(), MIXED, torch.float32)
    before = case.pool.clone()
    arguments = dict(zip(NAMES, case.arguments(), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(KernelInputError, match=message):
        ops.dual_mode_attention(*arguments.values())
    assert torch.equal(case.pool.nan_to_num(), before.nan_to_num())


def test_tensors_of_two_devices_are_refused() -> None:
    from sparsespec_compile.kernels.reference.attention import dual_mode_attention

    case = build(Shape(), MIXED, torch.float32)
    arguments = dict(zip(NAMES, case.arguments(), strict=True))
    arguments["page_table"] = arguments["page_table"].to("meta")
    with pytest.raises(KernelInputError, match="page_table is on meta, others on cpu; move them to one device"):
        dual_mode_attention(*arguments.values())


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (
            ((2, 4, 5, 16), (2, 2, 5, 16), (2, 2, 5, 16)),
            (1.0, 0, 0.0, False),
            "q has batch size 2; packed tokens have 1",
        ),
        (
            ((1, 4, 5, 16), (1, 2, 6, 16), (1, 2, 5, 16)),
            (1.0, 0, 0.0, False),
            "k has shape .*; the other arguments call for",
        ),
        (
            ((1, 4, 5, 16), (1, 2, 5, 16), (1, 2, 6, 16)),
            (1.0, 0, 0.0, False),
            "v has shape .*; the other arguments call for",
        ),
        (
            ((4, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)),
            (1.0, 0, 0.0, False),
            "q has shape .*; its number of dimensions must be 4",
        ),
        (((1, 4, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)), (1.0, -3, 0.0, False), "window is -3"),
    ],
)
def test_attention_site_refuses(shapes: tuple, settings: tuple, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        ops.attention_site(*(torch.zeros(shape) for shape in shapes), *settings, 0, None)


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        (0, torch.zeros(2, 3), "scores has shape .*; its number of dimensions must be 3"),
        (0, torch.zeros(2, 3, 9, dtype=torch.float64), "scores are torch.float64; the selection takes torch.float32"),
        (0, torch.zeros(2, 3, 18)[..., ::2], "scores has last stride 2"),
        (1, torch.zeros(3, dtype=torch.int32), "score_slot has shape .*; the other arguments call for"),
        (2, torch.zeros(2, 1, dtype=torch.int32), "scored_length has shape .*; its number of dimensions must be 1"),
        (3, torch.zeros(2), "budget is torch.float32; it must be torch.int32"),
        (4, torch.zeros(2, 4, 5, dtype=torch.int32), "pillar_index has shape .*; the other arguments call for"),
        (5, torch.zeros(2, dtype=torch.int64), "pillar_count is torch.int64; it must be torch.int32"),
    ],
)
def test_select_pillars_refuses(position: int, tensor: Tensor, message: str) -> None:
    slot = torch.zeros(2, dtype=torch.int32)
    index = torch.zeros(2, 3, 5, dtype=torch.int32)
    arguments = [torch.zeros(2, 3, 9), slot, slot.clone(), slot.clone(), index, slot.clone()]
    arguments[position] = tensor
    with pytest.raises(KernelInputError, match=message):
        ops.select_pillars(*arguments)


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        (0, torch.zeros(9), "logits has shape .*; its number of dimensions must be 2"),
        (
            0,
            torch.zeros(2, 9).double(),
            "logits is torch.float64; allowed on cpu: torch.float16, torch.bfloat16, torch",
        ),
        (0, torch.zeros(2, 0), "logits have 0 tokens; give at least 1"),
        (0, torch.zeros(2, 18)[:, ::2], "logits has last stride 2"),
        (1, torch.ones(3), "temperature has shape .*; the other arguments call for"),
        (2, torch.ones(2).int(), "top_k is torch.int32; it must be torch.int64: call .to"),
        (3, torch.ones(2).double(), "top_p is torch.float64; it must be torch.float32"),
        (4, torch.ones(2, 1), "min_p has shape .*; the other arguments call for"),
        (5, torch.ones(2), "seed is torch.float32; it must be torch.int64"),
        (6, torch.ones(()).long(), "position has shape .*; the other arguments call for"),
    ],
)
def test_draw_tokens_refuses(position: int, tensor: Tensor, message: str) -> None:
    real, whole = torch.ones(2), torch.ones(2, dtype=torch.int64)
    arguments = [torch.zeros(2, 9), real, whole, real, real, whole, whole]
    arguments[position] = tensor
    with pytest.raises(KernelInputError, match=message):
        ops.draw_tokens(*arguments)


@pytest.mark.parametrize("first_token", [-4, 6, 2**31 - 8])
def test_draw_part_refuses_a_part_elsewhere(first_token: int) -> None:
    real, whole = torch.ones(2), torch.ones(2, dtype=torch.int64)
    with pytest.raises(KernelInputError, match=f"first_token is {first_token}; it must be a multiple of 4"):
        ops.draw_part(torch.zeros(2, 9), real, whole, whole, first_token)
    with pytest.raises(KernelInputError, match=r"seed is torch\.float32"):
        ops.draw_part(torch.zeros(2, 9), real, real, whole, 0)


def test_errors_share_one_base() -> None:
    assert issubclass(KernelInputError, SparseSpecError)
    assert issubclass(KernelInputError, ValueError)
