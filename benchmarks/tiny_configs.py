"""A tiny random configuration for any family of transformers' causal-LM registry.

Sizes are shrunk by name, wherever the family's default configuration has a field of that name; layer patterns are cut
to a few layers with every kind of layer in them; what a family ties together otherwise is in OVERRIDES.
"""

from typing import Any

import torch
from published import PUBLISHED
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
LAYERS = 4
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD = 16
INNER = 96
EXPERTS = 4
POSITIONS = 512
WINDOW = 8
SPREAD = 0.3
"""Standard deviation of random weights: large enough for texts that vary."""


def _each(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


SIZES = {
    **_each(VOCABULARY, "vocab_size", "vocab_size_per_layer_input"),
    **_each(HIDDEN, "hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "emb_dim"),
    **_each(HIDDEN, "input_embedding_size", "output_embedding_size"),
    **_each(INNER, "intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"),
    **_each(INNER, "dense_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"),
    **_each(32, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    **_each(32, "shared_experts_intermediate_size", "expert_ffn_hidden_size"),
    **_each(LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
    **_each(2, "encoder_layers", "num_encoder_layers"),
    **_each(HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    **_each(HEADS, "encoder_attention_heads", "decoder_attention_heads"),
    **_each(HEADS, "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_each(KV_HEADS, "num_key_value_heads", "num_kv_heads"),
    **_each(HEAD, "head_dim", "kv_channels"),
    **_each(EXPERTS, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_each(2, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    **_each(1, "n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_dense_layers"),
    **_each(1, "first_k_dense_replace"),
    **_each(24, "q_lora_rank"),
    **_each(16, "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"),
    **_each(8, "qk_rope_head_dim", "rotary_dim", "laurel_rank"),
    **_each(WINDOW, "sliding_window", "attention_window", "window_size", "local_attention", "attention_window_size"),
    **_each(WINDOW, "attention_chunk_size"),
    **_each(16, "floor_scale"),
    **_each(POSITIONS, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
    **_each(16, "mamba_d_state", "state_size"),
    **_each(SPREAD, "initializer_range", "init_std"),
    **_each(0, "pad_token_id"),
    **_each(1, "bos_token_id", "decoder_start_token_id"),
    **_each(2, "eos_token_id"),
}

MISSING = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts")
"""Fields that are set even where a family's default is None."""

LATENT = {"head_dim": 8, "num_key_value_heads": HEADS}
"""For multi-head latent attention: `head_dim` there is the rotated part, and every head has its own key."""

INDEXER = {**LATENT, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 8}

_NO_EMBEDDINGS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
REQUIRED = {"gemma4_assistant": {"text_config": _NO_EMBEDDINGS}}
"""What a configuration cannot be built without."""

OVERRIDES: dict[str, dict[str, Any]] = {
    **_each(LATENT, "axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"),
    **_each(LATENT, "kimi_linear", "bailing_hybrid"),
    **_each(INDEXER, "axk2", "deepseek_v32", "glm_moe_dsa", "dots3_note_text"),
    **_each(
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        },
        "qwen4_exp_text",
    ),
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {
        "rope_parameters": _each({"rope_type": "default", "rope_theta": 1e4}, "full_attention", "sliding_attention")
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **_each(1, "n_input_layers", "n_output_layers"),
        "n_recurrent_layers": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "intermediate_size": INNER,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
    # 32 recurrent passes: wider weights make it chaotic, and HuggingFace's own float32 text no longer its float64 text.
    "hrm_text": {"initializer_range": 0.05},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"hybrid_layer_ids": [1, 3], "layer_types": ["mamba", "hybrid"] * 2, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The causal LM that `name` stands for, small, with random float32 weights, in evaluation mode.

    Args:
        name: of `published.configurations`: a family, or one with a checkpoint behind a slash.
        seed: of its weights.
    """
    settings = PUBLISHED[name].settings if name in PUBLISHED else {}
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name.partition("/")[0]]]
    torch.manual_seed(seed)
    return kind(_shrunk(kind.config_class, settings)).eval()


def _shrunk(kind: type[PreTrainedConfig], further: dict[str, Any] | None = None) -> PreTrainedConfig:
    required = REQUIRED.get(kind.model_type, {})
    default = kind(**required)
    fields = default.to_dict()
    settings = {name: size for name, size in SIZES.items() if name in fields and _is_size(name, fields[name])}
    for name in ("layer_types", "mlp_layer_types"):
        if fields.get(name):
            settings[name] = _pattern(fields[name])
    for name, value in {"is_decoder": True, "tie_word_embeddings": False}.items():
        if name in fields:
            settings[name] = value
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            small = _shrunk(type(part)).to_dict() if _is_text(name) else _shallow(part)
            settings[name] = {**small, **required.get(name, {})}
    return kind(**{**settings, **OVERRIDES.get(kind.model_type, {}), **(further or {})})


def _is_text(part: str) -> bool:
    return not any(word in part for word in ("vision", "audio", "vq", "attn", "ffn"))


def _shallow(part: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a vision or audio tower, which no text passes through, with one layer."""
    return {**part.to_dict(), **{name: 1 for name in ("num_hidden_layers", "num_blocks") if hasattr(part, name)}}


def _is_size(name: str, value: object) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (value is None and name in MISSING)


def _pattern(kinds: list[str]) -> list[str]:
    """The first layers of a pattern, the last of them replaced so that every kind is there."""
    pattern = list(kinds[:LAYERS])
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in pattern]
    return pattern[: LAYERS - len(missing)] + missing
