"""The `_async` twins. Tinker 0.38 deprecates them: every plain method returns a future that can be awaited."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from tinker_jax.api.futures import APIFuture

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")


def warn(name: str, advice: str, stacklevel: int = 3) -> None:
    """The FutureWarning of a deprecated call."""
    warnings.warn(f"{name} is deprecated in the Tinker API: {advice}", FutureWarning, stacklevel=stacklevel)


def _rename(twin: Any, method: Any) -> None:
    twin.__name__, twin.__qualname__ = f"{method.__name__}_async", f"{method.__qualname__}_async"
    twin.__doc__ = f"Deprecated: `await` what `{method.__name__}` returns."


def future_twin(method: Callable[Concatenate[S, P], F]) -> Callable[Concatenate[S, P], Coroutine[Any, Any, F]]:
    """`method_async`, which awaits to what `method` returns: a future, to be awaited again, or a plain value."""
    name = method.__name__

    @functools.wraps(method)
    async def twin(self: S, *args: P.args, **kwargs: P.kwargs) -> F:
        warn(f"{name}_async()", f"call {name}()")
        return getattr(self, name)(*args, **kwargs)

    _rename(twin, method)
    return twin


def final_twin(
    method: Callable[Concatenate[S, P], APIFuture[T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """`method_async`, which awaits to the final result of `method`."""
    name = method.__name__

    @functools.wraps(method)
    async def twin(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        warn(f"{name}_async()", f"await {name}()")
        return await getattr(self, name)(*args, **kwargs)

    _rename(twin, method)
    return twin
