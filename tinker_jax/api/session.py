"""What the clients of one `ServiceClient` share: names, storage, what is pending, and when it all ends."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tinker_jax.engine.config import EngineConfig
from tinker_jax.types.errors import StateError, TinkerError

if TYPE_CHECKING:
    from tinker_jax.checkpoints.store import Store
    from tinker_jax.engine.engine import Engine

T = TypeVar("T")
logger = logging.getLogger("tinker_jax")

CloseStatus = Literal["success", "errored", "interrupted"]

_live: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()


def find(session_id: str) -> Session | None:
    """The session of that id if this process holds it."""
    return _live.get(session_id)


class Session:
    """One `ServiceClient`'s life.

    Args:
        config: engine and storage of every client of the session.
        user_metadata, display_name: told by `RestClient.get_session` while the process lives.

    Attributes:
        id: unique across processes, since it is part of run ids and so of `tinker://` paths.
        samplers: sampling clients alive, by sampler id.
    """

    def __init__(
        self, config: EngineConfig, user_metadata: Mapping[str, str] | None = None, display_name: str | None = None
    ) -> None:
        self.id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        self.config = config
        self.user_metadata = None if user_metadata is None else dict(user_metadata)
        self.display_name = display_name
        self.samplers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._models, self._sampler_numbers = itertools.count(), itertools.count()
        self._pending: set[Future[Any]] = set()
        self._finalizers: list[weakref.finalize] = []
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._closing: Future[None] | None = None
        self._store: Store | None = None
        _live[self.id] = self

    @property
    def store(self) -> Store:
        """The checkpoint store of the configured home."""
        with self._lock:
            if self._store is None:
                from tinker_jax.checkpoints.store import Store

                self._store = Store(self.config.home)
            return self._store

    def engine(self, base_model: str, client: str) -> Engine:
        """The engine of a base model for a new client; it loads on its own thread. The session keeps it until its own end."""
        from tinker_jax.engine.engine import get_engine

        engine = get_engine(base_model, self.config, self.id, client)
        with self._lock:
            if engine not in self._engines:
                self._engines.add(engine)
                self._adopt(weakref.finalize(self, engine.leave, self.id))
        return engine

    def next_model_id(self) -> str:
        """Names a training client; also the id of its run."""
        return f"{self.id}:train:{next(self._models)}"

    def next_sampler_id(self) -> str:
        """Names a sampling client."""
        return f"{self.id}:sample:{next(self._sampler_numbers)}"

    @property
    def state(self) -> Literal["open", "closed"]:
        """Whether calls are taken."""
        return "open" if self._closing is None else "closed"

    def require_open(self) -> None:
        """StateError once the service client is closed."""
        if self._closing is not None:
            raise StateError("ServiceClient is closed; make another one")

    def track(self, future: Future[T], owner: object) -> Future[T]:
        """Keeps `owner`, whose end frees what the engine holds for it, alive until a call of its is done."""
        keep = [owner]

        def done(_: Future[T]) -> None:
            keep.clear()
            with self._lock:
                self._pending.discard(future)

        with self._lock:
            self._pending.add(future)
        future.add_done_callback(done)
        return future

    def adopt(self, client: object, release: Callable[[str], None], name: str) -> None:
        """Frees what the engine holds under `name` when the client is dropped or the session closes."""
        self._adopt(weakref.finalize(client, release, name))

    def _adopt(self, finalizer: weakref.finalize) -> None:
        finalizer.atexit = False  # the engine frees everything at exit
        with self._lock:
            self._finalizers = [f for f in self._finalizers if f.alive]
            self._finalizers.append(finalizer)
            closed = self._closing is not None
        if closed:
            finalizer()
            self.require_open()

    def give_up(self, client: Future[Any], release: Callable[[str], None], name: str) -> None:
        """Frees what the engine holds under `name` if a client that is being made is cancelled or cannot be made."""

        def done(made: Future[Any]) -> None:
            if made.cancelled() or made.exception() is not None:
                release(name)

        client.add_done_callback(done)

    def touch(self, run_id: str) -> None:
        """Notes that a run was used. Training does not fail because this could not be written."""
        try:
            self.store.touch_run(run_id)
        except TinkerError as error:
            logger.debug("could not note the use of run %s: %s", run_id, error)

    def close(self, status: CloseStatus) -> Future[None]:
        """Refuses new calls, lets pending ones end (cancels those not begun unless `status` is `"success"`), then frees
        the clients' device memory. Idempotent."""
        with self._lock:
            if self._closing is not None:
                return self._closing
            closing = self._closing = Future()
            closing.set_running_or_notify_cancel()
            pending, left = list(self._pending), len(self._pending)

        def release() -> None:
            for finalizer in self._finalizers:
                finalizer()
            closing.set_result(None)

        def one_done(_: Future[Any]) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                last = left == 0
            if last:
                release()

        if not pending:
            release()
        for future in pending:
            future.add_done_callback(one_done)
            if status != "success":
                future.cancel()
        return closing
