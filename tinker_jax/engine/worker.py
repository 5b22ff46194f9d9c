"""The engine's thread: requests of a client in order, other clients unhindered, training and sampling in turns.

A second thread waits for the device, so that the first packs and dispatches the next training step meanwhile.
"""

from __future__ import annotations

import collections
import itertools
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from tinker_jax.training.pending import Pending, Retracted
from tinker_jax.types.errors import RequestFailedError, StateError, TinkerError

logger = logging.getLogger("tinker_jax")

# A loop over `sample` submits a burst; the first of it should not set out alone on a batch of one. A pause ends the burst,
# and a stream without a pause does not hold it back for longer than anyone would notice.
_GATHER_SECONDS = 0.002
_GATHER_MOST_SECONDS = 0.05

MOST_UNREAD = 4
"""Training steps dispatched and not yet read: two rounds of forward_backward and optim_step. Each holds on to the values
before it, so that it can be undone. (What they may have on the device is counted in tokens, see `training.whole_model`.)"""


@dataclass
class Detour:
    """Returned by a request that has work for another thread: files, or the caller's own code.

    Attributes:
        outside: runs on a thread of its own while the request's lane waits and other lanes go on.
        inside: runs on the worker with its result, and returns what a request may return; None: that is the request's result.
        callers: `outside` is the caller's code. Its errors reach the caller unchanged, and `close` does not wait for it.
    """

    outside: Callable[[], Any]
    inside: Callable[[Any], Any] | None = None
    callers: bool = False


@dataclass(eq=False)
class _Request:
    number: int  # its place in the order of submission
    lane: Hashable
    run: Callable[[], Any]
    future: Future[Any]
    handed_over: bool = False
    before: Hashable = None  # another lane, whose later requests wait for this one
    overlaps: bool = False  # may start while its lane has requests unread
    started: bool = False  # its future runs: the rest of a detour, or a second attempt
    alone: bool = False  # a second attempt: starts when nothing is unread, and is read at once
    work: Generator[None, None, Any] | None = None  # the rest of a request that has had its first turn
    pending: Pending[Any] | None = None
    detour: Detour | None = None
    outside: threading.Thread | None = None  # runs the detour


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

    A request may be a generator: it yields where it can wait, and goes on in turn with other requests under way and with the
    background. While both have work, the background and the requests under way get the device for equal times.

    Args:
        name: of the thread.
        start: runs first, on the thread; when it raises, every request fails with that error and the thread ends.
        background: does a slice of work and says whether more is left; called between requests while it says so.
        context: entered on the thread around everything.
        stop: runs last, on the thread, unless `start` failed; sees to the requests that were handed over.
        recover: gets the error of a request, and whether it was a second attempt; runs on the thread. Returns None when the
            request, which must have changed nothing, shall run again, else the error to report.
        clock: seconds, by which turns are equal.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], None],
        background: Callable[[], bool],
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        stop: Callable[[], None] = lambda: None,
        recover: Callable[[BaseException, bool], BaseException | None] = lambda error, again: error,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pid = os.getpid()
        self._wake = threading.Condition()
        self._numbers = itertools.count()
        self._inbox: collections.deque[_Request] = collections.deque()  # not yet in their lanes
        self._lanes: dict[Hashable, collections.deque[_Request]] = {}  # what waits, in order
        self._held: dict[Hashable, _Request] = {}  # lanes that wait for a detour
        self._under_way: collections.deque[_Request] = collections.deque()  # generators, the next one first
        self._unread: collections.deque[_Request] = collections.deque()  # dispatched, in order
        self._unreadable: BaseException | None = None  # why the first of these failed; the reader waits until it is seen to
        self._busy = False
        self._asked: float | None = None  # since when the background has work, or is about to be given some
        self._lead = 0.0  # seconds that the background has had more than the requests under way, while it had work
        self._closing = False
        self._ended = False
        self._start, self._background, self._context, self._stop = start, background, context, stop
        self._recover, self._clock = recover, clock
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
            run: returns the result, a `Detour`, a `Pending` of one of these, or a generator that does.
            before: another lane, whose requests from now on wait until this one is done.
            overlaps: start while earlier requests of the lane are still unread. Every other request waits until they are
                read, so that it never sees the values of a step that failed.

        Returns:
            A future that `run`'s result, or its error, resolves. Cancelling it before it runs removes the request.
        """
        return self._enqueue(_Request(next(self._numbers), lane, run, Future(), before=before, overlaps=overlaps))

    def hand_over(self, lane: Hashable, run: Callable[[Future[Any]], None]) -> Future[Any]:
        """Queues a request that the background work resolves: `run` gets the future and must see to it."""
        future: Future[Any] = Future()
        return self._enqueue(_Request(next(self._numbers), lane, lambda: run(future), future, handed_over=True))

    def others_wait(self) -> bool:
        """Is there anything else to do than to go on with the request under way? That may ask from any thread."""
        if self._busy or len(self._under_way) > 1 or self._unreadable or self._closing:
            return True
        with self._wake:
            return self._next() is not None

    def _enqueue(self, request: _Request) -> Future[Any]:
        if os.getpid() != self._pid:
            raise StateError(
                "this process was forked from the one that runs the engine, and its thread did not come along; "
                "start the process with multiprocessing's 'spawn' method."
            )
        with self._wake:
            if self._failure is None:
                if self._closing:
                    raise StateError("the engine is closed.")
                self._inbox.append(request)
                if request.handed_over and self._asked is None:
                    self._asked = self._clock()
                self._wake.notify_all()
                return request.future
        request.future.set_exception(self._failure)
        return request.future

    def close(self, timeout: float = 30.0) -> bool:
        """Finishes what is running, cancels the queued requests and ends the threads. Idempotent.

        A request under way ends with an error at its next pause, one whose caller's code is still running at once: nobody
        would be there to take the result. The threads are waited for, `timeout` seconds: one that runs a program or frees
        arrays when the interpreter ends takes the process down.

        Returns:
            Whether all threads have ended.
        """
        if os.getpid() != self._pid:
            return True  # a forked child has no thread to end, and its copy of the lock may be held for ever
        deadline = time.monotonic() + timeout
        with self._wake:
            self._closing = True
            queued = self._take_queue()
            held = list(self._held.values())
            self._wake.notify_all()
        for request in queued:
            _close(request)
        for request in held:
            if request.detour and request.detour.callers:
                _resolve(request.future.set_exception, _closed_while("the caller's own loss ran"))
        current = threading.current_thread()
        if current in (self._thread, self._reader):
            return False
        threads = [self._thread, *(request.outside for request in held if request.outside not in (None, current))]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _take_queue(self) -> list[_Request]:
        """Everything that waits, in order; it is in no queue afterwards."""
        waiting = [request for lane, queue in self._lanes.items() for request in queue if request.lane == lane]
        waiting += self._inbox
        self._lanes, self._inbox = {}, collections.deque()
        return sorted(waiting, key=lambda request: request.number)

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
            pending = self._take_queue()
        for request in pending:
            if request.future.set_running_or_notify_cancel():
                _resolve(request.future.set_exception, failure)

    def _serve(self) -> None:
        gather_until = 0.0
        while True:
            with self._wake:
                while (request := self._pop()) is None and not (
                    self._busy or self._under_way or self._closing or self._unreadable
                ):
                    self._wake.wait()
                if request is None and not (self._closing or self._unreadable) and time.monotonic() < gather_until:
                    if not self._wake.wait(_GATHER_SECONDS):
                        gather_until = 0.0
                    continue
                if self._closing:
                    break
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
            sampled = self._busy
            self._turn()
            if sampled and not self._busy and self._under_way and self._lead <= 0:
                # Whoever got the last samples may ask for the next at once: not a whole turn later.
                gather_until = time.monotonic() + _GATHER_SECONDS
        for request in self._under_way:
            self._interrupt(request)
            _close(request)
        self._under_way.clear()

    def _turn(self) -> None:
        """One turn of the background or of a request under way: while both have work, of the one that had less time."""
        start, shared = self._clock(), bool(self._under_way)
        if self._busy and (not shared or self._lead <= 0):
            try:
                self._busy = self._background()
            except BaseException:
                logger.exception("background work failed")
                self._busy = False
            self._lead = self._lead + self._clock() - start if shared else 0.0
            if not self._busy:
                self._asked = None
        elif shared:
            self._under_way.rotate(-1)
            self._advance(self._under_way[-1])
            asked = self._asked
            self._lead = 0.0 if asked is None else self._lead - (self._clock() - max(start, asked))

    # ---- the queue; with the lock ----

    def _next(self) -> _Request | None:
        """The oldest request that may start now. Looks at the first of each lane alone."""
        while self._inbox:  # a client's finalizer, which the garbage collector may run here, appends to it and to no lane
            request = self._inbox.popleft()
            self._lanes.setdefault(request.lane, collections.deque()).append(request)
            if request.before is not None:
                self._lanes.setdefault(request.before, collections.deque()).append(request)
        blocked = {request.lane for request in self._under_way} | set(self._held)
        first: list[_Request] = []
        for lane, queue in list(self._lanes.items()):
            while queue and queue[0].lane != lane and queue[0].future.done():
                queue.popleft()  # of another lane, whose end was to be waited for
            if not queue:
                del self._lanes[lane]
            elif queue[0].lane == lane and lane not in blocked:
                first.append(queue[0])
        again = [request for request in first if request.alone]
        if again:  # before all others, or they would never let it start
            return None if self._unread or self._under_way else min(again, key=lambda request: request.number)
        return min(filter(self._may_start, first), key=lambda request: request.number, default=None)

    def _pop(self) -> _Request | None:
        """Takes the oldest request that may start now; None while a failed read is to be seen to."""
        request = None if self._unreadable else self._next()
        if request is not None:
            self._lanes[request.lane].popleft()
        return request

    def _may_start(self, request: _Request) -> bool:
        unread = [other for other in self._unread if other.lane == request.lane]
        if request.overlaps:
            return len(self._unread) < MOST_UNREAD and all(other.overlaps for other in unread)
        return not unread

    def _put_back(self, requests: list[_Request]) -> None:
        """Queues requests of one lane that have started before everything else of the lane."""
        with self._wake:
            closing = self._closing
            if not closing and requests:
                self._lanes.setdefault(requests[0].lane, collections.deque()).extendleft(reversed(requests))
                self._wake.notify_all()
        if closing:
            for request in requests:
                _close(request)

    # ---- running ----

    def _run(self, request: _Request) -> None:
        # What is handed over stays pending, so that it can be cancelled until its last token.
        starts = not request.started and (request.future.cancelled() or not request.handed_over)
        if starts and not request.future.set_running_or_notify_cancel():
            return
        request.started = not request.handed_over
        result, error = _attempt(request.run)
        if not isinstance(result, Generator):
            self._took(request, result, error)
            return
        request.work = result
        self._under_way.append(request)
        while request.alone and request.work:
            self._advance(request)

    def _advance(self, request: _Request) -> None:
        """Goes on with a request under way until its next pause or its end."""
        assert request.work is not None
        work = request.work

        def go_on() -> tuple[bool, Any]:
            try:
                return False, next(work)
            except StopIteration as end:
                return True, end.value

        turn, error = _attempt(go_on)
        ended, result = turn or (True, None)
        if ended:
            self._interrupt(request)
            self._under_way.remove(request)
            self._took(request, result, error)

    def _interrupt(self, request: _Request) -> None:
        """Ends a request under way, or one that has come to its end. Its lane has changed nothing."""
        if request.work is not None:
            request.work.close()
            request.work = None

    def _took(self, request: _Request, result: Any, error: BaseException | None) -> None:
        """Sees to what a request returned or raised."""
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
        failure = error.error if isinstance(error, Retracted) else self._recover(error, request.alone)
        if failure is None or unsure:
            request.alone = True
            self._put_back([request])
        else:
            _resolve(request.future.set_exception, _typed(failure, "the request"))

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
        # First: a later request of the lane must not end before it.
        if isinstance(result, Detour):
            self._detour(request, result)
        else:
            _resolve(*((request.future.set_result, result) if error is None else (request.future.set_exception, error)))
        with self._wake:
            self._unread.popleft()
            self._wake.notify_all()
        return True

    def _take_back(self) -> None:
        """Undoes the request whose work failed on the device, with what its lane built on it, and runs that again."""
        with self._wake:
            error, self._unreadable = self._unreadable, None
            failed = self._unread[0]
            undone = [request for request in (*self._unread, *self._under_way) if request.lane == failed.lane]
            for left in (self._unread, self._under_way):
                kept = [request for request in left if request.lane != failed.lane]
                left.clear()
                left.extend(kept)
            self._wake.notify_all()
        assert failed.pending is not None and error is not None
        failed.pending.undo()
        for request in undone:
            self._interrupt(request)
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
        def attempt() -> tuple[Any, BaseException | None]:
            if not detour.callers:
                value, error = _attempt(detour.outside)
                return value, None if error is None else _typed(error, "the request")
            try:
                return detour.outside(), None
            except BaseException as error:
                return None, error

        def outside() -> None:
            value, error = attempt()
            rest = []
            if error is not None:
                _resolve(request.future.set_exception, error)
            elif detour.inside is None:
                _resolve(request.future.set_result, value)
            else:
                rest = [_Request(request.number, request.lane, partial(detour.inside, value), request.future, started=True)]
            self._put_back(rest)
            with self._wake:
                del self._held[request.lane]
                self._wake.notify_all()

        with self._wake:
            closing = self._closing
            request.detour = detour
            self._held[request.lane] = request
        if closing and detour.callers:
            _resolve(request.future.set_exception, _closed_while("the caller's own loss ran"))
        elif closing:
            outside()
        else:
            name = "tinker_jax-custom-loss" if detour.callers else "tinker_jax-storage"
            request.outside = threading.Thread(target=outside, name=name, daemon=True)
            request.outside.start()
