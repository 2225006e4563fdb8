"""The cost of an iteration from a configuration alone, before there are weights or a graph.

Only for families whose layers are known: attention with q, k, v and o projections, a gated MLP or a router and gated
experts, with a shared one in Llama-4, one output projection.
Tests hold these counts equal to those that `passes/cost/graph.py` derives from the compiled graphs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from sparsespec_compile.errors import CostModelError
from sparsespec_compile.passes.cost.terms import (
    IterationCost,
    R,
    T,
    Term,
    attention,
    collect,
    embedding,
    experts,
    logits,
    projection,
)

FAMILIES = (
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""Values of `model_type` whose layers are known."""

_EXPERTS_LAUNCHES = 4


class Experts(NamedTuple):
    """The experts of a layer: how many there are, how many a row chooses, and their hidden values."""

    experts: int
    chosen: int
    inner: int


def experts_of(config: PreTrainedConfig) -> Experts | None:
    """The experts of a configuration of `FAMILIES`; None where it has none."""
    sizes = config.to_dict()
    count = sizes.get("num_experts") or sizes.get("num_local_experts")
    if not count:
        return None
    inner = sizes["moe_intermediate_size" if config.model_type == "qwen3_moe" else "intermediate_size"]
    return Experts(count, sizes["num_experts_per_tok"], inner)


def _has_experts(config: PreTrainedConfig) -> list[bool]:
    """Whether each layer has experts in place of an MLP."""
    if config.model_type == "llama4_text":
        return [layer in config.moe_layers for layer in range(config.num_hidden_layers)]
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    some = experts_of(config) is not None
    return [some and layer not in dense and (layer + 1) % step == 0 for layer in range(config.num_hidden_layers)]


def config_cost(
    config: PreTrainedConfig, dtype: torch.dtype | str | None, *, draft_weights: bool = False
) -> IterationCost:
    """Bytes and FLOPs of one iteration of the model that `config` describes, its projections fused.

    Args:
        config: of a family in `FAMILIES`.
        dtype: of weights and cache.
        draft_weights: whether products read 8-bit copies of the weights, as in iterations of nothing but drafts.
            Experts have none.

    Raises:
        CostModelError: another family, quantised weights, or no dtype.
    """
    _check(config)
    if not isinstance(dtype, torch.dtype):
        raise CostModelError(f"The dtype is {dtype!r}. Set config.dtype to the one that the model shall run in.")
    return collect(_terms(config, dtype.itemsize, 1 if draft_weights else dtype.itemsize))


def _check(config: PreTrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise CostModelError(
            f"The cost of model type {config.model_type!r} cannot be told from its configuration. Allowed: "
            f"{', '.join(FAMILIES)}. Compile the model and call its explain(), which reads the graph."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CostModelError("The configuration has a quantization_config. Allowed: weights in float32 or 16 bits.")


def _terms(config: PreTrainedConfig, itemsize: int, weight_bytes: int) -> Iterator[Term]:
    sizes = config.to_dict()
    hidden, heads, vocabulary = sizes["hidden_size"], sizes["num_attention_heads"], sizes["vocab_size"]
    kv_heads = sizes.get("num_key_value_heads") or heads
    head_dim = sizes.get("head_dim") or hidden // heads
    mlp, mixture = sizes["intermediate_size"], experts_of(config)
    yield embedding(T, hidden, itemsize)
    for (window, chunked), has_experts in zip(_windows(sizes), _has_experts(config), strict=True):
        yield projection(T, hidden, (heads + 2 * kv_heads) * head_dim, weight_bytes)
        yield from attention(heads, kv_heads, head_dim, head_dim, window, itemsize, chunked=chunked)
        yield projection(T, heads * head_dim, hidden, weight_bytes)
        if has_experts and mixture is not None and config.model_type == "llama4_text":
            yield projection(T, hidden, mixture.experts + 2 * mlp, weight_bytes)
            yield projection(T, mlp, hidden, weight_bytes)
            rows = T * mixture.chosen
            yield experts(rows, mixture.experts, 1, 3 * hidden * mixture.inner, itemsize, _EXPERTS_LAUNCHES)
        elif has_experts and mixture is not None:
            yield projection(T, hidden, mixture.experts, weight_bytes)
            elements = 3 * hidden * mixture.inner
            yield experts(T, mixture.experts, mixture.chosen, elements, itemsize, _EXPERTS_LAUNCHES)
        else:
            inner = sizes.get("intermediate_size_mlp", mlp)
            yield projection(T, hidden, 2 * inner, weight_bytes)
            yield projection(T, inner, hidden, weight_bytes)
    yield projection(R, hidden, vocabulary, weight_bytes)
    yield logits(R, vocabulary, itemsize)


def _windows(sizes: dict) -> list[tuple[int, bool]]:
    """Each layer's window, 0 = none, and whether it is chunked."""
    window, layers = sizes.get("sliding_window") or 0, sizes["num_hidden_layers"]
    kinds = sizes.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    found = {"sliding_attention": (window, False), "chunked_attention": (sizes.get("attention_chunk_size") or 0, True)}
    return [found.get(kind, (0, False)) for kind in kinds]
