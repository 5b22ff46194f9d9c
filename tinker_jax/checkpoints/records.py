"""What the store records, and the grammar of names and `tinker://` paths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from etils import epath

from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError

Kind = Literal["weights", "sampler_weights"]
KINDS: tuple[Kind, ...] = ("weights", "sampler_weights")
MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._:-]{0,254}")  # a directory's name has at most 255 bytes


@dataclass(frozen=True)
class RunRecord:
    """A training run: one adapter of one base model. Times are aware, in UTC."""

    run_id: str
    session_id: str
    base_model: str
    lora_rank: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    seed: int | None
    user_metadata: dict[str, str] | None
    created: datetime
    last_request_time: datetime


@dataclass(frozen=True)
class CheckpointRecord:
    """A complete checkpoint. `path` is its `tinker://` path, `directory` holds its data; times are aware, in UTC."""

    run_id: str
    kind: Kind
    name: str
    path: str
    directory: epath.Path
    time: datetime
    size_bytes: int
    expires_at: datetime | None
    user_metadata: dict[str, str] | None
    base_model: str
    lora_rank: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    has_optimizer: bool


@dataclass(frozen=True)
class Pointer:
    """What makes a checkpoint visible, as stored.

    Attributes:
        fields: everything that is stored, fields that this version does not know included.
        data: name of the directory of its data.
        superseded: data that it pointed to before, by name, and until when readers may still use it.
        record: what the store tells of it.
    """

    fields: Mapping[str, Any]
    data: str
    superseded: Mapping[str, datetime]
    record: CheckpointRecord


def run_fields(run: RunRecord) -> dict[str, Any]:
    """A run as JSON values."""
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in fields.items()}


def read_run(run_id: str, fields: Mapping[str, Any]) -> RunRecord:
    """The run that stored fields describe; those that are not known are passed over.

    Raises:
        ValueError: names the field, what was expected and what is there.
    """
    if (own := _text(fields, "run_id")) != run_id:
        raise ValueError(f"it is the record of run {brief(own)}")
    return RunRecord(
        run_id=run_id,
        session_id=_text(fields, "session_id"),
        **_lora(fields),
        seed=_field(fields, "seed", "a whole number or null", lambda value: value is None or type(value) is int),
        user_metadata=_metadata(fields),
        created=_time(fields, "created"),
        last_request_time=_time(fields, "last_request_time"),
    )


def read_pointer(run_id: str, kind: Kind, name: str, data_directory: epath.Path, fields: Mapping[str, Any]) -> Pointer:
    """The checkpoint that stored fields describe; those that are not known are passed over.

    Raises:
        ValueError: names the field, what was expected and what is there.
    """
    path = f"tinker://{run_id}/{kind}/{name}"
    if fields.get("path", path) != path:  # absent in records without a format
        raise ValueError(f"it is the record of {brief(fields['path'])}")
    # What it names gets removed one day, so it must not lead out of the data directory.
    data = _field(fields, "data", "the name of a directory", is_name)
    superseded = _field(fields, "superseded", "a list of objects", _is_list_of_objects) if "superseded" in fields else []
    record = CheckpointRecord(
        run_id=run_id,
        kind=kind,
        name=name,
        path=path,
        directory=data_directory / data,
        time=_time(fields, "time"),
        size_bytes=_whole(fields, "size_bytes", 0),
        expires_at=None if fields.get("expires_at", "") is None else _time(fields, "expires_at"),
        user_metadata=_metadata(fields),
        **_lora(fields),
        has_optimizer=_flag(fields, "has_optimizer"),
    )
    former = {_field(one, "data", "the name of a directory", is_name): _time(one, "until") for one in superseded}
    return Pointer(fields, data, former, record)


def _field(fields: Mapping[str, Any], name: str, expected: str, valid: Callable[[Any], bool]) -> Any:
    if name not in fields:
        raise ValueError(f"{name} is missing; expected {expected}")
    if not valid(fields[name]):
        raise ValueError(f"{name}: expected {expected}, got {brief(fields[name])}")
    return fields[name]


def _text(fields: Mapping[str, Any], name: str) -> str:
    return _field(fields, name, "a text", lambda value: isinstance(value, str))


def _whole(fields: Mapping[str, Any], name: str, least: int) -> int:
    return _field(fields, name, f"a whole number from {least}", lambda value: type(value) is int and value >= least)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    return _field(fields, name, "true or false", lambda value: isinstance(value, bool))


def _time(fields: Mapping[str, Any], name: str) -> datetime:
    text = _field(fields, name, "a time with its zone", lambda value: _parse_time(value) is not None)
    time = _parse_time(text)
    assert time is not None
    return time


def _metadata(fields: Mapping[str, Any]) -> dict[str, str] | None:
    def valid(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))

    return _field(fields, "user_metadata", "an object of texts, or null", valid)


def _lora(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "base_model": _text(fields, "base_model"),
        "lora_rank": _whole(fields, "lora_rank", 1),
        **{name: _flag(fields, name) for name in ("train_mlp", "train_attn", "train_unembed")},
    }


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _parse_time(value: object) -> datetime | None:
    """An aware time in UTC, or None. The first and the last year are left out: other zones would fall outside the calendar."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else None
        time = None if time is None or time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time if time is not None and 1 < time.year < 9999 else None


def is_name(name: object) -> bool:
    """Whether `name` is one plain path component that a checkpoint may have."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def is_run_id(run_id: object) -> bool:
    """Whether `run_id` is one plain path component that a run may have; colons are legal."""
    return isinstance(run_id, str) and _RUN_ID.fullmatch(run_id) is not None


def check_name(name: str) -> None:
    """Refuses a checkpoint name that is not one plain path component.

    Raises:
        BadRequestError: unless the name is 1 to 128 of `A-Z a-z 0-9 . _ -` and does not begin with a dot.
    """
    if not is_name(name):
        raise BadRequestError(
            f"checkpoint name {brief(name)} is not allowed; "
            "use 1 to 128 letters, digits, '.', '_' or '-', not beginning with '.'."
        )


def parse_path(path: str) -> tuple[str, Kind, str]:
    """Splits `tinker://<run id>/<weights|sampler_weights>/<name>` into run id, kind and name.

    Raises:
        BadRequestError: the path has another form.
    """
    expected = "expected tinker://<run id>/<weights|sampler_weights>/<name>"
    if not isinstance(path, str) or not path.startswith("tinker://"):
        raise BadRequestError(f"{brief(path)} is not a checkpoint path; {expected}.")
    parts = path.removeprefix("tinker://").split("/")
    if len(parts) != 3:
        raise BadRequestError(f"{brief(path)} has {len(parts)} parts after tinker://; {expected}.")
    run_id, kind, name = parts
    if not is_run_id(run_id):
        raise BadRequestError(f"{brief(path)} has the run id {brief(run_id)}, which is not allowed; {expected}.")
    if kind not in KINDS:
        raise BadRequestError(f"{brief(path)} is of kind {brief(kind)}; {expected}.")
    check_name(name)
    return run_id, kind, name


def check_ttl(ttl_seconds: int | None) -> None:
    """Refuses a time to live outside 1 hour … 10 years.

    Raises:
        BadRequestError: names the value and the bounds.
    """
    if ttl_seconds is None:
        return
    whole = isinstance(ttl_seconds, int) and not isinstance(ttl_seconds, bool)
    if not whole or not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise BadRequestError(
            f"ttl_seconds={brief(ttl_seconds)} is not allowed; give a whole number from {MIN_TTL_SECONDS} (1 hour) to "
            f"{MAX_TTL_SECONDS} (10 years), or None to keep the checkpoint."
        )


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """A copy of `user_metadata`.

    Raises:
        BadRequestError: it is no mapping, or a key or value is not a string.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise BadRequestError(f"user_metadata: expected a dict of strings, got {brief(metadata)}.")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise BadRequestError(f"user_metadata[{brief(key)}]={brief(value)}: keys and values must be strings.")
    return dict(metadata)
