"""The cost of an iteration from a configuration alone, before there are weights or a graph.

Only for families whose layers are known: attention with q, k, v and o projections, a gated MLP, one output projection.
Tests hold these counts equal to those that `passes/cost/graph.py` derives from the compiled graphs.
"""

from collections.abc import Iterator

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
    logits,
    projection,
)

FAMILIES = (
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Values of `model_type` whose layers are known."""


def config_cost(config: PreTrainedConfig, dtype: torch.dtype | str | None) -> IterationCost:
    """Bytes and FLOPs of one iteration of the model that `config` describes, its projections fused.

    Args:
        config: of a family in `FAMILIES`.
        dtype: of weights and cache.

    Raises:
        CostModelError: another family, quantised weights, or no dtype.
    """
    _check(config)
    if not isinstance(dtype, torch.dtype):
        raise CostModelError(f"The dtype is {dtype!r}. Set config.dtype to the one that the model shall run in.")
    return collect(_terms(config, dtype.itemsize))


def _check(config: PreTrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise CostModelError(
            f"The cost of model type {config.model_type!r} cannot be told from its configuration. Allowed: "
            f"{', '.join(FAMILIES)}. Compile the model and call its explain(), which reads the graph."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CostModelError("The configuration has a quantization_config. Allowed: weights in float32 or 16 bits.")


def _terms(config: PreTrainedConfig, itemsize: int) -> Iterator[Term]:
    sizes = config.to_dict()
    hidden, heads, vocabulary = sizes["hidden_size"], sizes["num_attention_heads"], sizes["vocab_size"]
    kv_heads = sizes.get("num_key_value_heads") or heads
    head_dim = sizes.get("head_dim") or hidden // heads
    mlp = sizes["intermediate_size"]
    yield embedding(T, hidden, itemsize)
    for window in _windows(sizes):
        yield projection(T, hidden, (heads + 2 * kv_heads) * head_dim, itemsize)
        yield from attention(heads, kv_heads, head_dim, head_dim, window, itemsize)
        yield projection(T, heads * head_dim, hidden, itemsize)
        yield projection(T, hidden, 2 * mlp, itemsize)
        yield projection(T, mlp, hidden, itemsize)
    yield projection(R, hidden, vocabulary, itemsize)
    yield logits(R, vocabulary, itemsize)


def _windows(sizes: dict) -> list[int]:
    """Each layer's sliding window, 0 = none."""
    window, layers = sizes.get("sliding_window") or 0, sizes["num_hidden_layers"]
    kinds = sizes.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]
