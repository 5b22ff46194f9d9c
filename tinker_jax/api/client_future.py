"""Client factories return a future that is also the client: `.result()` and `await` give the client, and using it
directly works as well, by waiting."""

from __future__ import annotations

import functools
import inspect
from concurrent.futures import Future
from typing import Any, TypeVar

from tinker_jax.api.deprecation import warn
from tinker_jax.api.futures import APIFuture, AwaitableConcurrentFuture, describe

C = TypeVar("C")


class BackcompatClientFuture(APIFuture[C]):
    """The future half. A subclass also inherits the client's class, whose `__init__` never runs: every public method of
    it is forwarded to the real client, and so is every public attribute."""

    def __init__(self, future: Future[C]) -> None:
        self._future = AwaitableConcurrentFuture(future)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if issubclass(base, APIFuture) or base is object:
                continue
            for name, method in vars(base).items():
                if not name.startswith("_") and inspect.isfunction(method):
                    setattr(cls, name, _forward(name, method))

    def result(self, timeout: float | None = None) -> C:
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> C:
        return await self._future.result_async(timeout)

    def future(self) -> Future[C]:
        return self._future.future()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {describe(self.future())}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warn(f"reading .{name} from a client's future", "take the client from .result(), or await it, first")
        return getattr(self.result(), name)


def _forward(name: str, method: Any) -> Any:
    advice = "take the client from .result(), or await it, first"
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def forward_async(self: BackcompatClientFuture[Any], *args: Any, **kwargs: Any) -> Any:
            warn(f"calling {name}() on a client's future", advice)
            return await getattr(await self.result_async(), name)(*args, **kwargs)

        return forward_async

    @functools.wraps(method)
    def forward(self: BackcompatClientFuture[Any], *args: Any, **kwargs: Any) -> Any:
        warn(f"calling {name}() on a client's future", advice)
        return getattr(self.result(), name)(*args, **kwargs)

    return forward
