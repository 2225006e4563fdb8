"""Published shapes with random weights: what an iteration costs, for models to which no trained model is inflated.

Sizes are those of the published configurations. Weights are drawn as transformers initialises them, but embeddings are
larger. Otherwise the states of all rows become alike from layer to layer, so that 64 rows choose half of the experts,
and an iteration reads half of what a trained model's would. With larger embeddings a row's state stays that of its
token, and rows choose evenly. Texts are noise, and the share of drafts that is right says nothing about the published
model.
"""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": (
        GptOssConfig,
        {
            "hidden_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "vocab_size": 201088,
            "max_position_embeddings": 131072,
        },
    ),
}
"""Configurations by name."""

EMBEDDINGS = 100.0
"""Times transformers' own."""


def random_model(
    name: str, device: torch.device | str, dtype: torch.dtype, *, seed: int = 0, **smaller: Any
) -> PreTrainedModel:
    """A model of a published shape in evaluation mode, with random weights made on `device`.

    Args:
        name: of `SHAPES`.
        device, dtype: of its parameters.
        seed: of the weights.
        smaller: fields of the configuration in place of the published ones, for tests.
    """
    kind, fields = SHAPES[name]
    config = kind(**fields | smaller, dtype=dtype)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(EMBEDDINGS)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.requires_grad_(False).eval()
