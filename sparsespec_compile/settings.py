"""What classes of settings share: a misspelt name is answered with the names that there are."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from sparsespec_compile.errors import SparseSpecError

_Self = TypeVar("_Self", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses whose fields are given by name: `class Mine(Settings, error=MyError)`.

    Building one with values by position or with unknown names raises `error`, in place of Python's TypeError.
    """

    _error: ClassVar[type[SparseSpecError]]

    def __init_subclass__(cls, *, error: type[SparseSpecError]) -> None:
        cls._error = error

    def __new__(cls: type[_Self], *args: Any, **settings: Any) -> _Self:
        allowed = [field.name for field in fields(cls)]
        unknown = [name for name in settings if name not in allowed]
        if args or unknown:
            got = f"positional values {args}" if args else f"unknown setting(s) {', '.join(unknown)}"
            raise cls._error(f"{cls.__name__} got {got}. Allowed, by name: {', '.join(allowed)}.")
        return super().__new__(cls)
