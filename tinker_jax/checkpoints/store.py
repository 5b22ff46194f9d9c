"""Where checkpoints live and how they become visible.

Layout below the home directory (a path, or any URL that `etils.epath` opens):

    runs/<run id>/run.json                       the training run
    runs/<run id>/<kind>/<name>.json             pointer: makes a checkpoint visible
    runs/<run id>/<kind>/.data/<stamp>-<uuid>/   its data, never changed once written

A save writes a fresh data directory and then replaces the small pointer file in one atomic step, so a reader sees the
old checkpoint or the new one, never a mixture, and a process killed in between leaves the old one readable. Data that
no pointer names is an orphan; it is removed once it is too old to belong to a save still in progress. Data that a save with
`overwrite` replaced stays for readers that had found it, and is removed ten minutes later.

Nothing here imports jax, so listing checkpoints is cheap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath import backend as epath_backend

from tinker_jax.checkpoints.json_files import read_object, seal, unseal
from tinker_jax.checkpoints.records import (
    KINDS,
    CheckpointRecord,
    Kind,
    Pointer,
    RunRecord,
    check_metadata,
    check_name,
    check_ttl,
    is_name,
    is_run_id,
    parse_path,
    read_pointer,
    read_run,
    run_fields,
)
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, ConflictError, NotFoundError, StorageError, TinkerError

try:
    import fcntl
except ImportError:  # Windows has no flock; the lock within the process remains.
    fcntl = None

_log = logging.getLogger(__name__)

#: Data without a pointer is kept this long: a save by another process may still be writing it.
ORPHAN_AGE = timedelta(hours=24)
#: Data that `overwrite` replaced is kept this long: whoever found it before is reading it now. A read takes seconds, minutes
#: from an object store; a loop that overwrites at every step must not fill the disk.
SUPERSEDED_AGE = timedelta(minutes=10)
#: `touch_run` writes at most this often; readers in the same process see every touch.
TOUCH_INTERVAL = timedelta(seconds=30)

_DATA = ".data"
_STAMP = "%Y%m%dT%H%M%SZ"
_SCHEMES = ("gs", "s3", "az")
_LONGEST = 512  # of a name that similar ones are sought for
_REMEDY = "Remove it to go on without it."


def _now() -> datetime:
    return datetime.now(UTC)


@contextlib.contextmanager
def _storage(action: str, path: object) -> Iterator[None]:
    """Turns any OSError into a StorageError that names what was tried and where."""
    try:
        yield
    except TinkerError:
        raise
    except OSError as error:
        where = getattr(error, "filename", None) or path
        raise StorageError(f"cannot {action} {path}: {error.strerror or error} ({where}).") from error


class Store:
    """Runs and checkpoints below one home directory. Safe to use from several threads and processes.

    Args:
        home: a directory, or a URL (`gs://`, `s3://`, `az://`); default `$TINKER_JAX_HOME`, else `~/.tinker_jax`.

    Raises:
        BadRequestError: no path, or a URL of a scheme that is not supported.
    """

    def __init__(self, home: str | os.PathLike[str] | None = None) -> None:
        if home is not None and not isinstance(home, (str, os.PathLike)):
            raise BadRequestError(f"home: expected a directory or a URL, got {brief(home)}.")
        text = os.fspath(home) if home is not None else os.environ.get("TINKER_JAX_HOME") or "~/.tinker_jax"
        scheme, separator, _ = text.partition("://")
        if separator and scheme not in _SCHEMES:
            known = ", ".join(f"{s}://" for s in _SCHEMES)
            raise BadRequestError(f"storage {text!r}: scheme {scheme!r} is not supported; use a directory or {known}.")
        self._local = not separator
        self.home = epath.Path(Path(os.path.expanduser(text)).absolute() if self._local else text)
        self._lock = threading.RLock()
        self._touched: dict[str, datetime] = {}
        self._touch_written: dict[str, datetime] = {}
        self._swept = False

    # Runs

    def create_run(self, run: RunRecord) -> None:
        """Records a new run.

        Raises:
            BadRequestError: the run id is not allowed.
            ConflictError: the run id is taken.
            StorageError: the home directory cannot be written.
        """
        if not is_run_id(run.run_id):
            raise BadRequestError(f"run id {brief(run.run_id)} is not allowed; use letters, digits, '.', '_', ':' or '-'.")
        check_metadata(run.user_metadata)
        utc = {"created": run.created.astimezone(UTC), "last_request_time": run.last_request_time.astimezone(UTC)}
        directory = self._run_directory(run.run_id)
        with _storage("create run", directory), self._locked(run.run_id):
            if (directory / "run.json").exists():
                raise ConflictError(f"run {run.run_id!r} exists already in {self.home}.")
            self._replace(directory / "run.json", run_fields(dataclasses.replace(run, **utc)), scratch=directory)
        if self._local and not self._swept:
            # Runs of earlier processes never save again, so nobody else would clear what expired in them.
            self._swept = True
            for run_id in self._run_ids():
                self._collect(run_id)

    def get_run(self, run_id: str) -> RunRecord:
        """The record of a run.

        Raises:
            NotFoundError: no such run; names similar ones.
            StorageError: its record is damaged, or of a newer format.
        """
        run = self._read_run(run_id) if is_run_id(run_id) else None
        if run is None:
            raise self._no_run(run_id)
        return run

    def list_runs(self) -> list[RunRecord]:
        """All runs, newest first. Damaged records are logged and left out."""
        runs = [run for run in self._readable(self._read_run, self._run_ids()) if run is not None]
        return sorted(runs, key=lambda run: (run.created, run.run_id), reverse=True)

    def touch_run(self, run_id: str) -> None:
        """Notes that a run was used just now; written at most every 30 seconds.

        Raises:
            NotFoundError: no such run.
            StorageError: its record is damaged, or of a newer format.
        """
        now = _now()
        written = self._touch_written.get(run_id)
        if written is None or now - written >= TOUCH_INTERVAL:
            self._write_touch(run_id, now)
            self._touch_written[run_id] = now
        self._touched[run_id] = now

    def _write_touch(self, run_id: str, now: datetime) -> None:
        self.get_run(run_id)
        directory = self._run_directory(run_id)
        with _storage("update run", directory), self._locked(run_id):
            fields = self._read_record(directory / "run.json")
            if fields is None:
                raise NotFoundError(f"run {run_id!r} was removed meanwhile.")
            self._replace(directory / "run.json", {**fields, "last_request_time": now.isoformat()}, scratch=directory)

    # Checkpoints

    def write(
        self,
        run_id: str,
        kind: Kind,
        name: str,
        writer: Callable[[epath.Path], object],
        *,
        has_optimizer: bool,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> CheckpointRecord:
        """Saves a checkpoint: `writer` fills an empty directory, then the checkpoint appears at once.

        Args:
            run_id: an existing run.
            kind: `"weights"` or `"sampler_weights"`.
            name: see `check_name`.
            writer: called once with the fresh directory; what it raises leaves nothing visible.
            has_optimizer: whether the data holds optimiser state.
            overwrite: replace a checkpoint of this name; the old one stays readable until the new one is complete, and its
                data for ten minutes more, for whoever is reading it then.
            ttl_seconds: time to live from now, None for ever.
            user_metadata: free strings kept with the checkpoint.

        Raises:
            BadRequestError: name, kind, ttl or metadata not allowed.
            NotFoundError: no such run.
            ConflictError: the name is taken and `overwrite` is false.
            StorageError: the disk is full or cannot be written, or the record to replace is damaged.
        """
        check_name(name)
        check_ttl(ttl_seconds)
        metadata = check_metadata(user_metadata)
        if kind not in KINDS:
            raise BadRequestError(f"checkpoint kind {brief(kind)} is unknown; known kinds are {', '.join(KINDS)}.")
        run = self.get_run(run_id)
        if not overwrite:
            self._refuse_taken(run_id, kind, name)
        data_name = f"{_now().strftime(_STAMP)}-{uuid.uuid4().hex}"
        directory = self._data_directory(run_id, kind) / data_name
        path = f"tinker://{run_id}/{kind}/{name}"
        try:
            with _storage(f"write checkpoint {path} in", directory):
                directory.mkdir(parents=True, exist_ok=False)
                writer(directory)
                size = self._settle(directory)
            with _storage(f"write checkpoint {path} in", directory), self._locked(run_id):
                old = self._read_pointer(run_id, kind, name, expired=True)
                if not overwrite:
                    self._refuse_taken(run_id, kind, name)
                now = _now()
                fields = {
                    "path": path,
                    "data": data_name,
                    "superseded": [] if old is None else _superseded(old, now),
                    "time": now.isoformat(),
                    "size_bytes": size,
                    "expires_at": ttl_seconds and (now + timedelta(seconds=ttl_seconds)).isoformat(),
                    "user_metadata": metadata,
                    "base_model": run.base_model,
                    "lora_rank": run.lora_rank,
                    "train_mlp": run.train_mlp,
                    "train_attn": run.train_attn,
                    "train_unembed": run.train_unembed,
                    "has_optimizer": has_optimizer,
                }
                self._replace(self._pointer(run_id, kind, name), fields, scratch=directory.parent)
        except BaseException:
            _remove(directory)
            raise
        if old is not None and _expired(old):
            _remove(old.record.directory)
        self._collect(run_id)
        return self._parse_pointer(run_id, kind, name, fields).record

    def get(self, path: str, kinds: Sequence[str] = KINDS) -> CheckpointRecord:
        """The checkpoint at a `tinker://` path.

        Args:
            path: `tinker://<run id>/<kind>/<name>`.
            kinds: the kinds that the caller can use.

        Raises:
            BadRequestError: the path has another form, or is of another kind.
            NotFoundError: nothing there, or expired; names similar checkpoints.
            StorageError: its record is damaged, or of a newer format.
        """
        run_id, kind, name = parse_path(path)
        if kind not in kinds:
            hint = (
                " save_weights_for_sampler leaves the optimizer's state out; save_state keeps it."
                if kinds == ("weights",)
                else ""
            )
            raise BadRequestError(
                f"{path!r} is a checkpoint of kind {kind!r}; expected kind {' or '.join(map(repr, kinds))}.{hint}"
            )
        pointer = self._read_pointer(run_id, kind, name)
        if pointer is None:
            if not self._has_run(run_id):
                hint = f" Run {run_id!r} does not exist.{_suggest(run_id, self._run_ids())}"
            else:
                hint = _suggest(path, (record.path for record in self._records(run_id) if record.kind in kinds))
            raise NotFoundError(f"checkpoint {path!r} does not exist in {self.home}, or has expired.{hint}")
        return pointer.record

    def list_checkpoints(self, run_id: str | None = None) -> list[CheckpointRecord]:
        """Checkpoints of one run or of all, newest first. Damaged records are logged and left out; `get` says what is wrong.

        Raises:
            NotFoundError: no such run.
        """
        if run_id is not None and not self._has_run(run_id):
            raise self._no_run(run_id)
        run_ids = self._run_ids() if run_id is None else [run_id]
        records = [record for one in run_ids for record in self._records(one)]
        return sorted(records, key=lambda record: (record.time, record.path), reverse=True)

    def delete(self, path: str) -> None:
        """Removes a checkpoint and its data.

        Raises:
            BadRequestError, NotFoundError: as `get`.
            StorageError: it cannot be removed, or its record is damaged.
        """
        run_id, kind, name = parse_path(path)
        record = self.get(path)
        with _storage(f"delete checkpoint {path} in", record.directory), self._locked(run_id):
            pointer = self._read_pointer(run_id, kind, name, expired=True)
            self._pointer(run_id, kind, name).unlink(missing_ok=True)
        for data in [] if pointer is None else [pointer.data, *pointer.superseded]:
            _remove(self._data_directory(run_id, kind) / data)

    def set_ttl(self, path: str, ttl_seconds: int | None) -> CheckpointRecord:
        """Lets a checkpoint expire `ttl_seconds` from now, or never if None.

        Raises:
            BadRequestError: the path, or a ttl outside 1 hour … 10 years.
            NotFoundError: as `get`.
            StorageError: it cannot be written, or its record is damaged.
        """
        check_ttl(ttl_seconds)
        run_id, kind, name = parse_path(path)
        self.get(path)
        with _storage(f"update checkpoint {path} in", self._run_directory(run_id)), self._locked(run_id):
            pointer = self._read_pointer(run_id, kind, name)
            if pointer is None:
                raise NotFoundError(f"checkpoint {path!r} was removed meanwhile.")
            expires_at = ttl_seconds and (_now() + timedelta(seconds=ttl_seconds)).isoformat()
            fields = {**pointer.fields, "expires_at": expires_at}
            self._replace(self._pointer(run_id, kind, name), fields, scratch=self._data_directory(run_id, kind))
        return self._parse_pointer(run_id, kind, name, fields).record

    check_name = staticmethod(check_name)

    # Files

    def _run_directory(self, run_id: str) -> epath.Path:
        return self.home / "runs" / run_id

    def _data_directory(self, run_id: str, kind: str) -> epath.Path:
        return self._run_directory(run_id) / kind / _DATA

    def _pointer(self, run_id: str, kind: str, name: str) -> epath.Path:
        return self._run_directory(run_id) / kind / f"{name}.json"

    def _run_ids(self) -> list[str]:
        return [name for name in self._names(self.home / "runs") if is_run_id(name)]

    def _has_run(self, run_id: str) -> bool:
        """Whether there is a record of the run, damaged or not."""
        return is_run_id(run_id) and "run.json" in self._names(self._run_directory(run_id))

    def _no_run(self, run_id: str) -> NotFoundError:
        near = _suggest(str(run_id), self._run_ids())
        return NotFoundError(f"run {brief(run_id)} does not exist in {self.home}.{near}")

    def _names(self, directory: epath.Path) -> list[str]:
        """Names in a directory; none when it is absent, or is a file."""
        self._forget(directory)
        with _storage("list", directory):
            try:
                return sorted(child.name for child in directory.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _forget(self, path: epath.Path) -> None:
        """Drops fsspec's cached listings, which would hide what another process wrote."""
        if not self._local:
            epath_backend.fsspec_backend.fs(path).invalidate_cache()

    def _read_record(self, file: epath.Path) -> dict[str, Any] | None:
        """The fields of a record; None when there is no such file."""
        self._forget(file)
        with _storage("read", file), _naming(file):
            try:
                return unseal(file, read_object(file, _REMEDY))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _read_run(self, run_id: str) -> RunRecord | None:
        file = self._run_directory(run_id) / "run.json"
        fields = self._read_record(file)
        if fields is None:
            return None
        with _naming(file):
            run = read_run(run_id, fields)
        touched = self._touched.get(run_id)
        if touched is not None and touched > run.last_request_time:
            return dataclasses.replace(run, last_request_time=touched)
        return run

    def _read_pointer(self, run_id: str, kind: Kind, name: str, *, expired: bool = False) -> Pointer | None:
        fields = self._read_record(self._pointer(run_id, kind, name))
        if fields is None:
            return None
        pointer = self._parse_pointer(run_id, kind, name, fields)
        return None if _expired(pointer) and not expired else pointer

    def _parse_pointer(self, run_id: str, kind: Kind, name: str, fields: Mapping[str, Any]) -> Pointer:
        with _naming(self._pointer(run_id, kind, name)):
            return read_pointer(run_id, kind, name, self._data_directory(run_id, kind), fields)

    def _pointer_names(self, run_id: str, kind: Kind) -> list[str]:
        names = (
            name.removesuffix(".json") for name in self._names(self._run_directory(run_id) / kind) if name.endswith(".json")
        )
        return [name for name in names if is_name(name)]

    def _records(self, run_id: str) -> Iterator[CheckpointRecord]:
        def read(place: tuple[Kind, str]) -> Pointer | None:
            return self._read_pointer(run_id, *place)

        names = self._readable(lambda kind: [(kind, name) for name in self._pointer_names(run_id, kind)], KINDS)
        places = [place for of_kind in names for place in of_kind]
        return (pointer.record for pointer in self._readable(read, places) if pointer is not None)

    def _readable(self, read: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
        """One record that cannot be read must not hide the others; it is logged and left out."""
        for key in keys:
            try:
                yield read(key)
            except StorageError as error:
                _log.warning("%s", error)

    def _refuse_taken(self, run_id: str, kind: Kind, name: str) -> None:
        if self._read_pointer(run_id, kind, name) is not None:
            raise ConflictError(
                f"checkpoint 'tinker://{run_id}/{kind}/{name}' exists already; choose another name or pass overwrite=True."
            )

    @contextlib.contextmanager
    def _locked(self, run_id: str) -> Iterator[None]:
        """Serialises changes of pointers; between processes only on a local disk (object stores have no locks)."""
        with self._lock, contextlib.ExitStack() as stack:
            if self._local and fcntl is not None:
                directory = Path(self._run_directory(run_id))
                directory.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(directory / ".lock", "a"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _replace(self, file: epath.Path, fields: Mapping[str, Any], scratch: epath.Path) -> None:
        """Writes a record in one step: temporary file and rename on a disk, one put elsewhere."""
        text = json.dumps(seal(fields), indent=1)
        if not self._local:
            file.write_text(text)
            return
        temporary = Path(scratch) / f"{_now().strftime(_STAMP)}-{uuid.uuid4().hex}.json"
        try:
            with open(temporary, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, Path(file))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _fsync_directory(Path(file).parent)

    def _settle(self, directory: epath.Path) -> int:
        """Forces the data to the disk before a pointer names it; returns its size in bytes."""
        size = 0
        folders = [directory]
        for folder in folders:
            for child in folder.iterdir():
                if child.is_dir():
                    folders.append(child)
                    continue
                if not self._local:
                    size += child.stat().length
                    continue
                with open(Path(child), "rb") as file:
                    os.fsync(file.fileno())
                    size += os.fstat(file.fileno()).st_size
        if self._local:
            for folder in folders:
                _fsync_directory(Path(folder))
        return size

    def _collect(self, run_id: str) -> None:
        """Removes a run's expired checkpoints, superseded data and old orphans, as far as the storage allows."""
        with contextlib.suppress(OSError), self._locked(run_id):
            for kind in KINDS:
                self._collect_kind(run_id, kind)

    def _collect_kind(self, run_id: str, kind: Kind) -> None:
        live, gone, whole = set(), set(), True
        for name in self._pointer_names(run_id, kind):
            try:
                pointer = self._read_pointer(run_id, kind, name, expired=True)
            except StorageError:
                whole = False
                continue
            if pointer is None:
                continue
            if _expired(pointer):
                self._pointer(run_id, kind, name).unlink(missing_ok=True)
                gone |= {pointer.data, *pointer.superseded}
            else:
                live.add(pointer.data)
                for data, until in pointer.superseded.items():
                    (live if until > _now() else gone).add(data)
        if whole:  # else an orphan may be what a damaged record points to
            gone |= {name for name in self._names(self._data_directory(run_id, kind)) if _is_old(name)}
        for name in gone - live:
            _remove(self._data_directory(run_id, kind) / name)


@contextlib.contextmanager
def _naming(file: epath.Path) -> Iterator[None]:
    """Turns what is wrong with the content of a record into a StorageError that names the file."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is damaged: {error}. {_REMEDY}") from error


def _expired(pointer: Pointer) -> bool:
    expires_at = pointer.record.expires_at
    return expires_at is not None and expires_at <= _now()


def _superseded(old: Pointer, now: datetime) -> list[dict[str, str]]:
    """What a pointer that replaces `old` keeps for readers."""
    kept = {data: until for data, until in old.superseded.items() if until > now}
    if not _expired(old):
        kept[old.data] = now + SUPERSEDED_AGE
    return [{"data": data, "until": until.isoformat()} for data, until in kept.items()]


def _is_old(data_name: str) -> bool:
    try:
        born = datetime.strptime(data_name.partition("-")[0], _STAMP).replace(tzinfo=UTC)
    except ValueError:
        return False
    return _now() - born > ORPHAN_AGE


def _remove(path: epath.Path) -> None:
    """Removes data that nothing points to; what resists stays an orphan and is tried again later."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _fsync_directory(directory: Path) -> None:
    """Makes a rename durable where the system can (directories cannot be opened on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _suggest(wanted: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(wanted[:_LONGEST], known, n=5, cutoff=0.5) or known[:5]
    return f" Did you mean: {', '.join(near)}?" if near else " There is none yet."
