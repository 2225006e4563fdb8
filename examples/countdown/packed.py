"""The model, and its forward pass over packed traces: attention never crosses from one trace into another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from .batches import IGNORE, Batch
from .tokenizer import CONTEXT, EOS, PAD, VOCABULARY, VOCABULARY_SIZE

_PACKED = "countdown_packed"


def model_config() -> Qwen3Config:
    """Qwen3 in small: groups of four query heads, head size 64, QK norm, 16k positions, tied embeddings."""
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
        dtype="float32",
    )


def generation_config() -> GenerationConfig:
    """How the model is meant to be sampled."""
    return GenerationConfig(eos_token_id=VOCABULARY[EOS], pad_token_id=VOCABULARY[PAD], do_sample=True, temperature=0.6)


def build_model(config: Qwen3Config) -> Qwen3ForCausalLM:
    """A model with fresh weights whose attention expects packed traces."""
    model = Qwen3ForCausalLM(config)
    model.generation_config = generation_config()
    model.config._attn_implementation = _PACKED
    return model


def _packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    boundaries: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each trace.

    Args:
        query: [1, Hq, T, D]; key and value: [1, Hkv, T, D].
        boundaries: int32, where traces start and end.

    Returns:
        [1, T, Hq, D] and, as transformers wants it, no attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.is_cuda:
        q, k, v = (tensor.squeeze(0).transpose(0, 1).to(torch.bfloat16).contiguous() for tensor in (query, key, value))
        # The longest trace possible, not the longest here: a constant, so that nothing is compiled twice.
        out: Any = varlen_attn(q, k, v, boundaries, boundaries, CONTEXT, CONTEXT, scale=scaling, window_size=(-1, 0))
        return out[None], None
    edges = boundaries.tolist()
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], is_causal=True, scale=scaling
        )
        for start, end in pairwise(edges)
        if end > start
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


AttentionInterface.register(_PACKED, _packed_attention)


def hidden_states(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """The last layer's output for a batch, float [1, T, hidden]."""
    body = model.model
    hidden = body.embed_tokens(batch.tokens[None])
    rotary = body.rotary_emb(hidden, batch.positions[None])
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, boundaries=batch.boundaries)
    return body.norm(hidden)


def mean_loss(hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the targets that count, in nats."""
    return F.cross_entropy((hidden[0] @ embedding.T).float(), targets, ignore_index=IGNORE)
