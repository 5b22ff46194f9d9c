"""How values appear in errors and representations: short, whatever they are."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Collection
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlong = _REPR.maxstring = _REPR.maxother = 1000


def brief(value: object, most: int = 80) -> str:
    """`repr(value)`, with what goes beyond `most` characters cut off."""
    try:
        text = _REPR.repr(value)
    except Exception:  # an integer of thousands of digits
        return "…"
    return text if len(text) <= most else text[: most - 1] + "…"


def show(value: object) -> str:
    """Type and value, for the end of an error."""
    return f"{type(value).__name__} {brief(value)}"


def listing(values: Collection[Any], one: Callable[[Any], str] = repr, most: int = 8) -> str:
    """The first `most` of `values` in brackets, and how many there are where that is not all: `[1, 2, … 1,024 in all]`."""
    shown = [one(value) for value in itertools.islice(values, most)]
    if len(values) > most:
        shown.append(f"… {len(values):,} in all")
    return f"[{', '.join(shown)}]"
