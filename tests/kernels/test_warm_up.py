"""A call without work, as kernels are compiled by, runs on the Triton kernels and leaves the pool alone."""

import pytest
import torch

from sparsespec_compile.compile import warm_up
from sparsespec_compile.compile.warm_up import Attention, Draw, Layout
from sparsespec_compile.config import SpecConfig
from sparsespec_compile.kernels.launch import Promise
from sparsespec_compile.kernels.ops import AttentionSettings, ExpertsCall, ExpertsSettings
from sparsespec_compile.kernels.ops import experts as ops_of_experts

pytest.importorskip("triton", reason="Triton is published for Linux only")


def packed(heads: int, row: int, offset: int = 0) -> Layout:
    return Layout((16, heads, 8), (row, 8, 1), offset, torch.float32)


@pytest.mark.parametrize("sinks", [None, torch.float32])
@pytest.mark.parametrize("promise", list(Promise))
def test_attention_without_work(
    promise: Promise, sinks: torch.dtype | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsespec_compile.kernels.attention import launcher

    pools = []

    def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, *rest: object) -> None:
        pools.append(kv.fill_(7.0))
        output = launcher.dual_mode_attention(q.fill_(1.0), k.fill_(2.0), v.fill_(3.0), kv, *rest)
        assert not output.any()

    monkeypatch.setattr(warm_up, "dual_mode_attention", launch)
    kv = Layout((2, 2, 4, 16), (256, 64, 16, 1), 8, torch.float32)
    call = Attention(
        packed(4, 64), packed(2, 64, 32), packed(2, 64, 48), kv, 3, promise, AttentionSettings(1.0, 1, 0.0), sinks
    )
    call.run(torch.device(device))
    assert len(pools) == 1
    assert (pools[0] == 7.0).all()


def test_drawing_without_work(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec_compile.kernels.sampling import draw

    drawn = []
    monkeypatch.setattr(warm_up, "draw_tokens", lambda *rows: drawn.append(draw.draw_tokens(*rows)))
    Draw(Layout((1, 2, 151), (302, 151, 1), 0, torch.float32)).run(torch.device(device))
    assert drawn[0].tolist() == [0, 0]


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_without_work(transposed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the matrices of the graph, as they lie, for every number of rows; nobody chooses an expert."""
    from sparsespec_compile.kernels.products import experts

    graph = torch.fx.Graph()
    size = (3, 8, 32) if transposed else (3, 32, 8)
    held = {"up": torch.randn(size, device=device), "down": torch.randn(3, *size[:0:-1], device=device)[:, :, :16]}
    if transposed:
        held["down"] = torch.randn(3, 16, 8, device=device)
    nodes = {name: graph.get_attr(name) for name in held}
    if transposed:
        nodes = {name: graph.call_function(torch.ops.aten.transpose.int, (node, 1, 2)) for name, node in nodes.items()}
    inputs = {"x": torch.empty(16, 8), "choice": torch.empty(16, 2, dtype=torch.int64), "weight": torch.empty(16, 2)}
    for name, value in inputs.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = value
    settings = ExpertsSettings("silu")
    tensors = (nodes[name] for name in ("x", "choice", "weight", "up", "down"))
    call = ExpertsCall(*tensors, None, None, settings)
    for _ in range(2):  # equal layers
        graph.call_function(ops_of_experts, call.arguments())
    (made,) = warm_up._calls_of_experts(torch.fx.GraphModule(held, graph), SpecConfig(max_requests=2))
    assert made.matrices[0].data_ptr() == held["up"].data_ptr()
    assert made.matrices[0].shape == (3, 32, 8)
    launched = []
    monkeypatch.setattr(warm_up, "experts", lambda *given: launched.append(experts.experts(*given)))
    made = made._replace(row_counts=(2, 16))
    made.run(torch.device(device))
    assert [tuple(out.shape) for out in launched] == [(2, 8), (16, 8)]
    assert not any(out.any() for out in launched)
