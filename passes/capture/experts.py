"""Reads layers of experts: whether `sparsespec::experts_site` expresses what one computes, and with which settings.

Weights are found under the names that transformers' experts interface gives them. What a layer does between its two
products is read from its own function, by an experiment, instead of from names: the site, on matrices that are
identities, must give the very numbers that the function gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsespec_compile.kernels.ops import ACTIVATIONS, ExpertsCall, ExpertsSettings, experts_site

from ..compat import grouped_experts

_HIDDEN = 24
"""Hidden values of the experiment's expert."""


@dataclass(frozen=True)
class ExpertsSite:
    """How a layer of experts is written as a site.

    Attributes:
        up, down: names of its parameters; their biases have "_bias" behind.
        biased: whether there are biases.
        settings: as in `kernels.ops`.
        transposed: whether matrices are [inputs, outputs].
    """

    up: str
    down: str
    biased: bool
    settings: ExpertsSettings
    transposed: bool

    def call(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The site's node, on the parameters of `module`."""
        names = self.up, self.down, *((f"{self.up}_bias", f"{self.down}_bias") if self.biased else ())
        tensors = [getattr(module, name) for name in names]
        biases = tensors[2:] or [None, None]
        call = ExpertsCall(x, index, weight, tensors[0], tensors[1], biases[0], biases[1], self.settings)
        return experts_site(*call.arguments(), self.transposed)


class ExpertsReader:
    """Reads each layer of experts in the rehearsal, and turns its calls into what was read in the trace.

    Args:
        path_of: paths of modules by identity.
    """

    def __init__(self, path_of: Mapping[int, str]) -> None:
        self._path_of = path_of
        self._found: dict[int, ExpertsSite | str] = {}

    def read(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Reads the layer, and runs it as the trace will."""
        self._found[id(module)] = read_experts(module, x, index, weight)
        return self.call(module, x, index, weight)

    def call(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """A site, or transformers' grouped products."""
        found = self._found.get(id(module))
        if isinstance(found, ExpertsSite):
            return found.call(module, x, index, weight)
        return grouped_experts(module, x, index, weight)

    def notes(self) -> tuple[str, ...]:
        """Which layers keep transformers' grouped products, and why."""
        return tuple(
            f"{self._path_of.get(module, 'experts')} keeps its grouped products: {reason}"
            for module, reason in self._found.items()
            if isinstance(reason, str)
        )


def read_experts(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> ExpertsSite | str:
    """The site that computes what transformers' experts implementations do for this layer, or why there is none."""
    gated, biased = bool(vars(module).get("has_gate", True)), bool(vars(module).get("has_bias", False))
    up, down = "gate_up_proj" if gated else "up_proj", "down_proj"
    names = {up, down, *((f"{up}_bias", f"{down}_bias") if biased else ())}
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if tensors.keys() != names:
        return f"it holds {', '.join(sorted(tensors))}, where {', '.join(sorted(names))} are known"
    kinds = {type(tensor) for tensor in tensors.values()} - {Tensor, nn.Parameter}
    if kinds:  # quantised ones, or pieces of several ranks
        return f"its weights are of type {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if vars(module).get("has_post_expert_norm", False):
        return "it normalises what experts give"
    if x.dim() != 2 or index.dim() != 2 or weight.shape != index.shape:
        return f"it is called with {tuple(x.shape)}, {tuple(index.shape)} and {tuple(weight.shape)}"
    if {one.dtype for one in tensors.values()} != {x.dtype} or not x.is_floating_point():
        dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
        return f"its rows are in {x.dtype} and its weights in {', '.join(dtypes)}"
    transposed = bool(vars(module).get("is_transposed", False))
    count, width, inner = tensors[up].shape[0], x.shape[1], tensors[down].shape[1 if transposed else 2]
    shapes = (count, inner * (1 + gated), width), (count, width, inner)
    for name, shape in zip((up, down), shapes, strict=True):
        expected = (shape[0], *(shape[:0:-1] if transposed else shape[1:]))
        if tuple(tensors[name].shape) != expected:
            return f"{name} is {tuple(tensors[name].shape)}, and would have to be {expected}"
    settings = _settings(module, gated)
    if settings is None:
        return "what it does between its products is not known here"
    return ExpertsSite(up, down, biased, settings, transposed)


def _settings(module: nn.Module, gated: bool) -> ExpertsSettings | None:
    """Settings under which the site gives the bits of the layer's own function, on numbers of all sizes."""
    function = getattr(module, "_apply_gate" if gated else "act_fn", None)
    if function is None:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    columns = _HIDDEN * (1 + gated)
    rows = torch.randn(64, columns, generator=generator, dtype=torch.float32, device="cpu")
    rows *= torch.logspace(-3, 3, 64, dtype=torch.float32, device="cpu")[:, None]
    given = function(rows.clone())
    if not isinstance(given, Tensor) or given.shape != (len(rows), _HIDDEN):
        return None
    for settings in _candidates(module, gated):
        if torch.equal(_hidden_values(rows, settings), given):
            return settings
    return None


def _hidden_values(rows: Tensor, settings: ExpertsSettings) -> Tensor:
    """What the site computes between its products, of rows that have gone through the first one."""
    weight = rows.new_ones(len(rows), 1)
    identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)[None]
    down = identity[:, :, :_HIDDEN]  # gives out the hidden values, and zeros behind them
    call = ExpertsCall(rows, weight.long() - 1, weight, identity, down, None, None, settings)
    return experts_site(*call.arguments(), False)[:, :_HIDDEN]


def _candidates(module: nn.Module, gated: bool) -> Iterator[ExpertsSettings]:
    """Settings that a layer may have, the commonest first. Numbers are those that it keeps under telling names."""
    numbers = {name: float(value) for name, value in vars(module).items() if type(value) in (int, float)}
    alphas = sorted({value for name, value in numbers.items() if "alpha" in name})
    limits = sorted({value for name, value in numbers.items() if "limit" in name and value > 0})
    kinds = [(name, alpha) for name in ACTIVATIONS for alpha in (alphas if name == "swish" else [0.0])]
    for limit in [0.0, *(limits if gated else [])]:
        for shift in (0.0, 1.0) if gated else (0.0,):
            for interleaved in (False, True) if gated else (False,):
                for activation, alpha in kinds:
                    yield ExpertsSettings(activation, alpha, limit, shift, interleaved)
