"""Notices that a model is no longer the one that was compiled."""

from __future__ import annotations

from torch import nn

from ..errors import StaleParametersError


class SharedParameters:
    """Remembers the model's modules and where its parameters were, so that a later change of either is noticed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.compiled = _fingerprint(model)

    def moved(self) -> str | None:
        """Path of the first module, parameter or buffer that is not the one that was compiled, None when all are."""
        found = _fingerprint(self.model)
        paths = (*self.compiled, *found)
        return next((path for path in paths if self.compiled.get(path) != found.get(path)), None)

    def require(self) -> None:
        """Raises StaleParametersError when the model is no longer the one that was compiled."""
        path = self.moved()
        if path is not None:
            raise StaleParametersError(
                f"{path} was moved, replaced, added or removed since the model was compiled (model.to, half, loading "
                "with assign=True, adapters, hooks), so the graph still computes as before. Allowed: changes in place, "
                "such as parameter.copy_() or load_state_dict. Call optimize(model) again."
            )


def _fingerprint(model: nn.Module) -> dict[str, tuple]:
    """By path: the kind and hooks of each module, the place and dtype of each parameter and buffer."""
    found: dict[str, tuple] = {}
    for path, module in model.named_modules():
        found[path or type(model).__name__] = (type(module), *module._forward_hooks, *module._forward_pre_hooks)
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                found[f"{path}.{name}"] = (value.data_ptr(), value.dtype)
    return found
