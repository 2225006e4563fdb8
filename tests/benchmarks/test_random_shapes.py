"""Models of published shapes with random weights are compiled and decoded, and their rows choose experts evenly."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

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


def test_rows_choose_experts_evenly():
    sizes = COMMON | {"num_hidden_layers": 12, "num_experts": 64, "num_experts_per_tok": 4, "vocab_size": 4096}
    model = random_model("Qwen3-30B-A3B", "cpu", torch.float32, **sizes, moe_intermediate_size=32)
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Qwen3MoeTopKRouter):
            module.register_forward_hook(lambda module, args, out: chosen.append(out[2].view(64, 100, 4)[:, -1]))
    seeded = torch.Generator().manual_seed(1)
    texts = torch.randint(20, (64, 99), generator=seeded)  # of few tokens, as the recorded texts are
    with torch.no_grad():
        model(torch.cat([texts, torch.randint(4096, (64, 1), generator=seeded)], dim=1))
    assert len(chosen) == 12
    even = 64 * (1 - (1 - 4 / 64) ** 64)
    assert min(len(one.unique()) for one in chosen) > 0.9 * even
