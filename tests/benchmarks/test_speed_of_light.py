"""The speed of light of measured iterations beside that of the cost model's steady state."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from sparsespec_compile import H200
from sparsespec_compile.advice.config_cost import config_cost

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from speed_of_light import SpeedOfLight

LAYERS, WIDTH, MLP, VOCABULARY, KV = 3, 256, 512, 1000, 2 * 64
CONFIG = Qwen3Config(
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=MLP,
    vocab_size=VOCABULARY,
)
WEIGHTS = LAYERS * (WIDTH * (2 * WIDTH + 2 * KV) + 3 * WIDTH * MLP) + WIDTH * VOCABULARY


def test_weights_are_read_once_and_the_cache_as_counted():
    light = SpeedOfLight(config_cost(CONFIG, torch.bfloat16), itemsize=2, ceilings=H200)
    alone = light.seconds([2], [0])
    assert alone == pytest.approx(2 * WEIGHTS / H200.read_bytes_per_s, rel=0.02)
    read = 10**7
    assert light.seconds([2], [read]) - alone == pytest.approx(2 * read / H200.read_bytes_per_s)
    assert light.seconds([2, 2], [0, read]) == pytest.approx((light.seconds([2], [0]) + light.seconds([2], [read])) / 2)


def test_iterations_of_the_fewest_rows_have_8_bit_weights():
    cost, half = config_cost(CONFIG, torch.bfloat16), config_cost(CONFIG, torch.float8_e4m3fn)
    light = SpeedOfLight(cost, 2, H200, half)
    eight, exact = SpeedOfLight(half, 2, H200).seconds([4], [100]), SpeedOfLight(cost, 2, H200).seconds([8], [900])
    assert light.seconds([8, 4, 4], [900, 100, 100], draft_weights=2) == pytest.approx((2 * eight + exact) / 3)
    assert light.seconds([8, 4, 4], [900, 100, 100]) > 1.2 * light.seconds([8, 4, 4], [900, 100, 100], 2)


def test_many_rows_take_their_operations():
    light = SpeedOfLight(config_cost(CONFIG, torch.bfloat16), itemsize=2, ceilings=H200)
    assert light.seconds([10**6], [0]) == pytest.approx(2 * WEIGHTS * 10**6 / H200.flops_per_s, rel=0.02)
