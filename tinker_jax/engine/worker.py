"""The engine's thread: requests of a client in order, other clients unhindered, sampling in the gaps.

A second thread waits for the device, so that the first packs and dispatches the next training step meanwhile.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tinker_jax.training.pending import Pending
from tinker_jax.types.errors import RequestFailedError, TinkerError

logger = logging.getLogger("tinker_jax")

# A loop over `sample` submits a burst; the first of it should not set out alone on a batch of one. A pause ends the burst,
# and a stream without a pause does not hold it back for longer than anyone would notice.
_GATHER_SECONDS = 0.002
_GATHER_MOST_SECONDS = 0.05

MOST_UNREAD = 4
"""Training steps dispatched and not yet read: two rounds of forward_backward and optim_step. Each holds on to the values
before it, so that it can be undone."""


@dataclass
class Detour:
    """Returned by a request that needs the caller's own code in between.

    `outside` runs on a thread of its own while the request's lane waits and other lanes go on; then `inside` runs on the
    worker with its result, and its result is the request's.
    """

    outside: Callable[[], Any]
    inside: Callable[[Any], Any]


@dataclass(eq=False)
class _Request:
    lane: Hashable
    run: Callable[[], Any]
    future: Future[Any]
    handed_over: bool = False
    before: Hashable = None  # another lane, whose later requests wait for this one
    overlaps: bool = False  # may start while its lane has requests unread
    started: bool = False  # its future runs: the rest of a detour, or a second attempt
    alone: bool = False  # a second attempt: starts when nothing is unread, and is read at once
    pending: Pending[Any] | None = None
    outside: threading.Thread | None = None  # runs the caller's code


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


def _closed_while(what: str) -> RequestFailedError:
    return RequestFailedError(f"the engine was closed while {what}.", category="user")


def _close(request: _Request) -> None:
    if request.started:
        _resolve(request.future.set_exception, _closed_while("the request was under way"))
    else:
        _cancel(request.future)


def _attempt(work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Its result, or its error without frames: they hold arrays, a second attempt needs the room, and callers keep errors."""
    try:
        return work(), None
    except BaseException as error:
        if not isinstance(error, TinkerError):
            error.add_note(traceback.format_exc())
        at: BaseException | None = error
        while at is not None:
            at.__traceback__, at = None, at.__cause__ or at.__context__
        return None, error


class Worker:
    """Runs requests on one daemon thread, and reads the results of training steps on another.

    Args:
        name: of the thread.
        start: runs first, on the thread; when it raises, every request fails with that error and the thread ends.
        background: does a slice of work and says whether more is left; called between requests while it says so.
        context: entered on the thread around everything.
        stop: runs last, on the thread, unless `start` failed; sees to the requests that were handed over.
        recover: gets the error of a request, and whether it was a second attempt; runs on the thread. Returns None when the
            request, which must have changed nothing, shall run again, else the error to report.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], None],
        background: Callable[[], bool],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        stop: Callable[[], None] = lambda: None,
        recover: Callable[[BaseException, bool], BaseException | None] = lambda error, again: error,
    ) -> None:
        self._pid = os.getpid()
        self._wake = threading.Condition()
        self._queue: collections.deque[_Request] = collections.deque()
        self._held: dict[Hashable, _Request] = {}  # lanes that wait for their caller's code
        self._unread: collections.deque[_Request] = collections.deque()  # dispatched, in order
        self._unreadable: BaseException | None = None  # why the first of these failed; the reader waits until it is seen to
        self._busy = False
        self._closing = False
        self._ended = False
        self._start, self._background, self._context, self._stop = start, background, context, stop
        self._recover = recover
        self._failure: BaseException | None = None
        self._reader = threading.Thread(target=self._read_on, name=f"{name} reader", daemon=True)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """Why the start failed, or None."""
        return self._failure

    def submit(self, lane: Hashable, run: Callable[[], Any], *, before: Hashable = None, overlaps: bool = False) -> Future[Any]:
        """Queues a request; those of one lane run in the order of their submission.

        Args:
            lane: whose order it keeps.
            run: returns the result, a `Detour`, or, with `overlaps`, a `Pending`.
            before: another lane, whose requests from now on wait until this one is done.
            overlaps: start while earlier requests of the lane are still unread. Every other request waits until they are
                read, so that it never sees the values of a step that failed.

        Returns:
            A future that `run`'s result, or its error, resolves. Cancelling it before it runs removes the request.
        """
        return self._enqueue(_Request(lane, run, Future(), before=before, overlaps=overlaps))

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
                self._wake.notify_all()
                return request.future
        request.future.set_exception(self._failure)
        return request.future

    def close(self, timeout: float | None = 30.0) -> None:
        """Finishes what is running, cancels the queued requests and ends the threads. Idempotent.

        A request whose caller's code is still running fails at once: nobody would be there to take the result. Each thread is
        waited for, `timeout` seconds: one that runs a program or frees arrays when the interpreter ends takes the process down.
        """
        if os.getpid() != self._pid:
            return  # a forked child has no thread to end, and its copy of the lock may be held for ever
        with self._wake:
            self._closing = True
            queued, self._queue = list(self._queue), collections.deque()
            held = list(self._held.values())
            self._wake.notify_all()
        for request in queued:
            _close(request)
        for request in held:
            _resolve(request.future.set_exception, _closed_while("the caller's own loss ran"))
        current = threading.current_thread()
        if current not in (self._thread, self._reader):
            self._thread.join(timeout)
            for request in held:
                if request.outside is not None and request.outside is not current:
                    request.outside.join(timeout)

    def _main(self) -> None:
        with self._context():
            _, error = _attempt(self._start)
            if error is not None:
                return self._fail(_typed(error, "loading the model"))
            self._reader.start()
            self._serve()
            self._read_the_rest()
            self._reader.join()
            self._stop()

    def _fail(self, failure: BaseException) -> None:
        with self._wake:
            self._failure = failure
            pending, self._queue = list(self._queue), collections.deque()
        for request in pending:
            if request.future.set_running_or_notify_cancel():
                _resolve(request.future.set_exception, failure)

    def _serve(self) -> None:
        gather_until = 0.0
        while True:
            with self._wake:
                while (request := self._pop()) is None and not (self._busy or self._closing or self._unreadable):
                    self._wake.wait()
                if request is None and not (self._closing or self._unreadable) and time.monotonic() < gather_until:
                    if not self._wake.wait(_GATHER_SECONDS):
                        gather_until = 0.0
                    continue
                if self._closing:
                    return
            if request is None and self._unreadable:  # a request that was taken out of the queue runs first
                self._take_back()
                continue
            if request is not None:
                self._run(request)
                if request.handed_over:  # admit everything that waits before the next slice
                    if not self._busy:
                        gather_until = time.monotonic() + _GATHER_MOST_SECONDS
                    self._busy = True
                    continue
            if self._busy:
                try:
                    self._busy = self._background()
                except BaseException:
                    logger.exception("background work failed")
                    self._busy = False

    def _pop(self) -> _Request | None:
        """The oldest request that may run now; None while a failed read is to be seen to."""
        if self._unreadable:
            return None
        waiting = set(self._held)
        # By index: the garbage collector may run a client's finalizer here, which appends to the queue.
        for i in range(len(self._queue)):
            request = self._queue[i]
            if request.alone and self._unread:
                return None  # or the others would never let it start
            if request.lane not in waiting and self._may_start(request):
                del self._queue[i]
                return request
            waiting |= {request.lane, request.before}
        return None

    def _may_start(self, request: _Request) -> bool:
        if request.overlaps:
            return len(self._unread) < MOST_UNREAD
        return all(unread.lane != request.lane for unread in self._unread)

    def _run(self, request: _Request) -> None:
        # What is handed over stays pending, so that it can be cancelled until its last token.
        starts = not request.started and (request.future.cancelled() or not request.handed_over)
        if starts and not request.future.set_running_or_notify_cancel():
            return
        request.started = not request.handed_over
        result, error = _attempt(request.run)
        if request.alone and isinstance(result, Pending):
            result, error = _attempt(result.finish)
        if error is not None:
            self._failed(request, error)
        elif isinstance(result, Pending):
            with self._wake:
                request.pending = result
                self._unread.append(request)
                self._wake.notify_all()
        elif isinstance(result, Detour):
            self._detour(request, result)
        elif not request.handed_over:
            _resolve(request.future.set_result, result)

    def _failed(self, request: _Request, error: BaseException) -> None:
        with self._wake:
            unsure = any(unread.lane == request.lane for unread in self._unread)  # it may be for these that it failed
        failure = self._recover(error, request.alone)
        if failure is None or unsure:
            request.alone = True
            self._put_back([request])
        else:
            _resolve(request.future.set_exception, _typed(failure, "the request"))

    def _put_back(self, requests: list[_Request]) -> None:
        """Queues requests that have started before everything else."""
        with self._wake:
            closing = self._closing
            if not closing:
                self._queue.extendleft(reversed(requests))
                self._wake.notify_all()
        if closing:
            for request in requests:
                _close(request)

    # ---- reading ----

    def _read_on(self) -> None:
        while self._read_next():
            pass

    def _read_next(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._ended or (self._unread and not self._unreadable))
            if self._ended:
                return False
            request = self._unread[0]
        assert request.pending is not None
        result, error = _attempt(request.pending.read)
        if error is not None and not isinstance(error, TinkerError):
            with self._wake:
                self._unreadable = error
                self._wake.notify_all()
            return True
        outcome = (request.future.set_result, result) if error is None else (request.future.set_exception, error)
        _resolve(*outcome)  # first: a later request of the lane must not end before it
        with self._wake:
            self._unread.popleft()
            self._wake.notify_all()
        return True

    def _take_back(self) -> None:
        """Undoes the request whose work failed on the device, with what its lane built on it, and runs that again."""
        with self._wake:
            error, self._unreadable = self._unreadable, None
            failed = self._unread[0]
            undone = [request for request in self._unread if request.lane == failed.lane]
            self._unread = collections.deque(request for request in self._unread if request.lane != failed.lane)
            self._wake.notify_all()
        assert failed.pending is not None and error is not None
        failed.pending.undo()
        for request in undone:
            request.pending, request.alone = None, request is not failed
        self._put_back(undone[1:])
        self._failed(failed, error)

    def _read_the_rest(self) -> None:
        """After `close`: lets the reader finish what was dispatched."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._unreadable or not self._unread)
                if not self._unread:
                    self._ended = True
                    self._wake.notify_all()
                    return
            self._take_back()

    # ---- detours ----

    def _detour(self, request: _Request, detour: Detour) -> None:
        def outside() -> None:
            try:
                value = detour.outside()
            except BaseException as error:  # the caller's own error reaches the caller unchanged
                _resolve(request.future.set_exception, error)
                rest = []
            else:
                rest = [_Request(request.lane, lambda: detour.inside(value), request.future, started=True)]
            self._put_back(rest)
            with self._wake:
                del self._held[request.lane]
                self._wake.notify_all()

        with self._wake:
            closing = self._closing
            self._held[request.lane] = request
        if closing:
            _resolve(request.future.set_exception, _closed_while("the caller's own loss ran"))
            return
        request.outside = threading.Thread(target=outside, name="tinker_jax-custom-loss", daemon=True)
        request.outside.start()
