"""What the store records, and the grammar of names and `tinker://` paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from etils import epath

from tinker_jax.types.errors import BadRequestError

Kind = Literal["weights", "sampler_weights"]
KINDS: tuple[Kind, ...] = ("weights", "sampler_weights")
MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._:-]{0,255}")


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
            f"checkpoint name {name!r} is not allowed; use 1 to 128 letters, digits, '.', '_' or '-', not beginning with '.'."
        )


def parse_path(path: str) -> tuple[str, Kind, str]:
    """Splits `tinker://<run id>/<weights|sampler_weights>/<name>` into run id, kind and name.

    Raises:
        BadRequestError: the path has another form.
    """
    expected = "expected tinker://<run id>/<weights|sampler_weights>/<name>"
    if not isinstance(path, str) or not path.startswith("tinker://"):
        raise BadRequestError(f"{path!r} is not a checkpoint path; {expected}.")
    parts = path.removeprefix("tinker://").split("/")
    if len(parts) != 3:
        raise BadRequestError(f"{path!r} has {len(parts)} parts after tinker://; {expected}.")
    run_id, kind, name = parts
    if not is_run_id(run_id):
        raise BadRequestError(f"{path!r} has the run id {run_id!r}, which is not allowed; {expected}.")
    if kind not in KINDS:
        raise BadRequestError(f"{path!r} is of kind {kind!r}; {expected}.")
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
            f"ttl_seconds={ttl_seconds!r} is not allowed; give a whole number from {MIN_TTL_SECONDS} (1 hour) to "
            f"{MAX_TTL_SECONDS} (10 years), or None to keep the checkpoint."
        )


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """A copy of `user_metadata`.

    Raises:
        BadRequestError: a key or value is not a string.
    """
    if metadata is None:
        return None
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise BadRequestError(f"user_metadata[{key!r}]={value!r}: keys and values must be strings.")
    return dict(metadata)
