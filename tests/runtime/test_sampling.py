"""Noise and sampler: exact in distribution, reproducible, and sharp enough a test to notice when they are not."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest

from sparsespec_compile.errors import SamplingError
from sparsespec_compile.kernels.ops import draw_tokens
from sparsespec_compile.kernels.reference.sampling import gumbel_noise, lowest_kept, philox
from sparsespec_compile.runtime.device.sampling import DrawParams, SamplingRows, derive_seed

DRAWS = 100_000
LOGITS = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 2.0, -3.0, 0.25, 0.3, 1.5, -6.0])


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors of Philox publish with their code
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == expected


def test_gumbel_noise_is_gumbel_distributed():
    noise = gumbel_noise(torch.arange(50), torch.arange(50) * 1000, 2000).flatten()
    assert kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    assert noise.isfinite().all()


def test_noise_depends_on_seed_position_and_token_alone():
    seeds, positions = torch.tensor([3, 3, 2**62 + 1, 3]), torch.tensor([10, 11, 10, 10])
    noise = gumbel_noise(seeds, positions, 101)
    assert torch.equal(noise[0], noise[3])
    assert torch.equal(noise[2], gumbel_noise(seeds[2:3], positions[2:3], 101)[0])
    assert torch.equal(noise[0, :7], gumbel_noise(seeds[:1], positions[:1], 7)[0])
    for other in (1, 2):
        assert not torch.isclose(noise[0], noise[other]).any()


def test_noise_in_float32_reaches_the_tail():
    """A token of probability 1e-7 must be drawable: 24-bit uniforms would stop at Gumbel noise of 16.6."""
    largest = -math.log(-math.log1p(-(0.5 * 2.0**-32)))
    assert largest > 22


def draw(params: DrawParams, sampler=draw_tokens, logits=LOGITS) -> torch.Tensor:
    """Counts of tokens over consecutive positions of one request."""
    values = (params.temperature, params.top_k, params.top_p, params.min_p, params.seed)
    rows = SamplingRows(*(torch.tensor([value]).expand(DRAWS) for value in values))
    tokens = sampler(logits.expand(DRAWS, -1), *rows, torch.arange(DRAWS))
    return torch.bincount(tokens, minlength=len(logits)).double()


def exact(params: DrawParams) -> torch.Tensor:
    """Probabilities in float64, filter by filter, as HuggingFace's warpers define them."""
    logits = LOGITS.double() / params.temperature
    if params.top_k:
        logits[logits < logits.topk(params.top_k).values[-1]] = -math.inf
    order = logits.argsort(descending=True)
    before = logits.softmax(0)[order].cumsum(0) - logits.softmax(0)[order]
    logits[order[before >= params.top_p]] = -math.inf
    probability = logits.softmax(0)
    logits[probability < params.min_p * probability.max()] = -math.inf
    return logits.softmax(0)


def fits(counts: torch.Tensor, probability: torch.Tensor) -> bool:
    possible = probability > 0
    if counts[~possible].any():
        return False
    if possible.sum() == 1:  # the statistic has no degree of freedom, and nothing else was drawn
        return True
    expected = probability[possible] / probability[possible].sum() * DRAWS
    return bool(chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-4)


SETTINGS = [
    DrawParams(temperature=1.0, seed=11),
    DrawParams(temperature=0.6, seed=12),
    DrawParams(temperature=1.7, top_k=4, seed=13),
    DrawParams(temperature=1.0, top_p=0.8, seed=14),
    DrawParams(temperature=0.9, min_p=0.15, seed=15),
    DrawParams(temperature=1.2, top_k=8, top_p=0.9, min_p=0.05, seed=16),
    DrawParams(temperature=1.0, top_k=1, seed=17),
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_draws_follow_the_exact_probabilities(params):
    assert fits(draw(params), exact(params))


def test_the_distribution_test_notices_a_slightly_colder_sampler():
    """Noise scaled by 0.95 is a temperature 5% too low; the test above must reject it."""

    def biased(logits, temperature, top_k, top_p, min_p, seed, position):
        return (logits + 0.95 * gumbel_noise(seed, position, logits.shape[-1])).argmax(-1)

    params = DrawParams(temperature=1.0, seed=11)
    assert not fits(draw(params, biased), exact(params))


def test_filters_match_huggingface():
    """The same tokens survive as in transformers' own warpers, on random logits."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_k, top_p, min_p in [(0.7, 10, 0.9, 0.0), (1.0, 3, 0.5, 0.1), (1.5, 0, 0.95, 0.02)]:
        warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        warpers.insert(1, TopKLogitsWarper(top_k)) if top_k else None
        warpers.append(MinPLogitsWarper(min_p)) if min_p else None
        expected = logits
        for warper in warpers:
            expected = warper(None, expected)
        filters = (torch.tensor([value]).expand(200) for value in (top_k, top_p, min_p))
        scaled = logits / temperature
        kept = scaled >= lowest_kept(scaled, *filters)[:, None]
        assert torch.equal(kept, expected.isfinite())


def test_greedy_rows_beside_sampled_ones():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor([0.0, 1.0] * 3)
    rows = SamplingRows(temperature, torch.zeros(6).long(), torch.ones(6), torch.zeros(6), torch.arange(6))
    tokens = draw_tokens(logits, *rows, torch.arange(6))
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, index) for seed in range(30) for index in range(100)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(2**63 - 1, 5) == derive_seed(2**63 - 1, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(SamplingError, match=rf"{name} must be .*got"):
        DrawParams(**{name: value})
