"""Makes a model the part of it that one rank holds: out of a whole one, or of one that transformers loaded in parts.

transformers itself loads parts by `distributed_config=` or, before, `tp_plan=`. It leaves each rank its pieces, and
wraps the modules' forward passes so that they exchange what they need. Here the pieces stay and the wrappers go: the
graph gets all-reduces of its own. What only transformers divides becomes whole again, such as an embedding that is not
in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..capture.interface import is_recording
from ..compat import remove_parallel_wrappers
from ..errors import ParallelPlanError, ShardedModelError
from ..ranks import Ranks
from .division import Division, Part, Split, Summand, VocabularySplit
from .plan import CUT, divisions, model_plan, style_of

_RECORD = "_sparsespec_part"


def part_of(model: nn.Module) -> Part | None:
    """The part of a model that its modules hold; None for a whole model."""
    return vars(model).get(_RECORD)


def shard(model: PreTrainedModel, ranks: Ranks) -> Part:
    """Reduces a whole model to this rank's part, in place: the pieces of other ranks are freed.

    The parameter objects stay the same. From then on the model's own forward pass raises ShardedModelError. A model
    that is a part already stays as it is.

    Raises:
        ParallelPlanError: the model cannot be divided among these ranks. It is as it was.
        ShardedModelError: it is a part already, for other ranks.
    """
    part = part_of(model)
    if part is None:
        part = Part(ranks, divisions(model, ranks))
        for path, parameter in model.named_parameters():  # tied ones once
            if path in part.divisions:
                parameter.data = held(parameter.data, part.divisions[path], ranks)
        mark(model, part)
    if part.ranks != ranks:
        raise ShardedModelError(
            f"{type(model).__name__} holds the part of {part.ranks}, and {ranks} was asked for. A part cannot be "
            "divided anew: load the model again."
        )
    return part


@torch.no_grad()
def held(whole: Tensor, division: Division, ranks: Ranks) -> Tensor:
    """A rank's part of a whole parameter, in memory of its own."""
    if isinstance(division, Split):
        pieces = division.take(whole, tuple(whole.shape), ranks)
        return torch.cat(pieces, division.dim)  # a copy, also of a single piece
    return whole.clone() if ranks.rank == 0 else torch.zeros_like(whole)


def mark(model: PreTrainedModel, part: Part) -> None:
    """Records which part of a model its modules hold."""
    vars(model)[_RECORD] = part
    model.register_forward_pre_hook(refuse_alone)


def refuse_alone(module: nn.Module, arguments: Any) -> None:
    """A forward pre-hook that refuses to run a part of a model: its result would be meaningless."""
    if not is_recording():
        raise ShardedModelError(
            f"{type(module).__name__} holds one rank's part of its parameters, which optimize has left of them, and "
            "its own forward pass would compute a part of every sum. Call the optimized model's generate, on all ranks."
        )


def is_loaded_in_parts(model: nn.Module) -> bool:
    """Whether transformers has loaded a model in parts that were not taken over yet."""
    return part_of(model) is None and (getattr(model, "_tp_size", None) or 1) > 1


def take_over(model: PreTrainedModel, further: Mapping[str, Division] | None = None) -> Part:
    """Converts a model that transformers has loaded in parts to our own form, in place. All its ranks must call it.

    Args:
        model: one for which `is_loaded_in_parts` holds.
        further: how weights that transformers has left whole are divided, by path.

    Raises:
        ParallelPlanError: it is divided in a way that is not supported; it may be changed already.
    """
    group = _group(model)
    ranks = Ranks(group.rank(), group.size(), group.group_name)
    plan = model_plan(model)
    found = divisions(model, ranks, in_parts=True)
    new: dict[int, Tensor] = {}
    for path, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        division, cut = found.get(path), CUT.get(style_of(path, plan) or "")
        if not _is_piece(local, division, ranks):
            if cut is not None:
                local = _gathered(local, cut % local.dim(), group)
            if further is not None and path in further:
                local = held(local, further[path], ranks)
            elif isinstance(division, Summand | VocabularySplit):  # a bias after a sum; embedding and output layer
                local = held(local, division, ranks)
        new[id(parameter)] = local
    _replace_parameters(model, new)
    remove_parallel_wrappers(model)
    part = Part(ranks, found | dict(further or {}))
    mark(model, part)
    return part


def _is_piece(local: Tensor, division: Division | None, ranks: Ranks) -> bool:
    """Whether a part of the embedding or output layer holds this rank's own rows."""
    if not isinstance(division, VocabularySplit):
        return False
    return division.tokens == local.shape[0] * ranks.size and division.part(ranks).length == local.shape[0]


def _group(model: PreTrainedModel) -> dist.ProcessGroup:
    mesh = model._device_mesh
    if not isinstance(mesh, DeviceMesh):
        raise ParallelPlanError(
            f"{type(model).__name__} says that it was loaded in {model._tp_size} parts, but not by which ranks. Load "
            "it again with load_shards."
        )
    names = mesh.mesh_dim_names or ()
    sizes = dict(zip(names, mesh.shape, strict=True)) if names else {"tp": mesh.size()}
    others = [name for name, size in sizes.items() if name != "tp" and size > 1]
    config = getattr(model.config, "distributed_config", None)
    if (getattr(config, "ep_size", None) or 1) > 1 or getattr(config, "enable_expert_parallel", False):
        others.append("ep")
    if others:
        raise ParallelPlanError(
            f"{type(model).__name__} was loaded with other kinds of parallelism than tensor parallelism: {others}. "
            "Allowed: DistributedConfig(tp_size=...) alone. Load it with load_shards."
        )
    return mesh["tp"].get_group() if "tp" in names else mesh.get_group()


@torch.no_grad()
def _gathered(local: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The whole of which each rank has a piece along `dim`, all but the last of one size."""
    lengths: list[int] = [0] * group.size()
    dist.all_gather_object(lengths, local.shape[dim], group=group)
    shape = list(local.shape)
    shape[dim] = max(lengths)
    padded = local.new_zeros(shape)
    padded.narrow(dim, 0, local.shape[dim]).copy_(local)
    pieces = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece.narrow(dim, 0, length) for piece, length in zip(pieces, lengths, strict=True)], dim)


def _replace_parameters(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Plain parameters on the given tensors; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if not isinstance(parameter, DTensor):
                parameter.data = new[id(parameter)]
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(new[id(parameter)], requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def whole_pieces(found: Mapping[str, Division]) -> dict[str, Split]:
    """The divisions that transformers does not make: pieces that several ranks hold."""
    return {path: split for path, split in found.items() if isinstance(split, Split) and split.copies > 1}


def vocabulary_pieces(model: PreTrainedModel, found: Mapping[str, Division], ranks: Ranks) -> dict[str, str]:
    """Modules whose vocabulary rows transformers' loader can read for one rank alone, with their styles.

    None where tokens do not divide evenly, or where embedding and output layer are one; those are read whole.
    """
    layers = {"embedding_rowwise": model.get_input_embeddings(), "colwise_gather_output": model.get_output_embeddings()}
    weights = [getattr(layer, "weight", None) for layer in layers.values()]
    if weights[0] is weights[1]:
        return {}
    pieces: dict[str, str] = {}
    for path, module in model.named_modules():
        style = next((style for style, layer in layers.items() if layer is module), None)
        division = found.get(f"{path}.weight")
        even = isinstance(division, VocabularySplit) and division.tokens == division.part(ranks).length * ranks.size
        if style is not None and even:
            pieces[path] = style
    return pieces
