"""Ways to look into a traced program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner programs (scan, jit, custom derivatives, …) once each."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def products(jaxpr: Any) -> list[int]:
    """Multiplications of every matrix product, in the order of the program."""
    sizes = []
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            sizes.append(math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted))
    return sizes
