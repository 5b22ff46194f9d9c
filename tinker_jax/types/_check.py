"""Checks of single values. Each returns the value in its declared Python type or raises `BadRequestError`
naming the field, what was expected and what was got."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from tinker_jax.types.errors import BadRequestError

T = TypeVar("T")


def refuse(field: str, expected: str, got: object) -> BadRequestError:
    """The error for a value that is not what `field` expects."""
    return BadRequestError(f"{field}: expected {expected}, got {_show(got)}")


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 80 else type(value).__name__


def integer(value: Any, field: str, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """An int from `minimum` to `maximum`, from any whole number (Python or numpy, never bool)."""
    bounds = " and ".join(f"{sign} {bound}" for sign, bound in ((">=", minimum), ("<=", maximum)) if bound is not None)
    expected = f"an integer {bounds}".rstrip()
    if isinstance(value, bool):
        raise refuse(field, expected, value)
    try:
        number = operator.index(int(value) if _is_whole_float(value) else value)
    except TypeError:
        raise refuse(field, expected, value) from None
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise refuse(field, expected, value)
    return number


def _is_whole_float(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and value.is_integer()


def real(
    value: Any,
    field: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> float:
    """A finite float (any real number, never bool or text) within the bounds: `minimum` and `maximum` belong to the
    range, `above` and `below` do not."""
    bounds = [(">=", minimum), (">", above), ("<=", maximum), ("<", below)]
    expected = " and ".join([*(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)])
    expected = f"a finite number {expected}".rstrip()
    if isinstance(value, (bool, str, bytes)):
        raise refuse(field, expected, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the last for integers beyond float64
        raise refuse(field, expected, value) from None
    within = (
        math.isfinite(number)
        and (minimum is None or number >= minimum)
        and (above is None or number > above)
        and (maximum is None or number <= maximum)
        and (below is None or number < below)
    )
    if not within:
        raise refuse(field, expected, value)
    return number


def boolean(value: Any, field: str) -> bool:
    """True or False (Python or numpy)."""
    if type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise refuse(field, "True or False", value)


def text(value: Any, field: str) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise refuse(field, "a non-empty string", value)
    return value


def one_of(value: T, options: Sequence[T], field: str) -> T:
    """One of `options`."""
    if value not in options:
        raise refuse(field, "one of " + ", ".join(map(repr, options)) if len(options) > 1 else repr(options[0]), value)
    return value
