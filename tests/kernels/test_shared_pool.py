"""Layers that write into their own views of one pool, compiled by Inductor: same result, and no copy of the pool."""

import re

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from sparsespec_compile.kernels import ops
from sparsespec_compile.kernels.ops import Mode

from .cases import Request, Shape, build

LAYERS = 3
SHAPE = Shape()
REQUESTS = [
    Request(Mode.DRAFT, cached=9, pillars=3, recent=7),
    Request(Mode.VERIFY, cached=8, rows=3, score_rows=3),
]
LAYER_ELEMENTS = SHAPE.kv_heads * SHAPE.page_size * (SHAPE.key_dim + SHAPE.value_dim)
POOL_WIDTH = LAYERS * LAYER_ELEMENTS
HEADS = (SHAPE.q_heads, SHAPE.kv_heads, SHAPE.kv_heads)

Inputs = tuple[Tensor, ...]


def _layers(x: Tensor, weight: Tensor, pool: Tensor, scores: Tensor, pillars: Tensor, *step: Tensor) -> Tensor:
    """A stack of attention layers, each with its part of the pool [pages, POOL_WIDTH], scores and pillars."""
    for layer in range(LAYERS):
        q, k, v, kv = _project(x, weight, pool, layer)
        heads = slice(layer * SHAPE.kv_heads, (layer + 1) * SHAPE.kv_heads)
        out = ops.dual_mode_attention(
            q, k, v, kv, scores[:, heads], *step, pillars[:, heads], SHAPE.scale, 0, 0.0, False, None
        )
        x = x + out.flatten(1)
    return x


def _layers_writing_themselves(x: Tensor, weight: Tensor, pool: Tensor, scores: Tensor, *rest: Tensor) -> Tensor:
    """Writes as an index_put of the graph, which Inductor cannot do in place: what the op is there to avoid."""
    for layer in range(LAYERS):
        _, k, _, kv = _project(x, weight, pool, layer)
        kv[torch.arange(k.shape[0]), :, 0, : SHAPE.key_dim] = k
        x = x + kv.sum()
    return x


def _project(x: Tensor, weight: Tensor, pool: Tensor, layer: int) -> tuple[Tensor, ...]:
    part = pool[:, layer * LAYER_ELEMENTS : (layer + 1) * LAYER_ELEMENTS]
    kv = part.view(-1, SHAPE.kv_heads, SHAPE.page_size, SHAPE.key_dim + SHAPE.value_dim)
    q, k, v = (x @ weight[layer]).unflatten(1, (-1, SHAPE.key_dim)).split(HEADS, 1)
    return torch.nn.functional.rms_norm(q, (SHAPE.key_dim,)), k, v, kv


def _inputs() -> Inputs:
    """Sizes a runtime changes (rows, pages, positions, pillars) are marked dynamic."""
    case = build(SHAPE, REQUESTS, torch.float32)
    generator = torch.Generator().manual_seed(1)
    rows, width = case.tensors["q"].shape[0], SHAPE.q_heads * SHAPE.key_dim
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(LAYERS, width, sum(HEADS) * SHAPE.key_dim, generator=generator) / 8
    pool = torch.randn(case.pool.shape[0], POOL_WIDTH, generator=generator)
    scores, pillars = (case.tensors[name].repeat(1, LAYERS, 1) for name in ("scores", "pillar_index"))
    for tensor, dimension in ((x, 0), (pool, 0), (scores, 2), (pillars, 2)):
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return (x, weight, pool, scores, pillars, *(case.tensors[name] for name in ops.STEP_TENSORS))


def _pool_copies(code: str) -> int:
    return len(re.findall(rf"empty_strided_cpu\(\([^()]*\b{POOL_WIDTH}\), ", code))


@torch.no_grad()
def test_layers_share_one_pool_without_copies() -> None:
    expected, actual = _inputs(), _inputs()
    expected_out = _layers(*expected)
    torch._dynamo.reset()
    out, (code,) = run_and_get_code(torch.compile(_layers, fullgraph=True), *actual)
    torch.testing.assert_close(out, expected_out)
    for after, before in zip(actual, expected, strict=True):
        torch.testing.assert_close(after, before)
    assert len(re.findall(r"= torch\.ops\.sparsespec\.dual_mode_attention\.default\(", code)) == LAYERS
    assert _pool_copies(code) == 0, code


@torch.no_grad()
def test_the_search_for_copies_finds_them() -> None:
    torch._dynamo.reset()
    _, (code,) = run_and_get_code(torch.compile(_layers_writing_themselves, fullgraph=True), *_inputs())
    assert _pool_copies(code) > 0, code
