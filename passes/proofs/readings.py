"""Values that Python code reads, as data that can be compared later.

A frozen value is a plain value itself, a `Place` for a tensor, `Same` for an object of which only the identity counts,
or a `Group` of named frozen values. Code that reads values with equal frozen forms computes the same. Functions are
compared by their code and by the variables that it names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..capture.quantised import inner_tensors, is_wrapper

PLAIN: frozenset[type] = frozenset(
    {bool, int, float, complex, str, bytes, range, slice, CodeType, type(None), type(Ellipsis)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
)
"""Types of values that are compared as they are."""

LIBRARIES = frozenset({"torch", "transformers", "peft", "accelerate", "numpy"})
"""Packages of whose global variables only plain values and the code of functions are compared."""

MOST_ITEMS = 4096
"""Containers with more items are compared by identity and length."""

_DEPTH = 12
"""Steps from a value to what it holds; of what is further away only the identity counts."""


class Place(NamedTuple):
    """Where a tensor's values are. Changes in place reach the graph, which reads the same memory."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class Same:
    """An object of which only the identity counts."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Group(NamedTuple):
    """Named frozen values.

    Attributes:
        kind: what the values belong to.
        names: of the values.
        values: frozen, in the order of the names.
    """

    kind: object
    names: tuple[Hashable, ...]
    values: tuple[Any, ...]


class Difference(NamedTuple):
    """A difference between two frozen values: its place, and both values there, `ABSENT` for a missing one."""

    where: str
    before: object
    after: object


class _Absent:
    """The type of `ABSENT`."""


ABSENT = _Absent()


class Freezer:
    """Freezes values. An instance is for one point in time: it reads each object once and remembers the result.

    Args:
        reads: whether the attribute of an object that has this name counts.
        identities: objects of which only the identity counts.
    """

    def __init__(self, reads: Callable[[str], bool], identities: Iterable[object] = ()) -> None:
        self._reads = reads
        self._known: dict[int, Group | Same] = {id(value): Same(value) for value in identities}

    def freeze(self, value: object, depth: int = _DEPTH) -> Any:
        """The frozen form of any value."""
        kind = type(value)
        if kind in PLAIN:
            return value
        known = self._known.get(id(value))
        if known is not None:
            return known
        if isinstance(value, Tensor):
            return place(value)
        if depth == 0 or isinstance(value, type):
            return Same(value)
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            return self._container(value, depth - 1)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return Group(kind, ("shape", "dtype", "bytes"), (value.shape, str(value.dtype), value.tobytes()))
        self._known[id(value)] = Group(Same(value), (), ())  # for objects that contain themselves
        frozen = self._known[id(value)] = self._object(value, depth - 1)
        return frozen

    def _container(self, value: Any, depth: int) -> Group:
        kind = type(value)
        if len(value) > MOST_ITEMS:
            return Group(kind, ("identity", "length"), (Same(value), len(value)))
        if isinstance(value, dict):
            names = tuple(key if type(key) in PLAIN else Same(key) for key in value)
            return Group(kind, names, tuple(self.freeze(item, depth) for item in value.values()))
        if isinstance(value, (set, frozenset)):
            return Group(kind, ("items",), (frozenset(item if type(item) in PLAIN else Same(item) for item in value),))
        return Group(kind, tuple(range(len(value))), tuple(self.freeze(item, depth) for item in value))

    def _object(self, value: Any, depth: int) -> Group:
        if isinstance(value, FunctionType):
            read = {name: self.freeze(item, depth) for name, item in variables(value)}
            return Group("function", ("code", *read), (value.__code__, *read.values()))
        if isinstance(value, MethodType):
            return Group(
                "method",
                ("function", "object"),
                (self.freeze(value.__func__, depth), self.freeze(value.__self__, depth)),
            )
        if isinstance(value, partial):
            parts = (value.func, value.args, value.keywords)
            return Group("partial", ("function", "args", "keywords"), tuple(self.freeze(part, depth) for part in parts))
        kind = type(value) if isinstance(value, PreTrainedConfig) else Same(value)
        held = {name: item for name, item in getattr(value, "__dict__", {}).items() if self._reads(name)}
        if isinstance(value, nn.Module):
            held |= {name: vars(value)[name] for name in ("_parameters", "_buffers", "_modules")}
        return Group(kind, tuple(held), tuple(self.freeze(item, depth) for item in held.values()))


def variables(function: FunctionType) -> Iterator[tuple[str, object]]:
    """Names and values of the variables that a function's code can read besides its arguments."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, _contents(cell)
    for number, default in enumerate(function.__defaults__ or ()):
        yield f"default {number}", default
    yield from (function.__kwdefaults__ or {}).items()
    if package(function) != "torch":
        yield from _globals(function)


def _globals(function: FunctionType) -> Iterator[tuple[str, object]]:
    library = package(function) in LIBRARIES
    for name in global_names(function.__code__):
        value = function.__globals__.get(name)
        if type(value) in PLAIN:
            yield name, value
        elif isinstance(value, FunctionType) and (library or package(value) in LIBRARIES):
            yield name, value.__code__
        elif not library and not isinstance(value, (type, ModuleType)):
            yield name, value


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return None


def package(function: FunctionType) -> str:
    """The top-level package that a function is defined in."""
    return str(function.__globals__.get("__name__")).partition(".")[0]


@lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """Names of globals and attributes in some code, that of functions within it included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(global_names(constant)))
    return tuple(names)


def attribute_names(values: Iterable[object], depth: int = 2) -> frozenset[str]:
    """Names of the attributes that functions may read: those in their code, also in strings, as `getattr` takes them.

    Args:
        values: functions, methods, partials, properties and objects that can be called; whatever else is passed over.
        depth: how many calls deep the functions that they name are followed.
    """
    found: set[str] = set()
    seen: set[tuple[int, int]] = set()
    pending = [(value, depth) for value in values]
    while pending:
        value, left = pending.pop()
        function = underlying(value)
        if function is None or (id(function), left) in seen:
            continue
        seen.add((id(function), left))
        found.update(_names(function.__code__))
        pending.extend((_contents(cell), left) for cell in function.__closure__ or ())
        if left > 0 and package(function) != "torch":
            named = (function.__globals__.get(name) for name in global_names(function.__code__))
            pending.extend((value, left - 1) for value in named if isinstance(value, FunctionType))
    return frozenset(found)


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return found


def underlying(value: object) -> FunctionType | None:
    """The Python function behind a method, partial, property or object that can be called; None when there is none."""
    if isinstance(value, FunctionType):
        return value
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return underlying(value.__func__)
    if isinstance(value, partial):
        return underlying(value.func)
    if isinstance(value, property):
        return underlying(value.fget)
    if isinstance(value, type):
        return None
    name = "forward" if isinstance(value, nn.Module) else "__call__"
    call = inspect.getattr_static(type(value), name, None)
    return call if isinstance(call, FunctionType) else None


def place(tensor: Tensor) -> Place | Group:
    """Where a tensor's values are, and how they lie there; of a quantised one, where those of its parts are."""
    if is_wrapper(tensor):
        names, values = zip(*inner_tensors(tensor), strict=True)
        return Group(type(tensor), names, tuple(map(place, values)))
    return Place(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def difference(before: object, after: object, where: str) -> Difference | None:
    """The first difference between two frozen values of what is called `where`; None when there is none.

    The order of names does not count.
    """
    if before == after:
        return None
    if not (isinstance(before, Group) and isinstance(after, Group) and before.kind == after.kind):
        return Difference(where, before, after)
    old, new = dict(zip(before.names, before.values, strict=True)), dict(zip(after.names, after.values, strict=True))
    differences = (
        difference(old.get(name, ABSENT), new.get(name, ABSENT), _label(where, before.kind, name))
        for name in dict.fromkeys((*old, *new))
    )
    return next((found for found in differences if found is not None), None)


def _label(where: str, kind: object, name: Hashable) -> str:
    if isinstance(kind, type) and issubclass(kind, (list, tuple, dict)):
        return f"{where}[{name!r}]"
    return f"{where}.{name}" if where else str(name)


def describe(frozen: object) -> str:
    """A frozen value in an error's text."""
    if frozen is ABSENT:
        return "absent"
    if isinstance(frozen, Same):
        return f"a {type(frozen.value).__name__}"
    if isinstance(frozen, type):
        return f"{frozen.__module__}.{frozen.__qualname__}"
    if isinstance(frozen, CodeType):
        return f"{frozen.co_name} ({frozen.co_filename.rpartition('/')[2]}:{frozen.co_firstlineno})"
    if isinstance(frozen, Place):
        return f"a tensor {tuple(frozen.shape)} of {frozen.dtype}"
    if not isinstance(frozen, Group):
        return f"{frozen!r:.80}"
    if isinstance(frozen.kind, type):
        return f"a {frozen.kind.__name__} of {len(frozen.values)}: " + ", ".join(map(describe, frozen.values[:8]))
    return describe(frozen.values[0] if isinstance(frozen.kind, str) else frozen.kind)
