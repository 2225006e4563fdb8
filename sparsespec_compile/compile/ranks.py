"""The ranks that share a model: finds them, and loads a checkpoint part by part.

They are those that a model was loaded for, or as many as `SpecConfig.tensor_parallel` says. Every rank reads what it
will hold, and none ever holds the whole.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from sparsespec_compile.config import SpecConfig
from sparsespec_compile.errors import ConfigError
from sparsespec_compile.passes.compat import loads_by_distributed_config
from sparsespec_compile.passes.parallel.plan import CUT, divisions, general, model_plan
from sparsespec_compile.passes.parallel.shard import (
    is_loaded_in_parts,
    part_of,
    take_over,
    vocabulary_pieces,
    whole_pieces,
)
from sparsespec_compile.passes.ranks import Ranks


def ranks_of(model: PreTrainedModel, config: SpecConfig) -> Ranks | None:
    """The ranks that share `model`; None for a whole model that stays whole.

    A model that transformers itself has loaded in parts is taken over.

    Raises:
        ParallelPlanError: transformers has loaded it in parts that are not supported.
        ConfigError: `tensor_parallel` contradicts the parts that the model was loaded in, or there are not as many
            ranks.
    """
    part = take_over(model) if is_loaded_in_parts(model) else part_of(model)
    asked = config.tensor_parallel
    if part is not None:
        if asked not in (None, part.ranks.size):
            raise ConfigError(
                f"tensor_parallel is {asked}, but the model holds one of {part.ranks.size} parts. Leave it at None, or "
                "load the model again."
            )
        return part.ranks
    return None if asked in (None, 1) else group_of(asked)


def group_of(size: int | None) -> Ranks:
    """This rank among `size` neighbouring ranks of the default process group, ranks 0 to size - 1 and so on.

    None stands for all of them, of which there must be two at least.

    All ranks of the default group must call it alike, as it may make process groups.

    Raises:
        ConfigError: there is no default group, or it cannot be divided into groups of that size.
    """
    everyone = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    world = 1 if everyone is None else everyone.size()
    size = max(world, 2) if size is None else size
    if everyone is None or world % size:
        raise ConfigError(
            f"{size} ranks shall share a model, and torch.distributed has {world}. Allowed: numbers that divide it. "
            "Start the script with torchrun --nproc-per-node, and call torch.distributed.init_process_group() before "
            "optimize."
        )
    rank = everyone.rank()
    if world == size:
        return Ranks(rank, size, everyone.group_name)
    key = (everyone.group_name, size)
    if key not in _groups:
        starts = range(0, world, size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]  # each rank must make each
        _groups[key] = groups[rank // size].group_name
    return Ranks(rank % size, size, _groups[key])


_groups: dict[tuple[str, int], str] = {}
"""Names of the groups made, by that of the default group and by size."""


_OF_CONFIGURATION = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say which files are read."""


def load_shards(checkpoint: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """This rank's part of a causal LM, read from its checkpoint. Every rank of `torch.distributed` must call it alike.

    transformers' own loader reads the pieces from the safetensors files. A rank's memory holds what it keeps and the
    weights that are being read, never the whole. All ranks of the default process group share the model.

    Args:
        checkpoint: a folder or an id of the HuggingFace hub, as for `from_pretrained`.
        **arguments: of `AutoModelForCausalLM.from_pretrained`, such as dtype and revision; not device_map.

    Returns:
        A model to pass to `optimize`, on this rank's GPU (its number is LOCAL_RANK, as torchrun sets it), or on the CPU
        where there is none. Its own forward pass raises ShardedModelError.

    Raises:
        ConfigError: `torch.distributed` has no process group, or only one rank; or accelerate is not installed, which
            transformers needs for this.
        ParallelPlanError: the model cannot be divided among so many ranks; nothing was read.
    """
    ranks = group_of(None)
    if find_spec("accelerate") is None:
        raise ConfigError("load_shards needs accelerate, and it is not installed. Run: pip install accelerate")
    if "device_map" in arguments:
        raise ConfigError("load_shards places each part on its rank's own GPU, got a device_map. Leave it out.")
    named = {name: arguments[name] for name in _OF_CONFIGURATION if name in arguments}
    config = arguments.pop("config", None) or AutoConfig.from_pretrained(checkpoint, **named)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    found, plan = divisions(outline, ranks), model_plan(outline)
    copied, pieces = whole_pieces(found), vocabulary_pieces(outline, found, ranks)
    whole = {path for path, style in plan.items() if style in CUT} - set(pieces)
    whole |= {general(path).rpartition(".")[0] for path in copied}
    if loads_by_distributed_config():
        # An empty plan would be one that divides nothing; none is the model's own.
        overrides = dict.fromkeys(sorted(whole), "replicate") or None
        arguments["distributed_config"] = DistributedConfig(tp_size=ranks.size, tp_plan=overrides)
    else:
        arguments["tp_plan"] = {path: style for path, style in (plan | pieces).items() if path not in whole}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, **arguments)
    take_over(model, copied)
    return model.eval()
