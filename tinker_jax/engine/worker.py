"""The engine's one thread: requests of a client in order, other clients unhindered, sampling in the gaps."""

from __future__ import annotations

import collections
import logging
import os
import threading
import traceback
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tinker_jax.types.errors import RequestFailedError, TinkerError

logger = logging.getLogger("tinker_jax")

# A loop over `sample` submits a burst; the first of it should not set out alone on a batch of one.
_GATHER_SECONDS = 0.002


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


def _resolve(outcome: Callable[[Any], None], value: Any) -> None:
    """Calls a future's `set_result` or `set_exception`; whatever its owner did meanwhile, the thread goes on."""
    try:
        outcome(value)
    except InvalidStateError:
        pass  # cancelled, or failed by `close`
    except BaseException:  # a callback's SystemExit or KeyboardInterrupt; the futures log every other error themselves
        logger.exception("a callback of a request's future raised")


def _cancel(future: Future[Any]) -> None:
    """Cancels, and tells `concurrent.futures.wait`, which would wait for a bare `cancel` for ever."""
    if future.cancel():
        _resolve(lambda f: f.set_running_or_notify_cancel(), future)


def _closed_under_way() -> RequestFailedError:
    return RequestFailedError("the engine was closed while the caller's own loss ran.", category="user")


class Worker:
    """Runs requests on one daemon thread.

    Args:
        name: of the thread.
        start: runs first, on the thread; when it raises, every request fails with that error and the thread ends.
        background: does a slice of work and says whether more is left; called between requests while it says so.
        context: entered on the thread around everything.
        stop: runs last, on the thread, unless `start` failed; sees to the requests that were handed over.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], None],
        background: Callable[[], bool],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._pid = os.getpid()
        self._wake = threading.Condition()
        self._queue: collections.deque[_Request] = collections.deque()
        self._held: dict[Hashable, _Request] = {}  # lanes that wait for their caller's code
        self._busy = False
        self._closing = False
        self._start, self._background, self._context, self._stop = start, background, context, stop
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
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process was forked from the one that runs the engine, and its thread did not come along; "
                "start the process with multiprocessing's 'spawn' method."
            )
        with self._wake:
            if self._failure is None:
                if self._closing:
                    raise RuntimeError("the engine is closed.")
                self._queue.append(request)
                self._wake.notify()
                return request.future
        request.future.set_exception(self._failure)
        return request.future

    def close(self, timeout: float | None = 30.0) -> None:
        """Finishes the running request, cancels the queued ones and ends the thread. Idempotent.

        A request whose caller's code is still running fails at once: nobody would be there to take the result.
        """
        if os.getpid() != self._pid:
            return  # a forked child has no thread to end, and its copy of the lock may be held for ever
        with self._wake:
            self._closing = True
            pending, self._queue = list(self._queue), collections.deque()
            held, self._held = list(self._held.values()), {}
            self._wake.notify()
        for request in pending:
            _cancel(request.future)
        for request in held:
            _resolve(request.future.set_exception, _closed_under_way())
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _main(self) -> None:
        with self._context():
            try:
                self._start()
            except BaseException as error:
                # The frames of the traceback hold what was loaded so far, which a second attempt will need the room of.
                traceback.clear_frames(error.__traceback__)
                self._fail(_typed(error, "loading the model"))
                return
            self._serve()
            self._stop()

    def _fail(self, failure: BaseException) -> None:
        with self._wake:
            self._failure = failure
            pending, self._queue = list(self._queue), collections.deque()
        for request in pending:
            _resolve(request.future.set_exception, failure)

    def _serve(self) -> None:
        gather = False
        while True:
            with self._wake:
                while (request := self._pop()) is None and not self._busy and not self._closing:
                    self._wake.wait()
                if request is None and gather and not self._closing:
                    gather = self._wake.wait(_GATHER_SECONDS)
                    continue
                if self._closing:
                    return
            if request is not None:
                self._run(request)
                if request.handed_over:  # admit everything that waits before the next slice
                    gather, self._busy = gather or not self._busy, True
                    continue
            if self._busy:
                try:
                    self._busy = self._background()
                except BaseException:
                    logger.exception("background work failed")
                    self._busy = False

    def _pop(self) -> _Request | None:
        """The oldest request whose lane is not held."""
        # By index: the garbage collector may run a client's finalizer here, which appends to the queue.
        for i in range(len(self._queue)):
            request = self._queue[i]
            if request.lane not in self._held:
                del self._queue[i]
                return request
        return None

    def _run(self, request: _Request) -> None:
        # What is handed over stays pending, so that it can be cancelled until its last token.
        starts = request.future.cancelled() or not request.handed_over
        if starts and not request.future.set_running_or_notify_cancel():
            return
        try:
            result = request.run()
        except BaseException as error:
            _resolve(request.future.set_exception, _typed(error, "the request"))
            return
        if isinstance(result, Detour):
            self._detour(request, result)
        elif not request.handed_over:
            _resolve(request.future.set_result, result)

    def _detour(self, request: _Request, detour: Detour) -> None:
        with self._wake:
            closing = self._closing
            self._held[request.lane] = request
        if closing:
            _resolve(request.future.set_exception, _closed_under_way())
            return

        def outside() -> None:
            try:
                value = detour.outside()
            except BaseException as error:  # the caller's own error reaches the caller unchanged
                _resolve(request.future.set_exception, error)
                self._release(request.lane)
            else:
                self._release(request.lane, _Request(request.lane, lambda: self._settle(request, detour, value), Future()))

        threading.Thread(target=outside, name="tinker_jax-custom-loss", daemon=True).start()

    @staticmethod
    def _settle(request: _Request, detour: Detour, value: Any) -> None:
        try:
            result = detour.inside(value)
        except BaseException as error:
            _resolve(request.future.set_exception, _typed(error, "the request"))
        else:
            _resolve(request.future.set_result, result)

    def _release(self, lane: Hashable, first: _Request | None = None) -> None:
        """Lets a held lane go on, with `first` before everything else of that lane."""
        with self._wake:
            self._held.pop(lane, None)
            if first is not None and not self._closing:
                self._queue.appendleft(first)
            self._wake.notify()
