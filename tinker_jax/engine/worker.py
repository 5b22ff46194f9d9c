"""The engine's one thread: requests of a client in order, other clients unhindered, sampling in the gaps."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tinker_jax.types.errors import RequestFailedError, TinkerError

logger = logging.getLogger("tinker_jax")


@dataclass
class Detour:
    """Returned by a request that needs the caller's own code in between.

    `outside` runs on a thread of its own while the request's lane waits and other lanes go on; then `inside` runs on the
    worker with its result, and its result is the request's.
    """

    outside: Callable[[], Any]
    inside: Callable[[Any], Any]


@dataclass
class _Request:
    lane: Hashable
    run: Callable[[], Any]
    future: Future[Any]
    handed_over: bool = False


def _typed(error: BaseException, what: str) -> BaseException:
    """Errors of ours and of the standard library's argument checks as they are; anything else names the request."""
    if isinstance(error, TinkerError):
        return error
    failure = RequestFailedError(f"{what} failed: {type(error).__name__}: {error}", category="server")
    failure.__cause__ = error
    return failure


def _fail(future: Future[Any], error: BaseException) -> None:
    """Fails a future; one that was handed over may be cancelled at any moment, which must not end the thread."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


class Worker:
    """Runs requests on one daemon thread.

    Args:
        name: of the thread.
        start: runs first, on the thread; when it raises, every request fails with that error.
        background: does a slice of work and says whether more is left; called between requests while it says so.
        context: entered on the thread around everything.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], None],
        background: Callable[[], bool],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._wake = threading.Condition()
        self._queue: collections.deque[_Request] = collections.deque()
        self._held: set[Hashable] = set()
        self._busy = False
        self._closing = False
        self._start, self._background, self._context = start, background, context
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """Why the start failed, or None."""
        return self._failure

    def submit(self, lane: Hashable, run: Callable[[], Any]) -> Future[Any]:
        """Queues a request; those of one lane run in the order of their submission.

        Returns:
            A future that `run`'s result, or its error, resolves. Cancelling it before it runs removes the request.
        """
        return self._enqueue(_Request(lane, run, Future()))

    def hand_over(self, lane: Hashable, run: Callable[[Future[Any]], None]) -> Future[Any]:
        """Queues a request that the background work resolves: `run` gets the future and must see to it."""
        future: Future[Any] = Future()
        return self._enqueue(_Request(lane, lambda: run(future), future, handed_over=True))

    def _enqueue(self, request: _Request) -> Future[Any]:
        with self._wake:
            if self._closing:
                raise RuntimeError("the engine is closed.")
            self._queue.append(request)
            self._wake.notify()
        return request.future

    def close(self, timeout: float | None = 30.0) -> None:
        """Finishes the running request, cancels the queued ones and ends the thread. Idempotent."""
        with self._wake:
            self._closing = True
            pending, self._queue = list(self._queue), collections.deque()
            self._wake.notify()
        for request in pending:
            request.future.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _main(self) -> None:
        with self._context():
            try:
                self._start()
            except BaseException as error:
                self._failure = _typed(error, "loading the model")
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._wake:
                while (request := self._pop()) is None and not self._busy and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
            if request is not None:
                self._run(request)
                if request.handed_over:  # admit everything that waits before the next slice
                    self._busy = True
                    continue
            if self._busy:
                self._busy = self._background()

    def _pop(self) -> _Request | None:
        """The oldest request whose lane is not held."""
        # A snapshot: the garbage collector may run a client's finalizer here, which appends to the queue.
        for i, request in enumerate(list(self._queue)):
            if request.lane not in self._held:
                del self._queue[i]
                return request
        return None

    def _run(self, request: _Request) -> None:
        if request.handed_over:
            if request.future.cancelled():
                return
        elif not request.future.set_running_or_notify_cancel():
            return
        if self._failure is not None:
            _fail(request.future, self._failure)
            return
        try:
            result = request.run()
        except BaseException as error:
            _fail(request.future, _typed(error, "the request"))
            return
        if isinstance(result, Detour):
            self._detour(request, result)
        elif not request.handed_over:
            request.future.set_result(result)

    def _detour(self, request: _Request, detour: Detour) -> None:
        self._held.add(request.lane)

        def outside() -> None:
            try:
                value = detour.outside()
            except BaseException as error:  # the caller's own error reaches the caller unchanged
                request.future.set_exception(error)
                self._release(request.lane)
            else:
                self._release(request.lane, _Request(request.lane, lambda: self._settle(request, detour, value), Future()))

        threading.Thread(target=outside, name="tinker_jax-custom-loss", daemon=True).start()

    @staticmethod
    def _settle(request: _Request, detour: Detour, value: Any) -> None:
        try:
            result = detour.inside(value)
        except BaseException as error:
            request.future.set_exception(_typed(error, "the request"))
        else:
            request.future.set_result(result)

    def _release(self, lane: Hashable, first: _Request | None = None) -> None:
        """Lets a held lane go on, with `first` before everything else of that lane."""
        with self._wake:
            self._held.discard(lane)
            if first is not None:
                self._queue.appendleft(first)
            self._wake.notify()
