"""Experts that Llama-4 runs in its own code: every expert over all rows, on inputs times a score that is mostly 0.

The score is the sigmoid of a router logit, and 0 for experts that a row has not chosen. Without biases an expert gives
0 for a row of zeros, so only choices count. A twin's layer computes them as a call of experts instead: each of a row's
K choices is a row of its own, of one choice and weight 1, whose input is the row times the score.

    out[t] = shared(x[t]) + sum over k of expert[choice[t, k]](score[t, k] * x[t])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import FakeTensor
from ..errors import UnsupportedModelError
from .interface import call_experts

_LAYER = ("transformers.models.llama4.modeling_llama4", "Llama4TextMoe")

_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Norm of a difference over the norm of what the layer gives, up to which it is rounding: sums have another order."""


def call_scored_experts(twin: nn.Module) -> None:
    """Makes the layers of a twin that score inputs of experts call them through the experts interface."""
    for path, module in twin.named_modules():
        if _scores_inputs(module):
            _describe(module.get_submodule("experts"))
            module.forward = _ScoredExperts(path, module, module.forward)


def _scores_inputs(module: nn.Module) -> bool:
    """Whether it is transformers' own layer with its own experts, of which it is known what else they compute."""
    kind = type(module)
    if (kind.__module__, kind.__name__) != _LAYER:
        return False
    experts = module.get_submodule("experts")
    return type(experts).__module__ == kind.__module__ and not any("forward" in vars(one) for one in (module, experts))


def _describe(experts: Any) -> None:
    """Says of a twin's experts what transformers' experts interface has others say, as their own code reads it."""
    activation = experts.act_fn

    def apply_gate(projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return up * activation(gate)

    vars(experts).update(has_gate=True, has_bias=False, is_transposed=True, _apply_gate=apply_gate)


class _ScoredExperts:
    """Takes the place of a layer's `forward`: rows [..., H] -> (rows [T, H], router logits [T, E])."""

    def __init__(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.path, self.module, self.forward = path, module, forward

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self.module
        rows = hidden_states.reshape(-1, module.hidden_dim)
        shared = module.shared_expert(rows)  # before the router, which writes in place: the products can be fused then
        scores, logits = module.router(rows)
        choice = logits.topk(module.top_k, dim=1).indices
        scored = (rows[:, None] * scores.gather(1, choice)[:, :, None]).flatten(0, 1)
        given = call_experts(module.experts, scored, choice.reshape(-1, 1), torch.ones_like(scored[:, :1]))
        out = shared + given.unflatten(0, (-1, module.top_k)).sum(1)
        if not isinstance(out, FakeTensor):
            self._compare(out, self.forward(hidden_states)[0])
        return out, logits

    def _compare(self, ours: Tensor, own: Tensor) -> None:
        """Refuses a layer whose code computes something else, as that of another version of transformers may."""
        difference = (ours - own).double().norm()
        if not difference <= _ROUNDING[own.dtype] * own.double().norm() and own.isfinite().all():
            raise UnsupportedModelError(
                f"{self.path} ({type(self.module).__name__}) gives other numbers than experts whose inputs are scored. "
                "Allowed: the layer as transformers has had it. Install a transformers version that pyproject.toml "
                "allows, or use another model."
            )
