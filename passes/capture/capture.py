"""Captures a causal LM as one graph with one `sparsespec::attention_site` node for each attention call.

A twin of the model runs twice under transformers' interfaces. The **rehearsal** runs it on a few tokens and
records the settings and the mask of each attention call. The **trace** is `torch.export` on symbolic sizes, in which
each call becomes a node with the settings that the rehearsal found. So does each layer of experts that
`sparsespec::experts_site` can express; others keep transformers' grouped products. Parameters are shared with the
model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from transformers import PreTrainedModel

from sparsespec_compile.kernels.ops import AttentionSettings, SiteCall, SparseSpecError, attention_site

from ..base import note_derivations
from ..compat import mask_function, without_shape_cache
from ..errors import (
    AttentionInterfaceError,
    ExportError,
    PositionError,
    UnsupportedAttentionError,
    UnsupportedModelError,
)
from .experts import ExpertsReader
from .interface import recording
from .quantised import check_activations, quantisation, read_inner_tensors, untraceable
from .rotary import tabulate
from .scored_inputs import call_scored_experts
from .sites import Site, Window, causal_window, read_site, sinks_of
from .temperature import count_positions, standing_at
from .twin import twin_of

ROWS = 7
"""Tokens of the rehearsal. A prime, so that it is unlikely to equal another size of the model."""

_KEPT = 3
"""Rows of the rehearsal that get logits."""

TYPICAL_ROWS, TYPICAL_KEPT = 61, 17
"""Tokens of the trace's example, and rows with logits. Nothing runs on them, but compilers take them as hints of the
usual sizes. Primes, for the same reason."""


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph_module: `(input_ids [1, T] int64, position_ids [1, T] int64, logits_to_keep [R] int64)` as keyword
            arguments -> logits `[1, R, V]`; T and R symbolic, at least 2. Its parameters are the model's own.
        sites: the attention calls, in the order of the forward pass; node i has `layer == i`.
        notes: on layers of experts that are no sites, and why.
    """

    graph_module: GraphModule
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()


def capture(model: PreTrainedModel) -> Captured:
    """Captures `model`, which is never changed: what runs is a twin that shares its parameters and buffers.

    Raises:
        PositionError: the model takes no position for each token.
        AttentionInterfaceError: no attention goes through transformers' interface.
        UnsupportedAttentionError: an attention call asks for what the dual-mode op does not apply.
        ExportError: the model's own code or `torch.export` failed.
    """
    twin = twin_of(model)
    tabulate(twin)
    count_positions(twin)
    call_scored_experts(twin)
    packed = PackedModel(twin)
    with torch.no_grad():
        reader = ExpertsReader(packed.path_of)
        sites = _rehearse(packed, reader)
        return Captured(_trace(packed, sites, reader), sites, reader.notes())


class PackedModel(nn.Module):
    """The forward pass on packed tokens: positions given, no cache, logits only where they are asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        if "position_ids" not in accepted and not takes_any:
            raise PositionError(
                f"{type(model).__name__}.forward takes no position_ids. Packed requests need a position for each "
                "token; use a model whose forward takes position_ids."
            )
        # A wrapper that takes anything, as TRL's trainers set one, hands it on to what it wraps, or a rehearsal shows.
        own = accepted if not takes_any else {**accepted, **inspect.signature(type(model).forward).parameters}
        self.selects_rows = "logits_to_keep" in own
        self.path_of = {id(module): path for path, module in model.named_modules()}

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        selection = {"logits_to_keep": logits_to_keep} if self.selects_rows else {}
        with standing_at(position_ids):
            output = self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, **selection
            )
        return output.logits if self.selects_rows else output.logits[:, logits_to_keep]

    def example(self, rows: int, kept: int) -> dict[str, Tensor]:
        """Inputs of `rows` tokens, of which the first `kept` get logits."""
        device, embeddings = self.model.device, next(self.model.get_input_embeddings().parameters())
        return {
            "input_ids": (torch.arange(3, 3 + rows, device=device) % len(embeddings))[None],
            "position_ids": torch.arange(rows, device=device)[None],
            "logits_to_keep": torch.arange(kept, device=device),
        }


class _Rehearsal:
    """Records every attention call. Gives out marker tensors as masks, so that each call's mask can be identified."""

    def __init__(self, path_of: Mapping[int, str], reader: ExpertsReader) -> None:
        self.path_of = path_of
        self.experts = reader.read
        self.sites: list[Site] = []
        self.windows: dict[int, tuple[Tensor, Window | None]] = {}

    def mask(self, options: dict) -> Tensor:
        device = options.get("device") or "cpu"
        marker = torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool, device=device)
        self.windows[marker.data_ptr()] = (marker, causal_window(mask_function(options), device))
        return marker

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: dict) -> Tensor:
        path = self.path_of.get(id(module), type(module).__name__)
        site = read_site(len(self.sites), path, q, k, v, self._window(path, mask), options)
        if mask is None and options.get("is_causal") is None and not getattr(module, "is_causal", True):
            raise UnsupportedAttentionError(
                f"{path} attends to later tokens (is_causal is False). Allowed: causal attention. Use a causal LM; "
                "for BERT-like models set config.is_decoder = True before building the model."
            )
        self.sites.append(site)
        return _call_op(site, q, k, v, options)

    def _window(self, path: str, mask: object) -> Window | None:
        if mask is None:
            return None
        pointer = mask.data_ptr() if isinstance(mask, Tensor) else None
        window = self.windows[pointer][1] if pointer in self.windows else None
        if window is None:
            raise UnsupportedAttentionError(
                f"{path} attends under a mask that is neither causal nor a sliding window nor chunks: a bidirectional, "
                "block-sparse or additive one (ALiBi, learned bias). Allowed: causal, with or without a sliding window "
                "or chunks. Use a model with such attention; a mask that is dropped would change the text."
            )
        return window


class _Trace:
    """Turns attention call i into a node with the settings of site i. Gives out no masks."""

    def __init__(self, sites: tuple[Site, ...], reader: ExpertsReader) -> None:
        self.sites = sites
        self.experts = reader.call
        self.met = 0

    def mask(self, options: dict) -> None:
        return None

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, options: dict) -> Tensor:
        if mask is not None or self.met == len(self.sites):
            raise AttentionInterfaceError(
                f"attention call {self.met} ({type(module).__name__}) differs between two runs of the same tokens. "
                "The forward pass must make the same attention calls every time; use a model that does."
            )
        site = self.sites[self.met]
        self.met += 1
        return _call_op(site, q, k, v, options)


def _call_op(site: Site, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    call = SiteCall(q, k, v, AttentionSettings.of(site.layer), site.layer.layer, sinks_of(options))
    return attention_site(*call.arguments())


def _rehearse(packed: PackedModel, reader: ExpertsReader) -> tuple[Site, ...]:
    rehearsal = _Rehearsal(packed.path_of, reader)
    try:
        with recording(rehearsal):
            logits = packed(**packed.example(ROWS, kept=_KEPT))
    except SparseSpecError:
        raise
    except Exception as error:  # from the model's own code, which may raise anything
        raise _failure(packed, "ran on packed tokens without a cache", error) from error
    packed.selects_rows &= logits.shape[1] == _KEPT
    _check_windows(packed.model, rehearsal.sites)
    if not rehearsal.sites:
        raise AttentionInterfaceError(
            f"{type(packed.model).__name__} makes no call to transformers' AttentionInterface: its attention is "
            "written out in its own code, or it has none. Use a model that follows the interface (most families do "
            "in current transformers)."
        )
    return tuple(rehearsal.sites)


def _check_windows(model: PreTrainedModel, sites: list[Site]) -> None:
    """Without `layer_types`, transformers' cache keeps only `config.sliding_window` tokens of every layer."""
    config = model.config.get_text_config(decoder=True)
    cached = getattr(config, "sliding_window", None) if getattr(config, "layer_types", None) is None else None
    for site in sites:
        if cached and not site.layer.window:
            raise UnsupportedAttentionError(
                f"{site.module} attends to all earlier tokens, but config.sliding_window is {cached}, to which "
                "transformers' own cache cuts what is kept: its text with a cache is not the one without. Allowed: "
                "masks and cache that agree. Set config.sliding_window = None, or use another model."
            )


def _trace(packed: PackedModel, sites: tuple[Site, ...], reader: ExpertsReader) -> GraphModule:
    rows, kept = Dim("rows", min=2), Dim("kept", min=2)
    shapes = {"input_ids": {1: rows}, "position_ids": {1: rows}, "logits_to_keep": {0: kept}}
    try:
        with recording(_Trace(sites, reader)), without_shape_cache():
            example = packed.example(TYPICAL_ROWS, TYPICAL_KEPT)
            program = torch.export.export(packed, (), example, dynamic_shapes=shapes, strict=False)
    except SparseSpecError:
        raise
    except Exception as error:  # from the model's own code or the exporter, whose errors have no common base
        raise _failure(packed, "was traced by torch.export", error) from error
    exported = program.module(check_guards=False)
    graph_module = GraphModule(
        exported, exported.graph
    )  # without the exported module's hooks, which check its signature
    note_derivations(graph_module)
    read_inner_tensors(graph_module)
    check_activations(graph_module, packed.model)
    return graph_module


def _failure(packed: PackedModel, when: str, error: Exception) -> UnsupportedModelError:
    first_line = (str(error).strip().splitlines() or [""])[0]
    if "Constraints violated" in first_line:
        first_line = "the number of tokens must be of a special form, as for layers that work on chunks of tokens"
    if "Cannot access data pointer" in first_line:
        first_line = "it calls a kernel that takes addresses, which a trace has none of"
    if "data-dependent" in first_line:
        first_line = "it branches on values, as in a loop over the experts that tokens have chosen"
    cause = f"failed when it {when}: {type(error).__name__}: {first_line}"
    quantised = quantisation(packed.model)
    if quantised is not None:
        return untraceable(packed.model, quantised, cause)
    return ExportError(
        f"{type(packed.model).__name__} {cause}. Allowed: a forward pass free of branches on token values and of sizes "
        "tied to the number of tokens. The cause is chained; a newer transformers may help."
    )
