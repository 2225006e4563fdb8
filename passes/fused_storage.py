"""Parameters as views of one storage: which ones can be, making them so, and noticing when they no longer are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .errors import GraphInvariantError, StaleParametersError
from .fakes import attribute


class ParameterTable:
    """What the graph's weights are in the model, and whether their storage may be changed."""

    def __init__(self, model: nn.Module, graph_module: GraphModule) -> None:
        self.root = graph_module
        self.names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self.uses = Counter(
            id(self.tensor(node)) for node in graph_module.graph.find_nodes(op="get_attr") for _ in node.users
        )

    def tensor(self, node: Node) -> Tensor:
        """The tensor that a `get_attr` node reads."""
        return attribute(self.root, str(node.target))

    def parameter(self, node: Node) -> nn.Parameter:
        """The model's parameter that a node reads; `why_fixed` must have said None."""
        value = self.tensor(node)
        if not isinstance(value, nn.Parameter):
            raise GraphInvariantError(f"{node.target} is not a parameter, so its storage cannot move.")
        return value

    def why_fixed(self, node: Node) -> str | None:
        """Why the storage of this weight must stay as it is; None when it may move."""
        value = self.tensor(node)
        if type(value) is not nn.Parameter or type(value.data) is not Tensor or id(value) not in self.names:
            return f"it is not a plain parameter of the model but a {type(value).__name__}"
        if self.names[id(value)] > 1:
            return "it is tied: the model has it under more than one name"
        if self.uses[id(value)] > 1:
            return "it is used more than once"
        if not value.is_contiguous():
            return "it is not contiguous"
        return None


def fuse_storage(parameters: Sequence[nn.Parameter], moved: list[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parameters, which become views of it; the old storages are released.

    Parameters that already lie one after the other in one storage, as after an earlier compilation of the same model,
    are taken as they are. The others are added to `moved`.
    """
    existing = _adjacent(parameters)
    if existing is not None:
        return existing
    with torch.no_grad():
        fused = torch.cat([parameter.detach() for parameter in parameters])
    row = 0
    for parameter in parameters:
        rows = parameter.shape[0]
        parameter.data = fused[row : row + rows]
        row += rows
    moved.extend(parameters)
    return fused


def give_back_storage(parameters: Sequence[nn.Parameter]) -> None:
    """Undoes `fuse_storage`: each parameter has a storage of its own again."""
    for parameter in parameters:
        parameter.data = parameter.data.clone()


def _adjacent(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    first = parameters[0]
    expected = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != expected or parameter.untyped_storage().data_ptr() != storage:
            return None
        expected += parameter.numel() * parameter.element_size()
    rows = sum(parameter.shape[0] for parameter in parameters)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


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
