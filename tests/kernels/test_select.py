import torch

from sparsespec_compile.kernels import reference_select


def test_x(device):
    from sparsespec_compile.kernels import triton_select

    torch.manual_seed(0)
    B, H, S, M = 5, 3, 2500, 40
    s = torch.randn(B, H, S)
    s[1] = s[1].mul(2).round()
    s[2] = 0
    s[3, :, ::2] *= 0
    n = torch.tensor([2500, 2000, 77, 1100, 5], dtype=torch.int32)
    b = torch.tensor([40, 33, 50, 39, 7], dtype=torch.int32)
    outs = []
    for f in (reference_select.select_pillars, triton_select.select_pillars):
        pi = torch.full((B, H, M), -9, dtype=torch.int32)
        pc = torch.full((B,), -9, dtype=torch.int32)
        import time

        t = time.time()
        f(s, n, b, pi, pc)
        outs.append((pi, pc))
        print(time.time() - t)
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    print(outs[1])
