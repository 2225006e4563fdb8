"""The families that the compiler is tested on: those of `tests.support.models`, and some built differently."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..support.models import FAMILIES, VOCABULARY
from ..support.models import tiny as common_tiny

SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 256, "eos_token_id": None}
NARROW = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
EXPERTS = {**NARROW, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}

OTHERS = {
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "deepseek_v3": {
        **EXPERTS,
        **LATENT,
        "num_key_value_heads": 6,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 256},
    "opt": {
        **SMALL,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 64,
        "num_attention_heads": 6,
        "init_std": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
    },
    "lfm2": {**NARROW, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    "lfm3": {**NARROW},
    "falcon_h1": {
        **NARROW,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "granite_swa": {**NARROW, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "head_dim": 8},
    "llama4_text": {
        **NARROW,
        "intermediate_size": 32,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0, 1],
        "moe_layers": [0, 1],
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "floor_scale": 12,
        "attn_scale": 0.5,
    },
    "bart": {"vocab_size": VOCABULARY, "d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 6},
}

DOZEN = (*FAMILIES, "mixtral", "gpt2")

FAST = ("llama", "qwen2", "gemma3_text", "mixtral", "gpt2", "deepseek_v3")
"""Plain; with biases; with windows and norms of queries and keys; with experts; with other linear layers; with latent
attention. Tests on the other families are slow."""

TELLING = (*FAST, "phi3", "gemma2")
"""And with linear layers that are fused already, and with soft-caps."""


def each(families: Iterable[str]) -> list[object]:
    """Parameters of a test that runs on each of `families`."""
    return [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in families]


def telling(families: Iterable[str]) -> list[object]:
    """Parameters of a test to which the families beside `TELLING` would show nothing new."""
    return each(family for family in families if family in TELLING)


def tiny(family: str, **settings: object) -> PreTrainedModel:
    """A float32 CPU model with random weights, the same for the same arguments."""
    if family in FAMILIES:
        model = common_tiny(family, **settings)
        if getattr(model.config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # older transformers' default, sdpa, leaves soft-capping out
        return model
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**OTHERS.get(family, {}), **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(count: int, seed: int = 1) -> Tensor:
    """Random token ids, int64 [count]."""
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """HuggingFace's own logits of one sequence, `[tokens, vocabulary]`."""
    positions = torch.arange(len(sequence))[None]
    with torch.no_grad():
        return model(input_ids=sequence[None], position_ids=positions, use_cache=False).logits[0]
