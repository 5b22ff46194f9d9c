"""Futures of the API: one handle for blocking code, for `await`, and for `concurrent.futures`.

The engine resolves `concurrent.futures.Future` objects on its own thread; everything here is a view of one of them, so a
result can be read any number of times, from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from tinker_jax.types._check import real
from tinker_jax.types._show import brief
from tinker_jax.types.errors import APITimeoutError, StateError

T = TypeVar("T")

_ENGINE_THREADS = "tinker_jax-engine"  # how the engine names its worker threads


class APIFuture(ABC, Generic[T]):
    """The result of a call, now or later."""

    @abstractmethod
    def result(self, timeout: float | None = None) -> T:
        """Waits and gives the result, or raises the call's error.

        Raises:
            APITimeoutError: `timeout` seconds passed (also a TimeoutError). The call goes on; ask again later.
            StateError: called from a done-callback (which runs on the engine's thread) for a result that is not there
                yet: waiting would stop the very thread that makes it.
        """

    @abstractmethod
    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, without blocking the event loop. Cancelling the awaiting task cancels a call not yet begun."""

    @abstractmethod
    def future(self) -> Future[T]:
        """The call as a `concurrent.futures.Future`, for `wait`, `as_completed`, `add_done_callback`.

        Cancelling it takes the call out of the queue; a call that has begun cannot be cancelled.
        """

    async def coroutine(self) -> T:
        """The call as a coroutine, for `asyncio.create_task` and the like."""
        return await self.result_async()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    if not TYPE_CHECKING:  # a type checker should see that the attribute is missing

        def __getattr__(self, name: str) -> Any:
            hint = "" if name.startswith("_") else "; this is a future: call .result() or await it, and ask the result"
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)


def _check_timeout(timeout: Any) -> float | None:
    return None if timeout is None else min(real(timeout, "timeout"), threading.TIMEOUT_MAX)


def _late(timeout: float | None) -> APITimeoutError:
    return APITimeoutError(f"no result within {timeout} seconds; the call goes on, ask again later")


def _wait(future: Future[T], timeout: float | None) -> T:
    timeout = _check_timeout(timeout)
    if not future.done() and threading.current_thread().name.startswith(_ENGINE_THREADS):
        raise StateError("result() on the engine's own thread would never return; await it, or wait on another thread")
    try:
        return Future.result(future, timeout)
    except TimeoutError:
        if future.done():  # the call's own error
            raise
    raise _late(timeout)


async def _wait_async(future: Future[T], timeout: float | None) -> T:
    timeout = _check_timeout(timeout)
    if not future.done():
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by the time the call finishes
                loop.call_soon_threadsafe(lambda: waiter.done() or waiter.set_result(None))

        future.add_done_callback(wake)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except asyncio.CancelledError:
            future.cancel()
            raise
        except TimeoutError:
            raise _late(timeout) from None
    if future.cancelled():
        raise asyncio.CancelledError
    return future.result()


class AwaitableConcurrentFuture(APIFuture[T]):
    """An `APIFuture` over a `concurrent.futures.Future`."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> T:
        return _wait(self._future, timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        return await _wait_async(self._future, timeout)

    def future(self) -> Future[T]:
        return self._future

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {describe(self._future)}>"


class Derived(Future[T]):
    """`fn(*results)` of other futures, computed on the thread that finishes the last of them.

    Fails with the first error among the sources, the main one (the last) before others. Cancelling it cancels the main
    source; where that one has begun already, it is not cancelled.
    """

    def __init__(self, fn: Callable[..., T], *sources: Future[Any]) -> None:
        super().__init__()
        self._fn: Callable[..., T] | None = fn
        self._sources = sources
        self._left = len(sources)
        self._left_lock = threading.Lock()
        for source in sources:
            source.add_done_callback(self._source_done)

    def cancel(self) -> bool:
        sources = self._sources
        if sources and not sources[-1].cancel():
            return False
        return super().cancel()

    def _source_done(self, _: Future[Any]) -> None:
        with self._left_lock:
            self._left -= 1
            if self._left:
                return
        sources, fn = self._sources, cast("Callable[..., T]", self._fn)
        self._sources, self._fn = (), None  # what they hold on to may be freed now
        if any(source.cancelled() for source in sources):
            super().cancel()
        if not self.set_running_or_notify_cancel():
            return
        try:
            error = next((e for source in reversed(sources) if (e := source.exception()) is not None), None)
            if error is not None:
                raise error
            value = fn(*(source.result() for source in sources))
        except BaseException as failure:
            self.set_exception(failure)
        else:
            self.set_result(value)


class DerivedAPIFuture(Derived[T], APIFuture[T]):
    """A `Derived` that is an `APIFuture` too: what `sample` gives, which older scripts use as a plain `Future`."""

    def result(self, timeout: float | None = None) -> T:
        return _wait(self, timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        return await _wait_async(self, timeout)

    def future(self) -> Future[T]:
        return self


def describe(future: Future[Any]) -> str:
    """State of a future in a word, or its result or error."""
    if not future.done():
        return "pending"
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    return brief(future.result(), 400) if error is None else f"failed: {brief(error, 400)}"
