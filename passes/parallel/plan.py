"""Reads a model's own plan for tensor parallelism: transformers' `base_model_tp_plan` and `_tp_plan`.

A plan gives a style to modules and parameters. Here only what it says about weights counts: where results are summed up
is derived from the graph (`rewrites/reduce_sums.py`). What no style splits is whole on every rank, but for embedding
and output layer, which are always divided by tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import ParallelPlanError
from ..ranks import Ranks
from .division import Division, Split, Summand, VocabularySplit

SPLITTING = frozenset({"colwise", "packed_colwise", "rowwise", "packed_rowwise"})
"""Styles that split a weight by what it gives (columns of x @ w.T), or by what it sums over (rows)."""

WHOLE = frozenset(
    {
        "all_reduce",
        "colwise_gather_output",
        "colwise_rep",
        "embedding_colwise",
        "embedding_rowwise",
        "local_params",
        "mla_kv_a_proj",
        "moe_identity_expert",
        "moe_tp_experts",
        "replicate",
        "replicated_with_grad_allreduce",
        "rowwise_rep",
        "rowwise_split_input",
        "sequence_parallel",
    }
)
"""Styles whose own weights are whole on every rank: those that split nothing, and those whose input or output is whole,
which spare memory but no communication."""

CUT = {
    "colwise_gather_output": -2,
    "colwise_rep": -2,
    "rowwise_split_input": -1,
    "rowwise_rep": -1,
    "embedding_rowwise": 0,
    "embedding_colwise": 1,
}
"""Styles under which transformers divides a weight whose input or output is whole, and the dimension of the weight."""

KEYS_AND_VALUES = frozenset({"k_proj", "v_proj"})
"""Projections whose heads may be held by several ranks, where there are fewer of them than ranks."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def divisions(model: PreTrainedModel, ranks: Ranks, *, in_parts: bool = False) -> dict[str, Division]:
    """How each parameter of a model is divided, by its path; those that are not there are whole on every rank.

    Args:
        model: a whole one.
        ranks: among which it is divided.
        in_parts: it is not whole: transformers has divided it already, by the same plan.

    Raises:
        ParallelPlanError: the model has no plan, its plan has an unknown style or splits nothing, or something that it
            splits cannot be split among so many ranks.
    """
    plan = model_plan(model)
    found: dict[str, Division] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        style = style_of(path, plan)
        if style is None:
            continue
        if style not in SPLITTING | WHOLE:
            raise ParallelPlanError(
                f"The plan of {type(model).__name__} divides {path} by the style {style!r}, which is not known here. "
                f"Allowed: {', '.join(sorted(SPLITTING | WHOLE))}. Change model.tp_plan, or run the model on one GPU."
            )
        if style in SPLITTING:
            found[path] = _division(model, path, _whole_shape(parameter, style, ranks, in_parts), style, ranks)
            _require_no_copies(path, found[path], in_parts)
    if not found:
        raise ParallelPlanError(
            f"The plan of {type(model).__name__} splits no weight that ranks could hold a part of. Allowed: plans with "
            f"the styles {', '.join(sorted(SPLITTING))}. Run the model on one GPU."
        )
    return found | _vocabulary(model, ranks, plan, in_parts)


def _vocabulary(model: PreTrainedModel, ranks: Ranks, plan: dict[str, str], in_parts: bool) -> dict[str, Division]:
    """The division of embedding and output layer by tokens, whatever the plan says; none where a rank would get none.

    Plans leave them whole, or split them and put the logits of all tokens together again; here they stay apart.
    """
    layers = (model.get_input_embeddings(), nn.Embedding), (model.get_output_embeddings(), nn.Linear)
    members = {id(one) for layer, kind in layers if isinstance(layer, kind) for one in layer.parameters(recurse=False)}
    tokens: dict[int, int] = {}
    for path, parameter in model.named_parameters():
        if id(parameter) in members:
            cut = CUT.get(style_of(path, plan) or "") if in_parts and not isinstance(parameter, DTensor) else None
            is_piece = cut is not None and cut % parameter.dim() == 0
            tokens[id(parameter)] = parameter.shape[0] * (ranks.size if is_piece else 1)
    splits = {
        path: VocabularySplit(0, tokens=tokens[id(parameter)])
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in tokens
    }
    return {path: split for path, split in splits.items() if split.part(ranks).possible}


def model_plan(model: PreTrainedModel) -> dict[str, str]:
    """The model's plan: styles by path, with `*` for the number of a layer.

    Raises:
        ParallelPlanError: it has none.
    """
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise ParallelPlanError(
            f"{type(model).__name__} has no plan for tensor parallelism (base_model_tp_plan of its configuration). "
            "Allowed: models with one. Set model.tp_plan, or run the model on one GPU."
        )
    return dict(plan)


def style_of(path: str, plan: dict[str, str]) -> str | None:
    """The style of a parameter: its own, else that of its module."""
    name = general(path)
    return plan.get(name, plan.get(name.rpartition(".")[0]))


def general(path: str) -> str:
    """A path in the notation of plans."""
    return _NUMBER.sub("*", path)


def _whole_shape(parameter: nn.Parameter, style: str, ranks: Ranks, in_parts: bool) -> tuple[int, ...]:
    """The shape of a whole parameter. transformers' own pieces may be DTensors, whose shape is that of the whole."""
    shape = list(parameter.shape)
    if in_parts and not isinstance(parameter, DTensor) and not (style.endswith("rowwise") and len(shape) == 1):
        shape[_split_dim(shape, style)] *= ranks.size
    return tuple(shape)


def _split_dim(shape: Sequence[int], style: str) -> int:
    return len(shape) - 1 if style.endswith("rowwise") else max(len(shape) - 2, 0)


def _division(model: PreTrainedModel, path: str, shape: tuple[int, ...], style: str, ranks: Ranks) -> Division:
    rows = style.endswith("rowwise")
    if rows and len(shape) == 1:
        return Summand()
    dim = _split_dim(shape, style)
    split = Split(dim, 2 if style.startswith("packed_") else 1, 1 if rows else _copies(model, path, shape[dim], ranks))
    if shape[dim] % (split.blocks * split.pieces(ranks)):
        raise ParallelPlanError(
            f"{path} has {shape[dim] // split.blocks} {'rows' if rows else 'columns'} that the plan divides among "
            f"{ranks.size} ranks. Allowed: numbers of ranks that divide it. Choose another SpecConfig.tensor_parallel."
        )
    return split


def _require_no_copies(path: str, division: Division, in_parts: bool) -> None:
    if in_parts and isinstance(division, Split) and division.copies > 1:
        raise ParallelPlanError(
            f"{path}: transformers has cut its heads into parts, as there are fewer KV heads than ranks. Allowed: "
            "whole heads on every rank. Load the model with load_shards, which gives a head to several ranks."
        )


def _copies(model: PreTrainedModel, path: str, length: int, ranks: Ranks) -> int:
    """Ranks that hold the same piece of a projection's output: several, where it has fewer KV heads than ranks."""
    module, _, name = path.rpartition(".")[0].rpartition(".")
    head_dim = getattr(model.get_submodule(module), "head_dim", None)
    if not isinstance(head_dim, int) or length % head_dim:
        return 1
    heads = length // head_dim
    if heads % ranks.size == 0:
        return 1
    if name in KEYS_AND_VALUES and ranks.size % heads == 0:
        return ranks.size // heads
    raise ParallelPlanError(
        f"{path} gives {heads} heads, which the plan divides among {ranks.size} ranks. Allowed: numbers of ranks that "
        "divide the query heads, and that divide the KV heads or are a multiple of them. Choose another "
        "SpecConfig.tensor_parallel."
    )
