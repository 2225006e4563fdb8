"""Small random models of the families that people run, with weights large enough to give texts that vary."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

VOCABULARY = 151
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SPECIAL = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 24},
    "phi3": {},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 20,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "smollm3": {"no_rope_layers": [1, 0]},
}
FAMILIES = tuple(_SPECIAL)
_SPECIAL["mixtral"] = {"num_local_experts": 4}
_SPECIAL["gpt_oss"] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_SPECIAL["granite_swa"] = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}


def tiny(family: str, seed: int = 0, **settings) -> PreTrainedModel:
    """A float32 CPU model of `family` with random weights, the same for the same arguments."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_COMMON, **_SPECIAL[family], **settings})
    # transformers 5.6 gives Gemma-2 sdpa, which leaves its soft-cap out without a word; later versions take eager.
    attention = "eager" if family == "gemma2" else None
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def countdown(*prompts: str) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The embedded trained model in float32, and prompts for it: (model, input_ids, attention_mask)."""
    folder = Path(__file__).parents[2] / "examples" / "countdown" / "model"
    batch = AutoTokenizer.from_pretrained(folder)(list(prompts), padding=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, batch["input_ids"], batch["attention_mask"]


def left_padded(*lengths: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts as HuggingFace batches them: (input_ids, attention_mask), int64 [batch, longest]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask
