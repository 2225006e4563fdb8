"""Configurations of published checkpoints whose kinds of layers or positions the defaults of their family lack.

transformers' default configuration of a family is often not that of its checkpoints: MiniMax-M3's default has no sparse
layer, LFM2's no convolution, Phi-3.5-MoE's no longrope. "Equal" is to speak of models that people run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """The settings that give a tiny model of a family the kinds of layers and positions of published checkpoints.

    Attributes:
        family: its model type.
        checkpoint: one that has them. "" where the family's code has both kinds and its defaults only one.
        what: which kinds they are, in words.
        settings: of the configuration, beside those of every tiny model.
        alone: no published checkpoint has the default's kinds, so that the default is left out.
    """

    family: str
    checkpoint: str
    what: str
    settings: dict[str, Any]
    alone: bool = False

    @property
    def name(self) -> str:
        """The family, and the checkpoint behind a slash where the family's default is examined as well."""
        return self.family if self.alone else f"{self.family}/{self.checkpoint}"

    @property
    def stands_for(self) -> str:
        """The note in the table."""
        return f"{self.checkpoint}: {self.what}" if self.checkpoint else self.what


def _longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Rotary frequencies of two kinds, for texts up to 256 tokens and for longer ones."""
    factors = {"short_factor": [1.0 + i / 8 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256, **factors, **more}
    return {"rope_parameters": rope, "original_max_position_embeddings": 256}


_BOTH = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0, "original_max_position_embeddings": 128}
_ALPHA = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}}
_PHI3_5 = {"short_mscale": 1.24, "long_mscale": 1.24}

_ALL = (
    Published(
        "cohere_compass_text",
        "",
        "layers with and without a window, which its code has",
        {
            **_BOTH,
            "rope_parameters": {
                "full_attention": None,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        alone=True,
    ),
    Published(
        "deepseek_v3",
        "DeepSeek-V3",
        "yarn",
        {"rope_parameters": {**_YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    Published(
        "exaone4", "EXAONE-4.0-1.2B", "no window", {"layer_types": ["full_attention"] * 4, "sliding_window": None}
    ),
    Published(
        "falcon",
        "falcon-rw-1b",
        "ALiBi",
        {"alibi": True, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False},
    ),
    Published("falcon", "falcon-40b", "fewer KV heads, two norms", {"new_decoder_architecture": True}),
    Published(
        "gemma4_text",
        "gemma-4-26B-A4B",
        "experts, keys that are values, other KV heads in full layers",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
        },
    ),
    Published(
        "gemma4_text",
        "gemma-4-E2B",
        "layers that share keys and values",
        {
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    Published(
        "granitemoehybrid",
        "granite-4.0-micro",
        "attention layers alone",
        {"layer_types": ["full_attention"] * 4, "num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    Published("hunyuan_v1_dense", "Hunyuan-7B-Instruct", "dynamic with a fixed factor", _ALPHA, alone=True),
    Published("hunyuan_v1_moe", "Hunyuan-A13B-Instruct", "dynamic with a fixed factor", _ALPHA, alone=True),
    Published(
        "internlm3",
        "internlm3-8b-instruct",
        "dynamic",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}},
        alone=True,
    ),
    Published("laguna", "", "layers with and without a window, which its code has", _BOTH, alone=True),
    Published(
        "lfm2",
        "LFM2-1.2B",
        "convolutions and attention",
        {"layer_types": ["conv", "conv", "full_attention", "conv"]},
        alone=True,
    ),
    Published(
        "llama", "Llama-3.1-8B", "llama3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **_LLAMA3}}
    ),
    Published("mellum", "", "layers with and without a window, which its code has", _BOTH, alone=True),
    Published("minicpm3", "MiniCPM3-4B", "longrope", _longrope(4), alone=True),
    Published(
        "minimax_m3_vl_text",
        "MiniMax-M3",
        "sparse and full layers",
        {"layer_types": ["full_attention", *["minimax_m3_sparse"] * 3], "mlp_layer_types": ["dense", *["sparse"] * 3]},
        alone=True,
    ),
    Published(
        "ministral",
        "Ministral-8B-Instruct-2410",
        "layers with and without a window",
        {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
        alone=True,
    ),
    Published("mistral", "Mistral-7B-v0.3", "no window", {"sliding_window": None}),
    Published("phi3", "Phi-3-mini-4k-instruct", "a window", {"sliding_window": 8}),
    Published("phi3", "Phi-4-mini-instruct", "longrope", _longrope(8)),
    Published("phi4_multimodal", "Phi-4-multimodal-instruct", "longrope", _longrope(8), alone=True),
    Published("phimoe", "Phi-3.5-MoE-instruct", "longrope", _longrope(8, **_PHI3_5), alone=True),
    Published("starcoder2", "starcoder2-3b", "a window", {"sliding_window": 8}),
)

PUBLISHED: dict[str, Published] = {one.name: one for one in _ALL}


def configurations(families: Sequence[str]) -> list[str]:
    """Names of all that is examined: each family, followed by those of its published configurations beside it."""
    return [name for family in families for name in [family, *(n for n in PUBLISHED if n.startswith(f"{family}/"))]]
