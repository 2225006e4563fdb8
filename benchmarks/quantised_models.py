"""The tiny quantised models of `formats.py`: one of each method that transformers' loader knows, and of torchao's own.

A method is tried as its users meet it: its library quantises the model, transformers does so while it loads it, or a
checkpoint is loaded. Where the library is not there, or wants a GPU, its own error says so.
"""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from quantised_checkpoints import (
    aqlm,
    as_it_is,
    bitnet,
    checkpoint,
    compressed,
    fp8_blocks,
    gemma,
    gguf,
    gpt_oss,
    metal,
    mxfp4,
    mxfp8,
    plain,
)
from transformers import AutoModelForCausalLM, PreTrainedModel


def by_torchao(name: str, **settings: Any) -> PreTrainedModel:
    """torchao's `quantize_` with the configuration of this name."""
    from torchao import quantization

    model = plain()
    quantization.quantize_(model, getattr(quantization, name)(**settings))
    return model


def torchao_config() -> Any:
    """int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def loaded(config: Callable[[], Any], model: Callable[[], PreTrainedModel] = plain, **settings: Any) -> PreTrainedModel:
    """A model that transformers quantises while it loads it."""
    with tempfile.TemporaryDirectory() as folder:
        model().save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config(), dtype=torch.float32, **settings
        )
    return found.eval()


def by(name: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    """`loaded` with transformers' configuration of this name."""
    return lambda: loaded(lambda: getattr(transformers, name)(**settings))


def declared(name: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    """A checkpoint of a method whose library or GPU is asked for before any tensor is read."""
    return lambda: checkpoint(getattr(transformers, name)(**settings).to_dict(), as_it_is)


Makers = Mapping[str, Callable[[], Any]]

METHODS: Mapping[str, Makers] = {
    "torchao": {
        "torchao Int8WeightOnlyConfig": lambda: by_torchao("Int8WeightOnlyConfig"),
        "torchao Int8DynamicActivationInt8WeightConfig": lambda: by_torchao("Int8DynamicActivationInt8WeightConfig"),
        "torchao Float8WeightOnlyConfig": lambda: by_torchao("Float8WeightOnlyConfig"),
        "torchao Float8DynamicActivationFloat8WeightConfig": lambda: by_torchao(
            "Float8DynamicActivationFloat8WeightConfig"
        ),
        "torchao Int4WeightOnlyConfig": lambda: by_torchao("Int4WeightOnlyConfig"),
        "torchao IntxWeightOnlyConfig (int4)": lambda: by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
        "transformers TorchAoConfig (int8)": lambda: loaded(torchao_config),
    },
    "bitsandbytes_8bit": {
        "bitsandbytes int8": by("BitsAndBytesConfig", load_in_8bit=True),
        "bitsandbytes int8, model.dequantize()": lambda: by("BitsAndBytesConfig", load_in_8bit=True)().dequantize(),
    },
    "bitsandbytes_4bit": {
        "bitsandbytes nf4": by("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    },
    "compressed-tensors": {
        "compressed-tensors FP8, dynamic": lambda: compressed("FP8_DYNAMIC"),
        "compressed-tensors FP8, dequantize=True": lambda: compressed("FP8_DYNAMIC", dequantize=True),
        "compressed-tensors FP8, static": lambda: compressed("FP8"),
        "compressed-tensors W8A8": lambda: compressed("W8A8"),
        "compressed-tensors W8A16": lambda: compressed("W8A16"),
        "compressed-tensors W4A16": lambda: compressed("W4A16"),
        "compressed-tensors W4A16, dequantize=True": lambda: compressed("W4A16", dequantize=True),
    },
    "fp8": {
        "fine-grained FP8": by("FineGrainedFP8Config"),
        "fine-grained FP8 checkpoint, dequantised": lambda: checkpoint(
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, fp8_blocks
        ),
    },
    "mxfp8": {
        "MXFP8 checkpoint, dequantised": lambda: checkpoint(
            {"quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"}, mxfp8
        ),
    },
    "mxfp4": {
        "gpt-oss MXFP4": lambda: loaded(transformers.Mxfp4Config, gpt_oss),
        "gpt-oss MXFP4 checkpoint, dequantize=True": lambda: checkpoint(
            {"quant_method": "mxfp4"},
            mxfp4,
            gpt_oss,
            ("up_proj", "down_proj"),
            transformers.Mxfp4Config(dequantize=True),
        ),
    },
    "quanto": {
        "quanto int8": by("QuantoConfig", weights="int8"),
        "quanto float8": by("QuantoConfig", weights="float8"),
        "quanto int4": by("QuantoConfig", weights="int4"),
    },
    "hqq": {"HQQ int4": by("HqqConfig", nbits=4, group_size=64)},
    "bitnet": {
        "BitNet": lambda: checkpoint({"quant_method": "bitnet"}, bitnet),
        "BitNet, autobitlinear": lambda: checkpoint(
            {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}, as_it_is
        ),
    },
    "gemma": {
        "Gemma int4": lambda: checkpoint({"quant_method": "gemma", "modules_to_not_convert": ["lm_head"]}, gemma),
    },
    "metal": {
        "Metal int4": by("MetalConfig"),
        "Metal int4 checkpoint, dequantised": lambda: checkpoint(
            {"quant_method": "metal", "group_size": 64}, metal, device_map="cpu"
        ),
    },
    "gguf": {"GGUF Q8_0, dequantised": gguf},
    "gptq": {"GPTQ": declared("GPTQConfig", bits=4)},
    "awq": {"AWQ": declared("AwqConfig")},
    "auto-round": {"AutoRound": declared("AutoRoundConfig")},
    "aqlm": {
        "AQLM": lambda: checkpoint(
            {"quant_method": "aqlm", "nbits_per_codebook": 8, "linear_weights_not_to_quantize": ["lm_head.weight"]},
            aqlm,
        )
    },
    "vptq": {"VPTQ": declared("VptqConfig")},
    "spqr": {"SpQR": declared("SpQRConfig")},
    "quark": {"Quark": declared("QuarkConfig")},
    "eetq": {"EETQ": by("EetqConfig")},
    "higgs": {"HIGGS": by("HiggsConfig")},
    "fbgemm_fp8": {"FBGEMM FP8": by("FbgemmFp8Config")},
    "nvfp4": {"NVFP4": by("NVFP4Config")},
    "fp_quant": {"FP-Quant": by("FPQuantConfig")},
    "fouroversix": {"Four Over Six": by("FourOverSixConfig")},
    "sinq": {"SINQ": by("SinqConfig")},
}
"""Formats by the name of their method in transformers' loader, and what makes a model of each."""
