"""Tiny checkpoints of numbers of few bits, written here by the layout of each format and loaded by transformers."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedModel

SIZES = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
}

LARGEST_FP8 = 448.0


def plain() -> PreTrainedModel:
    """The model that nearly all formats are made of."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32).eval()


def gpt_oss() -> PreTrainedModel:
    """A tiny gpt-oss."""
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 32, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(GptOssConfig(**sizes), dtype=torch.float32).eval()


Parts = Callable[[str, Tensor], Mapping[str, Tensor]]
"""What a checkpoint holds in place of a linear's weight, given the linear's path and the weight."""


def checkpoint(
    settings: Mapping[str, Any],
    parts: Parts,
    model: Callable[[], PreTrainedModel] = plain,
    endings: tuple[str, ...] = ("_proj.weight",),
    config: Any = None,
    **loading: Any,
) -> PreTrainedModel:
    """A checkpoint whose config.json says how it is quantised, loaded by transformers.

    Args:
        settings: `quantization_config` of config.json.
        parts: makes what is stored in place of each tensor whose name has one of these `endings`.
        config: given to the loader, which else reads config.json alone.
        loading: further settings of the loader.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = model()
        source.save_pretrained(folder)
        tensors: dict[str, Tensor] = {}
        for path, tensor in source.state_dict().items():
            narrow = path.endswith(endings)
            tensors |= parts(path.removesuffix(".weight"), tensor) if narrow else {path: tensor}
        save_file({path: tensor.contiguous() for path, tensor in tensors.items()}, Path(folder, "model.safetensors"))
        file = Path(folder, "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": dict(settings)}))
        given = {} if config is None else {"quantization_config": config}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given, **loading).eval()


def as_it_is(path: str, weight: Tensor) -> dict[str, Tensor]:
    """Of a method whose library or GPU is asked for before any tensor is read."""
    return {f"{path}.weight": weight}


def fp8_blocks(path: str, weight: Tensor) -> dict[str, Tensor]:
    """Fine-grained FP8: a scale for each 128 x 128 values."""
    rows, columns = (size // 128 for size in weight.shape) if weight.shape[0] >= 128 else (1, weight.shape[1] // 128)
    blocks = weight.view(rows, -1, columns, 128)
    scale = blocks.abs().amax((1, 3)) / LARGEST_FP8
    narrow = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {f"{path}.weight": narrow.view(weight.shape), f"{path}.weight_scale_inv": scale}


def mxfp8(path: str, weight: Tensor) -> dict[str, Tensor]:
    """MXFP8: a power of two for each 32 values of a row, stored as its exponent."""
    blocks = weight.view(weight.shape[0], -1, 32)
    exponent = (blocks.abs().amax(2, keepdim=True) / LARGEST_FP8).log2().ceil()
    narrow = (blocks / exponent.exp2()).to(torch.float8_e4m3fn)
    return {
        f"{path}.weight": narrow.view(weight.shape),
        f"{path}.weight_scale_inv": (exponent[..., 0] + 127).to(torch.uint8),
    }


def mxfp4(path: str, weight: Tensor) -> dict[str, Tensor]:
    """Experts of gpt-oss: random pairs of 4-bit numbers, and a power of two near 1/8 for each 32 values of a row."""
    count, inputs, outputs = weight.shape
    generator = torch.Generator().manual_seed(inputs)
    blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(123, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
    return {f"{path}_blocks": blocks, f"{path}_scales": scales}


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to 15 that stand for -8 to 7, and a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 7
    return (weight / scale).round().to(torch.int32) + 8, scale


def gemma(path: str, weight: Tensor) -> dict[str, Tensor]:
    """Gemma's int4 weights, and the steps to which inputs and outputs are rounded."""
    numbers, scale = four_bits(weight)
    step = torch.tensor(0.05)
    return {
        f"{path}.weight": (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8),
        f"{path}.weight_scale": scale,
        f"{path}.input_activation_scale": step,
        f"{path}.output_activation_scale": step.clone(),
    }


def metal(path: str, weight: Tensor) -> dict[str, Tensor]:
    """MLX's affine int4: eight numbers to a word, a scale and an offset for each 64 of a row."""
    numbers, scale = four_bits(weight)
    words = (numbers.view(len(weight), -1, 8).long() << torch.arange(0, 32, 4)).sum(2)
    scales = scale.expand(-1, weight.shape[1] // 64).contiguous()
    return {f"{path}.weight": words.to(torch.uint32), f"{path}.scales": scales, f"{path}.qbiases": -8 * scales}


def bitnet(path: str, weight: Tensor) -> dict[str, Tensor]:
    """Ternary weights, four to a byte."""
    from transformers.integrations.bitnet import pack_weights

    scale = 1 / weight.abs().mean()
    return {
        f"{path}.weight": pack_weights((weight * scale).round().clamp(-1, 1)),
        f"{path}.weight_scale": scale.reshape(1),
    }


def aqlm(path: str, weight: Tensor) -> dict[str, Tensor]:
    """AQLM: random rows of one codebook of 256, for eight values each."""
    generator = torch.Generator().manual_seed(weight.shape[0])
    shape = weight.shape[0], weight.shape[1] // 8, 1
    return {
        f"{path}.codes": torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8),
        f"{path}.codebooks": 0.3 * torch.randn(1, 256, 1, 8, generator=generator),
        f"{path}.scales": torch.ones(weight.shape[0], 1, 1, 1),
    }


def compressed(scheme: str, *, dequantize: bool = False) -> PreTrainedModel:
    """A checkpoint of compressed-tensors in one of its own schemes, loaded by transformers."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    with tempfile.TemporaryDirectory() as folder:
        model = plain()
        apply_quantization_config(model, QuantizationConfig(config_groups={scheme: ["Linear"]}, ignore=["lm_head"]))
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                kind = module.quantization_scheme.weights
                largest = LARGEST_FP8 if kind.type == "float" else 2 ** (kind.num_bits - 1) - 1
                module.weight_scale.data.copy_(_largest(module.weight, module.weight_scale.shape) / largest)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.05)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        config = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()


def _largest(weight: Tensor, shape: torch.Size) -> Tensor:
    """The largest value of each group of values that has a scale of its own."""
    if len(shape) < 2:
        return weight.abs().amax().expand(shape)
    rows, columns = shape
    return weight.abs().reshape(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns).amax((1, 3))


def gguf() -> PreTrainedModel:
    """A file in GGUF's Q8_0, which transformers loads as plain weights where it has no kernel for it."""
    import gguf as library

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    with tempfile.TemporaryDirectory() as folder:
        writer = library.GGUFWriter(Path(folder, "model.gguf"), "llama")
        writer.add_block_count(SIZES["num_hidden_layers"])
        writer.add_context_length(SIZES["max_position_embeddings"])
        writer.add_embedding_length(SIZES["hidden_size"])
        writer.add_feed_forward_length(SIZES["intermediate_size"])
        writer.add_head_count(SIZES["num_attention_heads"])
        writer.add_head_count_kv(SIZES["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_vocab_size(SIZES["vocab_size"])
        for path, tensor in plain().state_dict().items():
            for ours, theirs in names.items():
                path = path.replace(ours, theirs)
            kind = library.GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else library.GGMLQuantizationType.F32
            writer.add_tensor(path, library.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
