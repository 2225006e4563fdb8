"""Attention temperatures that follow a token's place (Llama-4's layers without rotary positions).

Such a layer multiplies its queries by a number that rises in steps of thousands of tokens. It counts tokens from the
length of its cache on, not by `position_ids`: packed rows would be counted from 0, and no experiment on a few of them
would notice. A twin's layer is handed a cache whose length puts every row at its position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PositionError

_CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the cache that a layer's attention is given, newer versions first."""

_positions: ContextVar[Tensor] = ContextVar("sparsespec_positions")


@contextmanager
def standing_at(positions: Tensor) -> Iterator[None]:
    """Within it, rows of a model that `count_positions` has changed stand at `positions` [1, T]."""
    token = _positions.set(positions)
    try:
        yield
    finally:
        _positions.reset(token)


def count_positions(twin: nn.Module) -> None:
    """Makes the layers of a twin that follow a token's place take it from `standing_at`.

    Raises:
        PositionError: such a layer takes no cache to count from.
    """
    for path, module in twin.named_modules():
        if vars(module).get("attn_temperature_tuning") and not vars(module).get("use_rope"):
            accepted = inspect.signature(type(module).forward).parameters
            name = next((one for one in _CACHE_NAMES if one in accepted), None)
            if name is None:
                raise PositionError(
                    f"{path} scales its queries by the place of their tokens (attn_temperature_tuning), and takes no "
                    f"cache to count places from. Allowed: layers whose forward takes {' or '.join(_CACHE_NAMES)}. Use "
                    "another transformers version, or set config.attn_temperature_tuning = False before the model is "
                    "built, which changes the texts that are longer than config.floor_scale tokens."
                )
            module.forward = _Placed(module.forward, name)


class _Placed:
    """Takes the place of an attention layer's `forward`."""

    def __init__(self, forward: Callable[..., Any], cache: str) -> None:
        self.forward, self.cache = forward, cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **{**kwargs, self.cache: _EmptyCache(_positions.get())})


class _EmptyCache:
    """A cache that holds nothing, before rows at `positions` [1, T]."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def get_seq_length(self, *_: object) -> Tensor:
        """How far each row [T] stands behind the place that its number says."""
        places = self.positions[0]
        return places - torch.arange(places.shape[0], device=places.device)

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Nothing is added to the step's own keys and values."""
        return keys, values
