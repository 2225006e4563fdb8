"""Parameters as views of one storage: which ones can be, making them so, and noticing when they no longer are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Held:
    """Where one tensor of the model was when the graph was compiled."""

    owner: nn.Module
    attribute: str
    path: str
    address: int
    dtype: torch.dtype

    def is_there(self) -> bool:
        value = getattr(self.owner, self.attribute, None)
        return isinstance(value, Tensor) and value.data_ptr() == self.address and value.dtype == self.dtype


class SharedParameters:
    """Remembers where the model's parameters and buffers were, so that a later move is noticed."""

    def __init__(self, model: nn.Module) -> None:
        self.held = [
            _Held(module, name, f"{path}.{name}" if path else name, value.data_ptr(), value.dtype)
            for path, module in model.named_modules()
            for name, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None
        ]

    def moved(self) -> str | None:
        """Path of the first parameter or buffer that is no longer where it was, None when all are."""
        return next((held.path for held in self.held if not held.is_there()), None)

    def require(self) -> None:
        """Raises StaleParametersError when a parameter was moved or replaced."""
        path = self.moved()
        if path is not None:
            raise StaleParametersError(
                f"{path} was moved or replaced since the model was compiled (model.to, half, load with assign=True), "
                "so the graph still computes with the old values. Allowed: changes in place, such as parameter.copy_() "
                "or load_state_dict. Call optimize(model) again."
            )
