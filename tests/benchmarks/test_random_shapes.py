"""Models of published shapes with random weights are compiled and decoded."""

import sys
from pathlib import Path

import pytest
import torch

import sparsespec_compile as ss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from random_shapes import SHAPES, random_model

SMALLER = {
    "Qwen3-30B-A3B": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt-oss-20b": {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": None},
}
"""What names sizes of experts differs by family."""

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_decodes_as_transformers_does(name):
    model = random_model(name, "cpu", torch.float32, **COMMON, **SMALLER[name])
    again = random_model(name, "cpu", torch.float32, **COMMON, **SMALLER[name])
    assert all(torch.equal(*both) for both in zip(model.parameters(), again.parameters(), strict=True))
    prompt = torch.arange(10, 30)[None]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 20:].tolist()
    fast = ss.optimize(model, ss.SpecConfig(max_requests=2))
    assert fast.generate_batch([prompt[0].tolist()], ss.SamplingParams(max_new_tokens=12))[0].token_ids == expected
