"""Shapes to which a small Qwen3 model can be inflated, and the refusal of those that cannot hold it."""

from dataclasses import dataclass, fields

from transformers import PreTrainedModel, Qwen3Config

from sparsespec_compile import SparseSpecError


class InflateError(SparseSpecError, ValueError):
    """The small model does not fit the target shape, or the target cannot be written as asked."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model.

    Attributes:
        hidden: width of the residual stream.
        layers, heads, kv_heads, head_dim, mlp, vocabulary: as in `Qwen3Config`.
        positions: longest text, prompt included (`max_position_embeddings`).
        tied: whether the embedding is the output projection too.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    positions: int
    tied: bool


def qwen3_config(model: PreTrainedModel) -> Qwen3Config:
    """The configuration of `model`; raises InflateError unless it is a Qwen3 one."""
    if not isinstance(model.config, Qwen3Config):
        raise InflateError(f"Only a Qwen3 model can be inflated, got a {type(model).__name__}.")
    return model.config


def shape_of(config: Qwen3Config) -> Shape:
    """The shape of an existing model."""
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
    )


def _qwen3(hidden: int, layers: int, heads: int, mlp: int, tied: bool) -> Shape:
    return Shape(
        hidden, layers, heads, kv_heads=8, head_dim=128, mlp=mlp, vocabulary=151_936, positions=40_960, tied=tied
    )


PRESETS = {
    "Qwen3-1.7B": _qwen3(hidden=2048, layers=28, heads=16, mlp=6144, tied=True),
    "Qwen3-8B": _qwen3(hidden=4096, layers=36, heads=32, mlp=12288, tied=False),
    "Qwen3-14B": _qwen3(hidden=5120, layers=40, heads=40, mlp=17408, tied=False),
}
"""Shapes of the published models, by name."""


def preset(name: str) -> Shape:
    """The preset called `name`; raises InflateError for an unknown one."""
    if name not in PRESETS:
        raise InflateError(f"Unknown shape {name!r}. Allowed: {', '.join(PRESETS)}.")
    return PRESETS[name]


def kv_copies(small: Shape, target: Shape) -> int:
    """KV heads of the target that serve one small KV head, so that each of its query heads finds a place."""
    group, target_group = small.heads // small.kv_heads, target.heads // target.kv_heads
    return -(-group // target_group)


def check_fit(small: Shape, target: Shape) -> None:
    """Raises InflateError, naming the dimension, unless `target` can hold `small`."""
    least = {field.name: getattr(small, field.name) for field in fields(Shape) if field.name != "tied"}
    least["hidden"] += 1  # one dimension holds a constant, see inflated_weights.py
    for name, least_value in least.items():
        if getattr(target, name) < least_value:
            raise InflateError(
                f"{name} is {getattr(target, name)}, but the model to be inflated needs at least {least_value}. "
                "Choose a larger target shape."
            )
    if target.head_dim % small.head_dim:
        raise InflateError(
            f"head_dim is {target.head_dim}; it must be a multiple of {small.head_dim}, or the rotary frequencies of "
            "the two models do not coincide."
        )
    if target.heads % target.kv_heads:
        raise InflateError(f"heads is {target.heads}; it must be a multiple of kv_heads, {target.kv_heads}.")
    needed = small.kv_heads * kv_copies(small, target)
    if target.kv_heads < needed:
        raise InflateError(
            f"kv_heads is {target.kv_heads}; with {target.heads // target.kv_heads} query heads each, {needed} are "
            f"needed for the {small.heads} query and {small.kv_heads} KV heads to be inflated."
        )
    if target.tied and not small.tied:
        raise InflateError("tied is True, but the model to be inflated has an output projection of its own.")
