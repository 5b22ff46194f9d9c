"""Objects of the `tinker` package in place of ours.

The SDK's types carry the same names and fields, so an object of theirs is rebuilt as ours attribute by attribute.
Nothing is imported from the SDK; any class with the right name and fields will do.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from tinker_jax.types.errors import BadRequestError

T = TypeVar("T")


def looks_like(cls: type, value: object) -> bool:
    """Whether `value` is a `cls`, or an instance of a foreign class (or a subclass of one) of the same name."""
    return isinstance(value, cls) or any(base.__name__ == cls.__name__ for base in type(value).__mro__)


def coerce(cls: type[T], value: Any, what: str) -> T:
    """`value` as an instance of the dataclass `cls`: itself, or rebuilt from a foreign object of the same name.

    Args:
        cls: one of our dataclasses. Its `_from_foreign(value)` is used where it has one.
        value: the candidate.
        what: how an error names the value, such as `"data[3]"`.

    Raises:
        BadRequestError: `value` is something else, or lacks a field, or a field is out of range.
    """
    if isinstance(value, cls):
        return value
    if not looks_like(cls, value):
        raise BadRequestError(f"{what}: expected {cls.__name__}, got {type(value).__name__}")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [field.name for field in fields if field.init and not field.name.startswith("_")]
    missing = [name for name in names if not hasattr(value, name)]
    if missing:
        raise BadRequestError(f"{what}: this {cls.__name__} has no attribute {missing[0]!r}")
    rebuild = getattr(cls, "_from_foreign", None)
    return cls(**{name: getattr(value, name) for name in names}) if rebuild is None else rebuild(value)
