"""Jitted functions that can be compiled ahead on other threads, and say when they compile."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax

logger = logging.getLogger("tinker_jax")

_CACHE_BYTES = 4 << 30
_CACHED_SECONDS = 0.1  # programs that compile faster are not worth a file; JAX's own limit of a second leaves most of ours out


def keep_compiled(home: str | os.PathLike[str]) -> None:
    """Keeps what compiles for longer than a moment in `home/programs`, for the processes to come.

    At most 4 GiB are kept; what was not used for longest goes first. JAX's own settings go first: `JAX_COMPILATION_CACHE_DIR`
    names another place, `JAX_ENABLE_COMPILATION_CACHE=false` none, `JAX_COMPILATION_CACHE_MAX_SIZE` another limit.
    """
    config: Any = jax.config  # its options are attributes that no type checker sees
    if config.jax_compilation_cache_dir is None and config.jax_enable_compilation_cache:
        # Not `compiled`, which older versions used without a limit: JAX refuses to write to such a folder under one.
        config.update("jax_compilation_cache_dir", os.path.join(home, "programs"))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_SECONDS)
        if config.jax_compilation_cache_max_size == -1:
            config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


class Program:
    """`jax.jit` of a pure function. Each new combination of shapes is compiled once, logged with its seconds, and counted.

    Threads may share one: whoever needs a variant that another thread compiles waits for it.

    Args:
        fn: pure function over pytrees.
        name: for the log.
        static: names of arguments that are compile-time constants (passed by keyword).
        donate: positions of arguments whose buffers the program may reuse.
    """

    def __init__(self, fn: Callable[..., Any], name: str, *, static: Sequence[str] = (), donate: Sequence[int] = ()) -> None:
        self._jit = jax.jit(fn, static_argnames=tuple(static), donate_argnums=tuple(donate))
        self._compiled: dict[Any, Future[None]] = {}
        self._lock = threading.Lock()
        self.name = name

    def __call__(self, *args: Any, shape: str, **static: Any) -> Any:
        """Runs the program, compiled before or now.

        Args:
            *args: array arguments.
            shape: names the combination of shapes; equal strings must mean equal shapes.
            **static: compile-time constants.
        """
        compiled = self._compiled.get(_key(shape, static))
        if compiled is None or not compiled.done() or compiled.exception() is not None:
            self._compile_here(args, shape, static)
        return self._jit(*args, **static)

    def prepare(self, *args: Any, shape: str, **static: Any) -> Future[None]:
        """Compiles on another thread, unless that has been done or begun.

        Args:
            *args: as the program will get them, or `jax.ShapeDtypeStruct`s.
            shape: as in a call.
            **static: as in a call.

        Returns:
            Done when the program is compiled; an error of the compiler is raised by the call that needs the program.
        """
        new, future = self._claim(_key(shape, static))
        if new:
            abstract = jax.tree.map(_abstract, args)
            _compilers.submit(self._compile, future, abstract, shape, static, precision())
        return future

    def shapes(self, *args: Any, **static: Any) -> Any:
        """What a call would return, as `jax.ShapeDtypeStruct`s."""
        return self._jit.eval_shape(*args, **static)

    def is_ready(self, shape: str, **static: Any) -> bool:
        """Would a call with these shapes run at once?"""
        compiled = self._compiled.get(_key(shape, static))
        return compiled is not None and compiled.done() and compiled.exception() is None

    @property
    def count(self) -> int:
        """Number of compiled variants."""
        return len(self._compiled)

    def _compile_here(self, args: Any, shape: str, static: dict[str, Any]) -> None:
        new, future = self._claim(_key(shape, static))
        if new:
            self._compile(future, args, shape, static, precision())
        try:
            future.result()
        except BaseException:
            with self._lock:
                self._compiled.pop(_key(shape, static), None)  # the next call tries again
            raise

    def _claim(self, key: Any) -> tuple[bool, Future[None]]:
        """Whether the caller is to compile, and the future to resolve or to wait for."""
        with self._lock:
            future = self._compiled.get(key)
            new = future is None or (future.done() and future.exception() is not None)
            if new or future is None:
                future = self._compiled[key] = Future()
            return new, future

    def _compile(self, future: Future[None], args: Any, shape: str, static: dict[str, Any], precision: Any) -> None:
        what = " ".join(filter(None, (self.name, shape)))
        try:
            with _announced(what), jax.default_matmul_precision(precision):
                # What it returns is not used: the jitted function finds it again when it is called.
                start = time.perf_counter()
                self._jit.lower(*args, **static).compile()
            logger.info("compiled %s in %.2f s", what, time.perf_counter() - start)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)


class DaemonThreads:
    """As `ThreadPoolExecutor`, for whose threads the interpreter waits until everything queued is done.

    Args:
        most: threads.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name, self._threads = most, name, list[threading.Thread]()
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Has it called on one of the threads; a future of what it returns."""
        future: Future[Any] = Future()
        self._queue.put((partial(call, *args), future))
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name=f"{self._name} {len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def end(self, deadline: float) -> bool:
        """Drops what is queued and waits for what runs; were all done by then (`time.monotonic`)?"""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (given := self._next()) is not None:
            call, future = given
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del given, call, future

    def _next(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with contextlib.suppress(queue.Empty):
            return self._queue.get_nowait()
        self._idle.release()
        return self._queue.get()


_compilers = DaemonThreads(max(2, os.cpu_count() or 1), "tinker_jax-compiler")
end_compilers = _compilers.end
_announcements: list[str] = []
_announcing = threading.Lock()


def _abstract(x: Any) -> Any:
    """What an argument tells a compiler, without its memory."""
    if not isinstance(x, jax.Array):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None, weak_type=x.weak_type)


def _key(shape: str, static: dict[str, Any]) -> Any:
    return shape, tuple(sorted(static.items()))


def precision() -> Any:
    """The precision of matrix products on this thread. A program belongs to the one under which it is called."""
    config: Any = jax.config
    return config.jax_default_matmul_precision


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """On a terminal a line says what is being compiled, as long as it is."""
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        yield
        return
    try:
        with _announcing:
            _announcements.append(what)
            _show()
        yield
    finally:
        with _announcing:
            _announcements.remove(what)
            _show()


def _show() -> None:
    text = f"compiling {', '.join(_announcements)}" if _announcements else ""
    sys.stderr.write(f"\r\x1b[2K{text[:120]}")
    sys.stderr.flush()
