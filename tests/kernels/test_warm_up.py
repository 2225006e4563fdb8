"""A call without work, as kernels are compiled by, runs on the Triton kernels and leaves the pool alone."""

import pytest
import torch

from sparsespec_compile.compile import warm_up
from sparsespec_compile.compile.warm_up import Attention, Draw, Layout
from sparsespec_compile.kernels.ops import AttentionSettings
from sparsespec_compile.kernels.step_kind import Promise

pytest.importorskip("triton", reason="Triton is published for Linux only")


def packed(heads: int, row: int, offset: int = 0) -> Layout:
    return Layout((16, heads, 8), (row, 8, 1), offset, torch.float32)


@pytest.mark.parametrize("promise", list(Promise))
def test_attention_without_work(promise: Promise, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsespec_compile.kernels.attention import launcher

    pools = []

    def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, *rest: object) -> None:
        pools.append(kv.fill_(7.0))
        output = launcher.dual_mode_attention(q.fill_(1.0), k.fill_(2.0), v.fill_(3.0), kv, *rest)
        assert not output.any()

    monkeypatch.setattr(warm_up, "dual_mode_attention", launch)
    kv = Layout((2, 2, 4, 16), (256, 64, 16, 1), 8, torch.float32)
    call = Attention(
        packed(4, 64), packed(2, 64, 32), packed(2, 64, 48), kv, 3, promise, AttentionSettings(1.0, 1, 0.0)
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
