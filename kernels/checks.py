"""Checks of what a caller hands to an op: dtypes, ranks, sizes, strides, devices, settings.

Both implementations call them first. They look at metadata only: reading a value would wait for the device, and could
not be captured in a CUDA graph.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import KernelInputError
from .ops import ACTIVATIONS, LARGEST, PROCESSING_WIDTH, AttentionCall, ExpertsCall, SiteCall

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOGIT_DTYPES = FLOAT_DTYPES[:3]


def check_site(call: SiteCall) -> None:
    """Refuse arguments of ``attention_site`` that do not fit each other."""
    q, k, v = call.q, call.k, call.v
    _check_rank({"q": q, "k": k, "v": v}, 4)
    _check_float_dtype({"q": q, "k": k, "v": v}, FLOAT_DTYPES)
    batch, q_heads, rows, key_dim = q.shape
    if batch != 1:
        raise KernelInputError(f"q has batch size {batch}; packed tokens have 1: lay the sequences end to end")
    kv_heads = _check_heads(q_heads, k.shape[1])
    _check_size("k", k, (1, kv_heads, rows, key_dim))
    _check_size("v", v, (1, kv_heads, rows, v.shape[3]))
    _check_sinks(q, call.sinks, q_heads)
    _check_settings(*call.settings)


def check_attention(call: AttentionCall, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse arguments of ``dual_mode_attention`` that do not fit each other.

    ``dtypes`` are what the calling implementation takes for q, k, v and kv.
    """
    q, k, v, kv, scores, tensors, pillar_index, settings, sinks = call
    step = tensors._asdict()
    packed = {"q": q, "k": k, "v": v}
    _check_rank(packed, 3)
    _check_rank({"kv": kv}, 4)
    _check_rank({"scores": scores, "pillar_index": pillar_index}, 3)
    _check_float_dtype({**packed, "kv": kv}, dtypes)
    rows, q_heads, key_dim = q.shape
    kv_heads = _check_heads(q_heads, k.shape[1])
    _check_size("k", k, (rows, kv_heads, key_dim))
    _check_size("v", v, (rows, kv_heads, v.shape[2]))
    _check_size("kv", kv, (kv.shape[0], kv_heads, kv.shape[2], key_dim + v.shape[2]))
    _check_last_stride({**packed, "kv": kv, "scores": scores, "pillar_index": pillar_index})
    score_dtypes = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    _check_float_dtype({"scores": scores}, score_dtypes)
    _check_step(step, scores, pillar_index, kv_heads)
    _check_devices(q, {**packed, "kv": kv, "scores": scores, **step, "pillar_index": pillar_index})
    _check_sinks(q, sinks, q_heads)
    _check_settings(*settings)


def check_select(
    scores: Tensor,
    score_slot: Tensor,
    scored_length: Tensor,
    budget: Tensor,
    pillar_index: Tensor,
    pillar_count: Tensor,
) -> None:
    """Refuse arguments of ``select_pillars`` that do not fit each other."""
    _check_rank({"scores": scores, "pillar_index": pillar_index}, 3)
    if scores.dtype != torch.float32:
        raise KernelInputError(f"scores are {scores.dtype}; the selection takes torch.float32")
    _check_rank({"scored_length": scored_length}, 1)
    requests, heads = scored_length.shape[0], scores.shape[1]
    per_request = {
        "score_slot": score_slot,
        "scored_length": scored_length,
        "budget": budget,
        "pillar_count": pillar_count,
    }
    for name, tensor in per_request.items():
        _check_exact(name, tensor, (requests,))
    _check_exact("pillar_index", pillar_index, (requests, heads, pillar_index.shape[2]))
    _check_last_stride({"scores": scores, "pillar_index": pillar_index})
    _check_devices(scores, {**per_request, "pillar_index": pillar_index})


def check_proposals(tokens: Tensor, length: Tensor, wanted: Tensor, most: int) -> None:
    """Refuse arguments of ``propose_ngrams`` that do not fit each other."""
    _check_rank({"tokens": tokens}, 2)
    if tokens.dtype != torch.int64:
        raise KernelInputError(f"tokens are {tokens.dtype}; proposals take torch.int64")
    _check_rank({"length": length}, 1)
    for name, tensor in {"length": length, "wanted": wanted}.items():
        _check_exact(name, tensor, (length.shape[0],))
    if tokens.shape[0] < length.shape[0]:
        raise KernelInputError(f"tokens have {tokens.shape[0]} rows for {length.shape[0]} requests; give one for each")
    if most < 0:
        raise KernelInputError(f"most is {most}; it must be 0 or more")
    _check_last_stride({"tokens": tokens})
    _check_devices(tokens, {"length": length, "wanted": wanted})


def check_product(x: Tensor, weight: Tensor) -> None:
    """Refuse arguments of ``halved_product`` that do not fit each other."""
    _check_rank({"weight": weight}, 2)
    _check_float_dtype({"x": x, "weight": weight}, FLOAT_DTYPES)
    _check_devices(x, {"weight": weight})
    inner = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != inner:
        raise KernelInputError(f"x has shape {tuple(x.shape)}; its last dimension must be weight's, {inner}")
    if inner % 2:
        raise KernelInputError(f"weight has shape {tuple(weight.shape)}; its last dimension must be even")
    if not weight.is_contiguous():
        raise KernelInputError(f"weight has strides {weight.stride()}; it must be contiguous: call .contiguous()")


def check_experts(call: ExpertsCall, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuse arguments of ``experts`` that do not fit each other; ``dtypes`` are what the implementation takes."""
    x, choice, weight, up, down, up_bias, down_bias, settings = call
    biases = {name: one for name, one in (("up_bias", up_bias), ("down_bias", down_bias)) if one is not None}
    _check_rank({"x": x, "choice": choice, "weight": weight}, 2)
    _check_rank({"up": up, "down": down}, 3)
    _check_float_dtype({"x": x, "up": up, "down": down, **biases}, dtypes)
    _check_float_dtype({"weight": weight}, FLOAT_DTYPES)
    if choice.dtype not in (torch.int32, torch.int64):
        raise KernelInputError(f"choice is {choice.dtype}; it must be torch.int32 or torch.int64")
    rows, width = x.shape
    count, columns, _ = up.shape
    inner = down.shape[2]
    _check_size("choice", choice, (rows, choice.shape[1]))
    _check_size("weight", weight, tuple(choice.shape))
    _check_size("up", up, (count, columns, width))
    _check_size("down", down, (count, width, inner))
    if columns not in (inner, 2 * inner):
        raise KernelInputError(
            f"up gives {columns} columns and down takes {inner}; it must be as many, or half with gates"
        )
    for name, bias in biases.items():
        _check_size(name, bias, (count, columns if name == "up_bias" else width))
    for name, matrices in {"up": up, "down": down}.items():
        if matrices.numel() and 1 not in matrices.stride()[1:]:
            raise KernelInputError(f"{name} has strides {matrices.stride()}; one of the last two must be 1")
    _check_devices(x, {"choice": choice, "weight": weight, "up": up, "down": down, **biases})
    if settings.activation not in ACTIVATIONS:
        raise KernelInputError(f"activation is {settings.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if not (math.isfinite(settings.limit) and settings.limit >= 0):
        raise KernelInputError(f"limit is {settings.limit}; give a finite positive limit, or 0 for none")
    if columns == inner and (settings.limit or settings.shift or settings.interleaved):
        raise KernelInputError(f"experts without a gate have {settings}; limit, shift and interleaved belong to a gate")


def check_quantised_product(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Refuse arguments of ``quantised_product`` that do not fit each other."""
    _check_float_dtype({"x": x}, LOGIT_DTYPES)
    _check_quantised({"weight": weight, "scale": scale})
    inner = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != inner:
        raise KernelInputError(f"x has shape {tuple(x.shape)}; its last dimension must be weight's, {inner}")
    _check_devices(x, {"weight": weight, "scale": scale})


def check_fp8_product(x: Tensor, weight: Tensor) -> None:
    """Refuse arguments of ``fp8_product`` that do not fit each other."""
    _check_rank({"weight": weight}, 2)
    for name, tensor in {"x": x, "weight": weight}.items():
        if tensor.dtype != torch.float8_e4m3fn:
            raise KernelInputError(f"{name} is {tensor.dtype}; it must be {torch.float8_e4m3fn}")
        if not tensor.is_contiguous():
            raise KernelInputError(f"{name} has strides {tensor.stride()}; it must be contiguous: call .contiguous()")
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        raise KernelInputError(f"weight has shape {tuple(weight.shape)}; both sizes must be multiples of 16")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise KernelInputError(f"x has shape {tuple(x.shape)}; its last dimension must be weight's, {weight.shape[1]}")
    _check_devices(x, {"weight": weight})


def check_quantise(weight: Tensor, out_weight: Tensor, out_scale: Tensor) -> None:
    """Refuse arguments of ``quantise_rows`` that do not fit each other."""
    _check_rank({"weight": weight}, 2)
    _check_float_dtype({"weight": weight}, LOGIT_DTYPES)
    _check_last_stride({"weight": weight})
    _check_quantised({"out_weight": out_weight, "out_scale": out_scale})
    _check_size("out_weight", out_weight, tuple(weight.shape))
    _check_devices(weight, {"out_weight": out_weight, "out_scale": out_scale})


def _check_quantised(named: Mapping[str, Tensor]) -> None:
    """Weights and scales of an 8-bit matrix, under the caller's names for them."""
    (name, weight), (scale_name, scale) = named.items()
    _check_rank({name: weight}, 2)
    if weight.dtype not in LARGEST:
        allowed = " or ".join(map(str, LARGEST))
        raise KernelInputError(f"{name} is {weight.dtype}; it must be {allowed}")
    if not weight.is_contiguous():
        raise KernelInputError(f"{name} has strides {weight.stride()}; it must be contiguous: call .contiguous()")
    if weight.shape[1] % 2 or weight.storage_offset() % 2:
        raise KernelInputError(
            f"{name} has shape {tuple(weight.shape)} and begins at byte {weight.storage_offset()} of its storage; its "
            "last dimension and its beginning must be even, since weights lie in pairs"
        )
    _check_exact(scale_name, scale, (weight.shape[0],), torch.float32)
    _check_last_stride({scale_name: scale})


def check_draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> None:
    """Refuse arguments of ``draw_tokens`` that do not fit each other."""
    real = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    _check_drawn_rows(logits, real, {"top_k": top_k, "seed": seed, "position": position})


def check_draw_part(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, first_token: int) -> None:
    """Refuse arguments of ``draw_part`` that do not fit each other."""
    _check_drawn_rows(logits, {"temperature": temperature}, {"seed": seed, "position": position})
    if first_token < 0 or first_token % 4 or first_token + logits.shape[1] > 2**31:
        raise KernelInputError(
            f"first_token is {first_token}; it must be a multiple of 4 from 0 on, and tokens must end at 2**31"
        )


def check_processing(logits: Tensor, tokens: Tensor, slot: Tensor, position: Tensor, settings: Tensor) -> None:
    """Refuse arguments of ``process_logits`` that do not fit each other."""
    _check_rank({"tokens": tokens, "settings": settings}, 2)
    _check_exact("settings", settings, (settings.shape[0], PROCESSING_WIDTH), torch.int32)
    _check_exact("tokens", tokens, (tokens.shape[0], tokens.shape[1]), torch.int64)
    if tokens.shape[0] < settings.shape[0]:
        raise KernelInputError(f"tokens have {tokens.shape[0]} rows; give one for each of {settings.shape[0]} slots")
    _check_drawn_rows(logits, {}, {"slot": slot, "position": position})
    _check_devices(logits, {"tokens": tokens, "settings": settings})


def _check_drawn_rows(logits: Tensor, real: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    _check_rank({"logits": logits}, 2)
    _check_float_dtype({"logits": logits}, LOGIT_DTYPES)
    if not 0 < logits.shape[1] < 2**31:
        raise KernelInputError(f"logits have {logits.shape[1]} tokens; give at least 1 and fewer than 2**31")
    _check_last_stride({"logits": logits})
    rows = (logits.shape[0],)
    for name, tensor in real.items():
        _check_exact(name, tensor, rows, torch.float32)
    for name, tensor in whole.items():
        _check_exact(name, tensor, rows, torch.int64)
    _check_devices(logits, {**real, **whole})


def _check_step(step: Mapping[str, Tensor], scores: Tensor, pillar_index: Tensor, kv_heads: int) -> None:
    _check_rank({"request_mode": step["request_mode"]}, 1)
    requests = step["request_mode"].shape[0]
    for name, tensor in step.items():
        if name != "page_table":
            _check_exact(name, tensor, (requests,))
    _check_rank({"page_table": step["page_table"]}, 2)
    _check_exact("page_table", step["page_table"], (requests, step["page_table"].shape[1]))
    _check_size("scores", scores, (scores.shape[0], kv_heads, scores.shape[2]))
    _check_exact("pillar_index", pillar_index, (requests, kv_heads, pillar_index.shape[2]))
    if pillar_index.shape[2] == 0:
        raise KernelInputError("pillar_index has room for 0 pillars; its last dimension must be 1 at least")


def _check_rank(tensors: Mapping[str, Tensor], rank: int) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise KernelInputError(f"{name} has shape {tuple(tensor.shape)}; its number of dimensions must be {rank}")


def _check_size(name: str, tensor: Tensor, size: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != size:
        raise KernelInputError(f"{name} has shape {tuple(tensor.shape)}; the other arguments call for {size}")


def _check_exact(name: str, tensor: Tensor, size: tuple[int, ...], dtype: torch.dtype = torch.int32) -> None:
    if tensor.dtype != dtype:
        raise KernelInputError(f"{name} is {tensor.dtype}; it must be {dtype}: call .to({dtype})")
    _check_size(name, tensor, size)


def _check_float_dtype(tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise KernelInputError(f"{first_name} is {first.dtype}; allowed on {first.device.type}: {allowed}")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise KernelInputError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}; give both one dtype")


def _check_last_stride(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise KernelInputError(f"{name} has last stride {tensor.stride(-1)}; it must be 1: call .contiguous()")


def _check_heads(q_heads: int, kv_heads: int) -> int:
    if kv_heads == 0 or q_heads % kv_heads:
        raise KernelInputError(f"{q_heads} query heads over {kv_heads} KV heads; the first must be a multiple")
    return kv_heads


def _check_devices(first: Tensor, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise KernelInputError(f"{name} is on {tensor.device}, others on {first.device}; move them to one device")


def _check_sinks(q: Tensor, sinks: Tensor | None, q_heads: int) -> None:
    if sinks is None:
        return
    _check_float_dtype({"sinks": sinks}, FLOAT_DTYPES)
    _check_size("sinks", sinks, (q_heads,))
    _check_last_stride({"sinks": sinks})
    _check_devices(q, {"sinks": sinks})


def _check_settings(scale: float, window: int, softcap: float, chunked: bool) -> None:
    if not math.isfinite(scale):
        raise KernelInputError(f"scale is {scale}; it must be finite")
    if window < 0:
        raise KernelInputError(f"window is {window}; give the number of positions a row sees, or 0 for all")
    if chunked and not window:
        raise KernelInputError("chunked attention without a window; give the length of a chunk as the window")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise KernelInputError(f"softcap is {softcap}; give a finite positive cap, or 0 for none")
