"""Reads the settings of one call of transformers' attention interface, and refuses what the dual-mode op lacks.

transformers describes a mask by a function of indices, `mask_function(batch, head, query, key) -> bool`. The positions
that a token sees are read from that function instead of from a configuration field: a bidirectional or otherwise
special mask then cannot be taken for a causal one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsespec_compile.kernels.ops import first_visible

from ..errors import AttentionInterfaceError, UnsupportedAttentionError
from ..layout import AttentionLayer

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

SPAN = 1 << 20
"""Positions for which a mask function is evaluated. A window of this size or more counts as no window."""


class Window(NamedTuple):
    """What the rows of a causal mask see, as `AttentionSettings` has it."""

    window: int
    chunked: bool = False

    def __str__(self) -> str:
        return f"chunks of {self.window} tokens" if self.chunked else f"a window of {self.window} tokens (0 = none)"


def causal_window(mask_function: MaskFunction, device: torch.device | str = "cpu") -> Window | None:
    """What the rows of a causal mask see; None for a mask of another kind.

    The last row gives two candidates. It sees a whole window, or it stands in the latest chunk, and the row before that
    chunk sees a whole one. Rows at the start, around the first cut, around the latest start of a chunk and far away
    must agree with a candidate: chunks look like a window in some rows, and not in those just after a chunk begins.

    Args:
        mask_function: of (batch, head, query, key) indices.
        device: of the indices; that of tensors which the function may hold.
    """
    seen = _visible(mask_function, SPAN - 1, device)
    count = 0 if seen is None else int(seen.sum())
    if count == 0:
        return None
    if count == SPAN:
        candidates = [Window(0)]
    else:
        before = _visible(mask_function, SPAN - count - 1, device)
        candidates = [Window(count), Window(0 if before is None else int(before.sum()), chunked=True)]
    far = {SPAN // 2 + 1, SPAN - count - 1, SPAN - count, SPAN - 2, SPAN - 1}
    for found in candidates:
        near = {0, 1, 2, *(found.window + offset for offset in (-1, 0, 1, 2))}
        if all(_agrees(mask_function, row, found, device) for row in near | far if 0 <= row < SPAN):
            return found
    return None


def _agrees(mask_function: MaskFunction, row: int, window: Window, device: torch.device | str) -> bool:
    seen = _visible(mask_function, row, device)
    if seen is None or (window.chunked and not window.window):
        return False
    position = torch.arange(SPAN, device=device)
    return torch.equal(seen, (position <= row) & (position >= first_visible(row, *window)))


def _visible(mask_function: MaskFunction, row: int, device: torch.device | str) -> Tensor | None:
    """Which of SPAN keys query `row` sees, bool [SPAN]; None when the function needs more than the indices."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    query = torch.full((1, 1, 1, 1), row, device=device)
    key = torch.arange(SPAN, device=device).view(1, 1, 1, SPAN)
    try:
        return mask_function(zero, zero, query, key).expand(1, 1, 1, SPAN).reshape(SPAN).bool()
    except (IndexError, RuntimeError):
        return None


HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "layer_idx",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "use_cache",
    }
)
"""Arguments that attention functions are given but that do not change their output."""

SINKS = ("s_aux", "sinks")
"""Names that sinks are given under: a logit of each query head that every row sees beside those of its keys."""

APPLIED = frozenset({"scaling", "softcap", "sliding_window", *SINKS})
BIASES = frozenset({"position_bias", "attention_bias", "alibi", "rel_pos_bias"})
SELECTIONS = frozenset({"indices", "block_indices", "block_mask"})


@dataclass(frozen=True)
class Site:
    """One attention call of a forward pass: its layer in the layout, and the path of the calling module."""

    layer: AttentionLayer
    module: str


def read_site(
    number: int, module: str, q: Tensor, k: Tensor, v: Tensor, window: Window | None, options: Mapping[str, object]
) -> Site:
    """Turns one call into a `Site`.

    Args:
        number: how many attention calls the forward pass made before.
        module: path of the calling module, for messages.
        q, k, v: `[1, Hq, T, Dk]`, `[1, Hkv, T, Dk]`, `[1, Hkv, T, Dv]`.
        window: what the mask that came with the call says (`causal_window`), None without a mask.
        options: every further argument of the call.

    Raises:
        AttentionInterfaceError: q, k and v are not of the shapes above.
        UnsupportedAttentionError: an option asks for something that the dual-mode op does not apply.
    """
    _check_shapes(module, q, k, v)
    _check_sinks(module, options, q.shape[1])
    _check_options(module, options, has_mask=window is not None)
    scale = _number(module, options, "scaling", 1.0 / math.sqrt(q.shape[-1]))
    softcap = _number(module, options, "softcap", 0.0)
    seen = _window(module, options, window)
    layer = AttentionLayer(
        layer=number,
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        key_dim=q.shape[-1],
        value_dim=v.shape[-1],
        scale=scale,
        window=seen.window,
        softcap=softcap,
        chunked=seen.chunked,
    )
    return Site(layer, module)


def _check_shapes(module: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = (
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[0] == k.shape[0] == v.shape[0] == 1
        and q.shape[2] == k.shape[2] == v.shape[2]
        and q.shape[1] % k.shape[1] == 0
        and k.shape[1] == v.shape[1]
        and q.shape[3] == k.shape[3]
    )
    if not fits:
        raise AttentionInterfaceError(
            f"{module} called attention with q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}. Allowed: q "
            "[1, Hq, T, Dk], k [1, Hkv, T, Dk] and v [1, Hkv, T, Dv] over the same T tokens, Hq a multiple of Hkv. "
            "Cross-attention, prefixes and compressed keys are not supported; use a decoder-only model without them."
        )


def sinks_of(options: Mapping[str, object]) -> Tensor | None:
    """The sinks [Hq] that a call gives, None for none."""
    given = [options[name] for name in SINKS if options.get(name) is not None]
    return given[0] if given else None  # type: ignore[return-value]


def _check_sinks(module: str, options: Mapping[str, object], q_heads: int) -> None:
    sinks = sinks_of(options)
    if sinks is not None and (not isinstance(sinks, Tensor) or sinks.shape != (q_heads,)):
        shown = f"a tensor {tuple(sinks.shape)}" if isinstance(sinks, Tensor) else repr(sinks)
        raise UnsupportedAttentionError(
            f"{module} passes {shown} to attention as its sinks. Allowed: one number for each of its {q_heads} query "
            "heads. Use a model with such sinks, or without."
        )


def _check_options(module: str, options: Mapping[str, object], has_mask: bool) -> None:
    for name, value in options.items():
        if value is None or name in HARMLESS or name in APPLIED:
            continue
        if name == "dropout" and value == 0:
            continue
        if name == "is_causal" and (value is True or has_mask):
            continue
        raise UnsupportedAttentionError(_explain(module, name, value))


def _explain(module: str, name: str, value: object) -> str:
    shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    if name in BIASES:
        what = "a bias on the attention scores (ALiBi or a learned one)"
    elif name in SELECTIONS:
        what = "its own selection of the tokens to attend to"
    elif name == "is_causal":
        what = "attention to later tokens"
    elif name == "dropout":
        what = "dropout on the attention probabilities"
    else:
        what = "an option that this compiler does not know"
    return (
        f"{module} passes {name}={shown} to attention: {what}. Allowed: scaling, softcap, sinks, and a sliding window "
        "or chunks. Use a model without it; dropping it would change the text."
    )


def _window(module: str, options: Mapping[str, object], masked: Window | None) -> Window:
    """The window that mask and `sliding_window` agree on. A mask cannot show one of SPAN tokens or more."""
    passed = options.get("sliding_window") or 0
    seen = masked or Window(0)
    if isinstance(passed, int) and (Window(passed) == seen or (passed >= SPAN and masked == Window(0))):
        return Window(passed)
    if seen.chunked and passed == 0:
        return seen
    raise UnsupportedAttentionError(
        f"{module} passes sliding_window={passed} to attention, but its mask shows {seen}, so its text depends on "
        "the attention implementation. Allowed: a mask and a window that agree. Use a newer transformers, or another "
        "model."
    )


def _number(module: str, options: Mapping[str, object], name: str, default: float) -> float:
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, (int, float)):
        return float(value)
    raise UnsupportedAttentionError(
        f"{module} passes {name} of type {type(value).__name__} to attention. Allowed: a plain number, the same for "
        "all tokens. Use a model whose attention has a constant scale."
    )
