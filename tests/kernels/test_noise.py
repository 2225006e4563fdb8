"""Gumbel noise in a kernel: the reference's words, its derived error, and the bound that stands in for it."""

import pytest
import torch
from torch import Tensor

from sparsespec_compile.kernels.reference.sampling import LOW, gumbel_noise, philox

pytest.importorskip("triton", reason="Triton is published for Linux only")

import triton
import triton.language as tl

from sparsespec_compile.kernels.sampling.draw import gumbel, gumbel_bound, noise_words


@triton.jit
def noise_kernel(seed, position, words, noise, bound, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    word = noise_words(tl.load(seed), tl.load(position), 0, BLOCK)
    tl.store(words + place, word.to(tl.int64))
    tl.store(noise + place, gumbel(word))
    tl.store(bound + place, gumbel_bound(word))


@triton.jit
def gumbel_kernel(words, noise, bound, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    word = tl.load(words + place).to(tl.uint32)
    tl.store(noise + place, gumbel(word))
    tl.store(bound + place, gumbel_bound(word))


def philox_words(seed: int, position: int, count: int) -> Tensor:
    """The words of the first tokens, from the reference's generator."""
    counter = (torch.arange(count // 4), torch.tensor(position & LOW), torch.tensor(position >> 32), torch.tensor(0))
    return torch.stack(philox(counter, (torch.tensor(seed & LOW), torch.tensor(seed >> 32))), 1).flatten()


def exact_noise(words: Tensor) -> Tensor:
    """In float64, of the same 24-bit numbers u."""
    u = ((words.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24).double()
    return -torch.log(-torch.log1p(-u))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (2**63 - 1, 2**40 + 7), (9147829917586925044, 12345)])
def test_noise_is_the_reference_s(device: str, seed: int, position: int) -> None:
    given = [torch.tensor([value], device=device) for value in (seed, position)]
    words = torch.zeros(4096, dtype=torch.int64, device=device)
    noise, bound = torch.zeros(2, 4096, device=device)
    noise_kernel[(1,)](*given, words, noise, bound, BLOCK=4096)
    assert torch.equal(words.cpu(), philox_words(seed, position, 4096))
    close = {"rtol": 2**-22, "atol": 2**-20}
    torch.testing.assert_close(noise.cpu(), gumbel_noise(*(value.cpu() for value in given), 4096)[0], **close)


def test_noise_keeps_to_its_bounds(device: str) -> None:
    """The derived error of the noise, and what the kernel passes blocks over by, from the first word to the last."""
    generator = torch.Generator().manual_seed(0)
    powers = 2 ** torch.arange(33)
    words = torch.cat([powers + shift for shift in (-2, -1, 0, 1)] + [torch.arange(300), 2**32 - 1 - torch.arange(300)])
    words = torch.cat([words.clamp(0, 2**32 - 1), torch.randint(2**32, (3000,), generator=generator)])
    words = torch.nn.functional.pad(words, (0, 4096 - len(words)))
    noise, bound = torch.zeros(2, 4096, device=device)
    gumbel_kernel[(1,)](words.to(device), noise, bound, BLOCK=4096)
    exact = exact_noise(words)
    assert ((noise.cpu().double() - exact).abs() <= 2**-21 + exact.abs() * 2**-23).all()
    assert (bound >= noise).all()
    assert (bound.cpu().double() - exact)[(exact > 3) & (exact < 16)].max() < 0.09
