"""Quantised weights of the user's own model: which are taken, how a graph reads them, and what to do about others.

torchao's weights are tensors around others: numbers of few bits, scales, zero points. `torch.export` traces the model's
own arithmetic on these, so the captured graph computes what the model does. Here it is made to read them as buffers:

Before:
    w: TorchAOBaseTensor = get_attr[model.q_proj.weight]
    q: int8[N, K] = export.access_subclass_inner_tensor(w, "qdata")
After:
    q: int8[N, K] = get_attr[model.q_proj.weight_qdata]

The buffers are the very tensors of the model, so that changes in place reach the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

from ..base import attribute, describe
from ..compat import is_traceable_wrapper_subclass
from ..errors import GraphInvariantError, UnsupportedModelError

REMEDIES = {
    "mxfp4": "Load it dequantised, with quantization_config=Mxfp4Config(dequantize=True).",
    "fp8": "Load it dequantised, with quantization_config=FineGrainedFP8Config(dequantize=True).",
    "bitsandbytes": "Call model.dequantize() first, or load the model without quantization_config.",
    "compressed-tensors": "Load it dequantised, with quantization_config=CompressedTensorsConfig(dequantize=True).",
    "mxfp8": "Load it dequantised, with quantization_config=FineGrainedFP8Config(dequantize=True).",
    "metal": "Load it dequantised, with quantization_config=MetalConfig(dequantize=True).",
    "gguf": "Load it dequantised, with quantization_config=GgufConfig(dequantize=True).",
}
"""What to do about a model by the `quant_method` of its configuration; those of `_bitsandbytes` share one."""

_OTHERWISE = (
    "Load the checkpoint that it was made from, without quantisation; torchao's quantize_ can quantise the weights of "
    "that one."
)

_ROUNDING = torch.ops.aten.round.default, torch.ops.aten.round.decimals

_ACCESS = torch.ops.export.access_subclass_inner_tensor.default

_NARROW = frozenset(
    {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a parameter is one of torchao's tensors around others."""
    return type(tensor).__module__.partition(".")[0] == "torchao" and is_traceable_wrapper_subclass(tensor)


def inner_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what holds a tensor's data: that itself, or what is within it, at any depth."""
    if not is_traceable_wrapper_subclass(tensor):
        yield "", tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        for inner, value in inner_tensors(getattr(tensor, name)):
            yield f"{name}.{inner}" if inner else name, value


def plain_tensors(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """What holds the data of these tensors."""
    return tuple(value for tensor in tensors for _, value in inner_tensors(tensor))


def quantisation(model: PreTrainedModel) -> str | None:
    """How a model's weights are quantised, in a word; None where they are not."""
    found = next((type(parameter).__name__ for parameter in model.parameters() if is_wrapper(parameter)), None)
    return found if found is not None else quantisation_method(model)


def quantisation_method(model: nn.Module) -> str | None:
    """The method that a model was loaded with; None where it was loaded without, or dequantised."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None or getattr(model, "hf_quantizer", None) is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def remedy(model: nn.Module) -> str:
    """What to do about a quantised model that is not taken."""
    method = quantisation_method(model) or ""
    return REMEDIES.get("bitsandbytes" if method.startswith("bitsandbytes") else method, _OTHERWISE)


def untraceable(model: PreTrainedModel, method: str, cause: str) -> UnsupportedModelError:
    """The error of a quantised model whose arithmetic torch.export does not follow.

    Args:
        method: from `quantisation`.
        cause: what failed, and how.
    """
    return UnsupportedModelError(
        f"{type(model).__name__} has quantised weights ({method}), and its code for these cannot be traced: {cause}. "
        f"Allowed: plain floating-point weights, and quantised ones whose arithmetic torch.export follows, such as "
        f"torchao's. {remedy(model)}"
    )


def read_inner_tensors(graph_module: GraphModule) -> None:
    """See the module's docstring."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_ACCESS):
        holder, name = node.args
        if not isinstance(holder, Node) or holder.op != "get_attr":
            raise GraphInvariantError(f"{describe(node)} reads a part of what is no parameter.")
        inner = getattr(attribute(graph_module, str(holder.target)), str(name))
        with graph.inserting_before(node):
            read = graph.get_attr(_hold(graph_module, str(holder.target), str(name), inner))
        read.meta.update(node.meta)
        node.replace_all_uses_with(read)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def check_activations(graph_module: GraphModule, model: nn.Module) -> None:
    """Refuses models that round activations to few values, as dynamic and static quantisation of activations do.

    Args:
        model: what was captured; the error says how it was quantised.

    Raises:
        UnsupportedModelError: the model does, in a dtype of 8 bits or within one of more. Values that differ in their
            last bit may be rounded apart by a 127th of the largest, so its text depends on how many rows are computed
            together.
    """
    weights: set[Node] = set()  # and constants: what depends on no input
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and weights.issuperset(node.all_input_nodes)):
            weights.add(node)
            continue
        dtype = getattr(node.meta.get("val"), "dtype", None)
        if node.op != "call_function" or not isinstance(dtype, torch.dtype):
            continue
        if dtype in _NARROW or (node.target in _ROUNDING and dtype.is_floating_point):
            method = quantisation_method(model)
            loaded = "" if method is None else f" The model was loaded with {method}. {remedy(model)}"
            raise UnsupportedModelError(
                f"{describe(node)} rounds activations to {dtype if dtype in _NARROW else 'whole numbers'} "
                "(quantisation of activations, such as dynamic quantisation): what differs in its last bit may be "
                "rounded apart, so the model's text depends on how many rows are computed together. Allowed: "
                "quantisation of weights alone, such as torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig."
                f"{loaded}"
            )


def _hold(graph_module: GraphModule, path: str, name: str, inner: Tensor) -> str:
    """Registers a tensor beside the parameter that holds it; returns its path."""
    owner, _, own = path.rpartition(".")
    module = graph_module.get_submodule(owner)
    if isinstance(inner, nn.Parameter):
        module.register_parameter(f"{own}_{name}", inner)
    else:
        module.register_buffer(f"{own}_{name}", inner)
    return f"{owner}.{own}_{name}" if owner else f"{own}_{name}"
