"""Checks before a capture: versions of torch and transformers, and models whose kind cannot be supported."""

from __future__ import annotations

import sys

import torch
import transformers
from torch import nn
from torch.torch_version import TorchVersion
from transformers import PreTrainedModel

from ..compat import ATTENTION_SETTING, attention_functions, implementations
from ..errors import (
    EncoderDecoderError,
    RowMixingError,
    UnsupportedAttentionError,
    UnsupportedModelError,
    VersionError,
)
from .adapters import without_adapters
from .interface import model_configs
from .quantised import is_wrapper, quantisation_method, remedy
from .rotary import check_rotary
from .wrappers import check_global_hooks, check_precision, is_of_transformers

OLDEST = {"torch": "2.11", "transformers": "5.6"}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ALIBI_FAMILIES = frozenset({"bloom", "mpt"})
CROSS_ATTENTION = frozenset({"encoder_attn", "crossattention"})
RECURRENT_LAYERS = frozenset({"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "recurrent"})
SELECTING_LAYERS = frozenset(
    {"compressed_sparse_attention", "heavily_compressed_attention", "indexed_attention", "minimax_m3_sparse"}
)


def check_versions(
    torch_version: str = torch.__version__, transformers_version: str = transformers.__version__
) -> None:
    """Raises VersionError when torch or transformers is older than `OLDEST`. Its own pre-releases are accepted."""
    for package, found in (("torch", torch_version), ("transformers", transformers_version)):
        if TorchVersion(found) < TorchVersion(f"{OLDEST[package]}.dev0"):
            raise VersionError(
                f"{package} {found} is installed. Allowed: {OLDEST[package]} or newer. "
                f"Run: pip install '{package}>={OLDEST[package]}'."
            )


def check_model(model: object) -> None:
    """Refuses models that are not decoder-only causal LMs, or whose attention the dual-mode op does not compute.

    Raises:
        UnsupportedModelError: not a `PreTrainedModel`, no language-modelling head, or parameters that cannot be shared.
        EncoderDecoderError: an encoder-decoder, or the decoder of one.
        MixedPrecisionError: a forward pass that runs under autocast.
        RowMixingError: layers that carry state along the tokens.
        UnsupportedAttentionError: ALiBi, layers that select tokens themselves, or an attention function of another's.
        PositionError: rotary frequencies that follow the longest sequence of a call, from an unknown position on.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"got a {type(model).__name__}. Allowed: a transformers PreTrainedModel. Load one with "
            "AutoModelForCausalLM.from_pretrained."
        )
    _check_kind(model)
    check_precision(dict(model.named_modules()))
    check_global_hooks()
    _check_cross_attention(model)
    _check_parameters(model)
    _check_implementations(model)
    for config in model_configs(model):
        _check_attention(type(model).__name__, config)
    check_rotary(model)


def _check_kind(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise EncoderDecoderError(
            f"{name} is an encoder-decoder. Allowed: decoder-only causal LMs. Load the decoder alone, if its family "
            "has a causal LM class, or another model."
        )
    if model.get_output_embeddings() is None or not _has_token_embedding(model):
        raise UnsupportedModelError(
            f"{name} has no token embedding, or no language-modelling head. Allowed: causal LMs. Load it with "
            "AutoModelForCausalLM."
        )


def _has_token_embedding(model: PreTrainedModel) -> bool:
    try:
        return isinstance(without_adapters(model.get_input_embeddings()), nn.Embedding)
    except NotImplementedError:  # transformers' way to say that it finds none
        return False


def _check_cross_attention(model: PreTrainedModel) -> None:
    for path, _ in model.named_modules():
        if path.rpartition(".")[2] in CROSS_ATTENTION:
            raise EncoderDecoderError(
                f"{path} attends to an encoder. Allowed: decoder-only causal LMs. Use a model without cross-attention."
            )


def _check_parameters(model: PreTrainedModel) -> None:
    parameters = dict(model.named_parameters())
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise UnsupportedModelError(
            f"{type(model).__name__} has parameters on {sorted(map(str, devices))}. Allowed: one device that holds "
            "data. Load it with device_map=None, or on one device."
        )
    method = quantisation_method(model)
    if hasattr(model, "ct_decompress_hook"):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds compressed weights until its first forward pass, which replaces them. Run "
            f"the model once before it is compiled, such as by model(input_ids). {remedy(model)}"
        )
    for path, parameter in parameters.items():
        plain = type(parameter) is nn.Parameter
        if plain and method is not None:
            continue  # whether what the model does with numbers of few bits can be traced, the capture shows
        if not (plain or is_wrapper(parameter)) or not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{path} is a {type(parameter).__name__} of {parameter.dtype}"
                f"{'' if method is None else f' (the model was loaded with {method})'}. Allowed: plain floating-point "
                f"parameters, and torchao's quantised ones. {remedy(model)}"
            )
        if parameter.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{path} is of {parameter.dtype}. Allowed: {', '.join(map(str, DTYPES))}. Convert the model, such as "
                "by model.float()."
            )
    for path, tensor in (*parameters.items(), *model.named_buffers()):
        if tensor.is_inference():
            raise UnsupportedModelError(
                f"{path} was made inside of torch.inference_mode(), where tensors are made that can neither be traced "
                "nor changed outside of it. Allowed: models that were built, loaded and moved outside. Do that before "
                "torch.inference_mode() begins, or use torch.no_grad() in its place."
            )


def _check_implementations(model: PreTrainedModel) -> None:
    """Only transformers' own functions are known to compute plain attention, which is what the graph computes."""
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if not isinstance(config, transformers.PreTrainedConfig):
            continue
        file = sys.modules.get(type(module).__module__)
        for function in attention_functions(config, {} if file is None else vars(file)):
            if function is not None and not is_of_transformers(function):
                name = getattr(function, "__qualname__", type(function).__name__)
                raise UnsupportedAttentionError(
                    f"{path or type(model).__name__} attends by {implementations(config)[ATTENTION_SETTING]!r}, which "
                    f"is {name} of {getattr(function, '__module__', 'unknown')}; what it computes is not known here. "
                    "Allowed: transformers' own functions. If plain attention is meant, choose one of them, such as by "
                    "model.set_attn_implementation('sdpa')."
                )


def _check_attention(name: str, config: transformers.PreTrainedConfig) -> None:
    if config.model_type in ALIBI_FAMILIES or getattr(config, "alibi", False):
        raise UnsupportedAttentionError(
            f"{name} adds ALiBi biases to its attention scores, which the dual-mode op does not apply. Allowed: models "
            "with rotary or learned positions. Use one of those."
        )
    layers = set(getattr(config, "layer_types", None) or ())
    if layers & RECURRENT_LAYERS:
        raise RowMixingError(
            f"{name} has layers of type {sorted(layers & RECURRENT_LAYERS)}, in which a token sees others without "
            "attention. Allowed: layers of full, sliding-window or chunked attention. Use a model of these alone."
        )
    if layers & SELECTING_LAYERS:
        raise UnsupportedAttentionError(
            f"{name} has layers of type {sorted(layers & SELECTING_LAYERS)}, which select the tokens they attend to. "
            "Allowed: layers of full, sliding-window or chunked attention. Use a model of these alone."
        )
