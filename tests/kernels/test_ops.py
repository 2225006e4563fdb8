"""The ops as torch sees them: schemas, fakes, and what Inductor makes of a pool that many layers share."""

from typing import NamedTuple

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.ops import STEP_TENSORS, Mode

from .cases import Shape, build
from .steps import MIXED


def test_modes_of_the_kernels() -> None:
    tiles = pytest.importorskip(
        "sparsespec_compile.kernels.attention.tiles", reason="Triton is published for Linux only"
    )
    assert [tiles.IDLE.value, tiles.DRAFT.value, tiles.VERIFY.value, tiles.PREFILL.value] == list(Mode)


def test_calls_name_the_arguments_of_the_ops() -> None:
    """Each argument arrives in the field of its name, and goes back to its place."""
    names = [argument.name for argument in ops.dual_mode_attention._schema.arguments]
    call = ops.AttentionCall.of(names)
    assert call.arguments() == tuple(names)
    assert call.step == STEP_TENSORS
    assert call.settings == call.settings._fields
    assert all(call._asdict()[name] == name for name in ("q", "k", "v", "kv", "scores", "pillar_index", "sinks"))
    names = [argument.name for argument in ops.attention_site._schema.arguments]
    site = ops.SiteCall.of(names)
    assert site.arguments() == tuple(names)
    assert (site.q, site.k, site.v, *site.settings, site.layer, site.sinks) == tuple(names)


def test_a_new_argument_is_one_line() -> None:
    class Longer(NamedTuple):
        step: ops.StepTensors
        more: torch.Tensor | None

    assert ops._schema(Longer).endswith("Tensor recent_start, Tensor? more")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dual_mode_attention_keeps_its_schema(dtype: torch.dtype) -> None:
    case = build(Shape(window=6, value_dim=8), MIXED[:6], dtype)
    case.pool.nan_to_num_()
    for name in ("q", "k", "v"):
        case.tensors[name].nan_to_num_()
    torch.library.opcheck(ops.dual_mode_attention, case.arguments())


def test_attention_site_keeps_its_schema() -> None:
    q, k, v = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 8)
    torch.library.opcheck(ops.attention_site, (q, k, v, 0.25, 3, 2.0, False, 1, None))


def test_select_pillars_keeps_its_schema() -> None:
    scores, index = torch.rand(4, 3, 20), torch.zeros(2, 3, 8, dtype=torch.int32)
    lists = ([3, 9], [20, -1], [5, 5], [0, 3])
    slot, length, budget, count = (torch.tensor(pair, dtype=torch.int32) for pair in lists)
    torch.library.opcheck(ops.select_pillars, (scores, slot, length, budget, index, count))


def test_halved_product_keeps_its_schema() -> None:
    torch.library.opcheck(ops.halved_product, (torch.randn(1, 3, 32), torch.randn(20, 32)))


def _draw_arguments(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    settings = ([0.0, 1.0, 0.7], [0, 3, 0], [1.0, 0.9, 0.5], [0.0, 0.1, 0.0], [1, 2, 3], [7, 8, 2**33])
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
    rows = (torch.tensor(values, dtype=kind) for values, kind in zip(settings, dtypes, strict=True))
    return torch.randn(3, 50).to(dtype), *rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_tokens_keeps_its_schema(dtype: torch.dtype) -> None:
    torch.library.opcheck(ops.draw_tokens, _draw_arguments(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_part_keeps_its_schema(dtype: torch.dtype) -> None:
    logits, temperature, _, _, _, seed, position = _draw_arguments(dtype)
    torch.library.opcheck(ops.draw_part, (logits, temperature, seed, position, 100))


def _draw(logits: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
    return ops.draw_tokens(logits * 2, *rows) + 1


def test_draw_tokens_is_opaque_to_a_compiler() -> None:
    """Inductor calls it as it is: compiled by Inductor, its sort would not compile and its noise would be slow."""
    traced = make_fx(_draw, select_decomp_table(), tracing_mode="symbolic")(*_draw_arguments(torch.float16))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert targets == [aten.mul.Tensor, ops.draw_tokens, aten.add.Tensor]


@pytest.mark.slow
def test_draw_tokens_is_compiled_around() -> None:
    arguments = _draw_arguments(torch.float16)
    assert torch.equal(torch.compile(_draw, fullgraph=True, dynamic=True)(*arguments), _draw(*arguments))
