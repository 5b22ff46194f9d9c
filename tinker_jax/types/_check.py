"""Checks of single values. Each returns the value in its declared Python type or raises `BadRequestError`
naming the field, what was expected and what was got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

from tinker_jax.types._arrays import as_numpy, widened
from tinker_jax.types._show import show
from tinker_jax.types.errors import BadRequestError

T = TypeVar("T")


def refuse(field: str, expected: str, got: object) -> BadRequestError:
    """The error for a value that is not what `field` expects."""
    return BadRequestError(f"{field}: expected {expected}, got {show(got)}")


def number(value: Any, field: str) -> Any:
    """A real number of Python's types: the value itself, or what a NumPy scalar or an array without axes holds. None for
    anything else; truth values and text are no numbers."""
    array = widened(np.asarray(value)) if isinstance(value, np.generic) else as_numpy(value, field)
    if array is not None:
        return array.item() if array.ndim == 0 and array.dtype.kind in "iuf" else None
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    return value if isinstance(value, Real) and not isinstance(value, bool) else None


def integer(value: Any, field: str, *, minimum: int | None = None, maximum: int | None = None, bits: int = 63) -> int:
    """An int from `minimum` to `maximum` and below 2**`bits`, from any whole number (an integral float too, as in the SDK)."""
    bounds = " and ".join(f"{sign} {bound}" for sign, bound in ((">=", minimum), ("<=", maximum)) if bound is not None)
    expected = f"an integer {bounds}".rstrip()
    found = number(value, field)
    if isinstance(found, (float, np.floating)) and found.is_integer():
        found = int(found)
    if not isinstance(found, Integral):
        raise refuse(field, expected, value)
    found = int(found)
    if found >= 2**bits:
        raise refuse(field, f"an integer below 2**{bits}" if maximum is None else expected, value)
    if found < (-(2**63) if minimum is None else minimum) or (maximum is not None and found > maximum):
        raise refuse(field, expected, value)
    return found


def seed(value: Any, field: str) -> int:
    """An int of 64 bits, signed or not."""
    return integer(value, field, bits=64)


def real(
    value: Any,
    field: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> float:
    """A finite float within the bounds, from any real number: `minimum` and `maximum` belong to the range, `above` and `below`
    do not."""
    bounds = [(">=", minimum), (">", above), ("<=", maximum), ("<", below)]
    expected = " and ".join([*(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)])
    expected = f"a finite number {expected}".rstrip()
    found = number(value, field)
    try:
        found = math.nan if found is None else float(found)
    except OverflowError:  # an integer beyond the range of floats
        found = math.nan
    within = (
        math.isfinite(found)
        and (minimum is None or found >= minimum)
        and (above is None or found > above)
        and (maximum is None or found <= maximum)
        and (below is None or found < below)
    )
    if not within:
        raise refuse(field, expected, value)
    return found


def boolean(value: Any, field: str) -> bool:
    """True or False (Python or numpy)."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise refuse(field, "True or False", value)


def text(value: Any, field: str) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise refuse(field, "a non-empty string", value)
    return value


def name(value: Any, field: str) -> str:
    """A non-empty string that is short enough to be repeated in an error."""
    if len(text(value, field)) > 1000:
        raise refuse(field, "at most 1,000 characters", value)
    return value


def optional_text(value: Any, field: str) -> str | None:
    """A string or None."""
    if value is not None and not isinstance(value, str):
        raise refuse(field, "a string or None", value)
    return value


def one_of(value: T, options: Sequence[T], field: str) -> T:
    """One of `options`, which are strings, integers or None."""
    if not any(isinstance(value, type(option)) and not isinstance(value, bool) and value == option for option in options):
        raise refuse(field, "one of " + ", ".join(map(repr, options)) if len(options) > 1 else repr(options[0]), value)
    return value


def is_text(value: object) -> bool:
    """Whether `value` is text or bytes, which NumPy may read as numbers and Python as a sequence."""
    return isinstance(value, (str, bytes, bytearray, memoryview))


def is_list(value: object) -> bool:
    """Whether `value` is a list, a tuple or the like; text and bytes are not."""
    return isinstance(value, Sequence) and not is_text(value)
