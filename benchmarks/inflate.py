"""Inflates the trained Countdown model to the shape of a large one that computes the same: its texts, large costs.

    python benchmarks/inflate.py Qwen3-8B /tmp/countdown-8b

writes a checkpoint that any engine can load (`Qwen3ForCausalLM`, standard names, the Countdown tokenizer), shard by
shard, so that little more than a shard is ever in memory. `inflated_model` builds the same model on a device without a
disk. How the function stays the same is written in `inflated_weights.py`. In float32 logits agree to rounding. In
bfloat16 the weights of norms are rounded once more where the ratio of sizes has no power of two for its square root,
which adds little to the rounding of bfloat16 itself.
"""

import argparse
import json
from pathlib import Path

import torch
from countdown_model import FOLDER, load
from huggingface_hub import split_torch_state_dict_into_shards
from inflated_shape import PRESETS, InflateError, Shape, preset, qwen3_config
from inflated_weights import PADDED_WEIGHT, InflatedWeights
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def inflated_config(small: Qwen3Config, shape: Shape, dtype: torch.dtype) -> Qwen3Config:
    """The configuration of the large model: theta, eps and special tokens of the small one, sizes of `shape`."""
    return Qwen3Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=small.rms_norm_eps,
        rope_parameters=small.rope_parameters,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        pad_token_id=small.pad_token_id,
        dtype=dtype,
    )


def _meta_parameters(config: Qwen3Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Names and shapes of the large model's parameters, without storage; tied ones once."""
    with torch.device("meta"):
        return {name: tensor.to(dtype) for name, tensor in Qwen3ForCausalLM(config).named_parameters()}


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point or torch.finfo(dtype).max < abs(PADDED_WEIGHT):
        raise InflateError(f"dtype is {dtype}, which cannot hold the weight of padded tokens. Use bfloat16 or float32.")


def inflated_model(
    shape: Shape,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    small: PreTrainedModel | None = None,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """The inflated model, in evaluation mode, built on `device` one parameter at a time.

    Args:
        shape: of the large model, a preset or another.
        device, dtype: of its parameters; float16 has too small a range.
        small: the model to inflate; None = the trained Countdown model.
        seed: of the weights that do not matter.

    Raises:
        InflateError: the shape cannot hold the small model, or the dtype is not allowed.
    """
    _check_dtype(dtype)
    small = load("cpu", torch.float32)[0] if small is None else small
    weights = InflatedWeights(small, shape, dtype, device, seed)
    config = inflated_config(qwen3_config(small), shape, dtype)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        filled = torch.nn.Parameter(weights.tensor(name, parameter.shape), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, filled)
    model.tie_weights()
    with torch.device(device):
        model.model.rotary_emb = Qwen3RotaryEmbedding(config)  # its frequencies are a buffer
    model.generation_config = GenerationConfig.from_pretrained(FOLDER)
    return model.eval()


def write_checkpoint(
    folder: Path,
    shape: Shape,
    dtype: torch.dtype,
    *,
    small: PreTrainedModel | None = None,
    seed: int = 0,
    shard_bytes: int = 2**31,
) -> None:
    """Writes the inflated model to `folder`: safetensors shards with their index, configuration, tokenizer.

    Args:
        folder: made when it is missing.
        shape, dtype, small, seed: as for `inflated_model`.
        shard_bytes: size of a shard at most, single tensors that are larger excepted.

    Raises:
        InflateError: as for `inflated_model`.
    """
    _check_dtype(dtype)
    small = load("cpu", torch.float32)[0] if small is None else small
    weights = InflatedWeights(small, shape, dtype, "cpu", seed)
    config = inflated_config(qwen3_config(small), shape, dtype)
    parameters = _meta_parameters(config, dtype)
    split = split_torch_state_dict_into_shards(parameters, max_shard_size=shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in tqdm(split.filename_to_tensors.items(), desc="shards", disable=None):
        shard = {name: weights.tensor(name, parameters[name].shape) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    GenerationConfig.from_pretrained(FOLDER).save_pretrained(folder)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(PRESETS))
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--seed", type=int, default=0, help="of the weights that do not matter")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    write_checkpoint(arguments.folder, preset(arguments.shape), DTYPES[arguments.dtype], seed=arguments.seed)
    print(f"wrote {arguments.shape}, {arguments.dtype}, to {arguments.folder}")


if __name__ == "__main__":
    main()
