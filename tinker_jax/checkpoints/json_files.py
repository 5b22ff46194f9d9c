"""Small JSON files: reading what may be damaged, and records that carry their format and a digest of themselves.

A record is a JSON object with `format`, its own fields, and `record_sha256` over all of these. Fields that a reader does
not know are left alone, also when it writes the record again; only a change that it would misread raises the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_jax.types._show import brief
from tinker_jax.types.errors import StorageError

if TYPE_CHECKING:
    from etils import epath

FORMAT = 1
_FORMAT = "format"
_DIGEST = "record_sha256"


def read_object(file: epath.Path | Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: any file.
        remedy: ends the message of a StorageError: what to do about a damaged file.

    Raises:
        OSError: it cannot be read.
        StorageError: it is not UTF-8, not JSON, or holds no object.
    """
    data = file.read_bytes()
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise StorageError(f"{file} is damaged: not UTF-8 (byte {error.start}). {remedy}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, or brackets in brackets
        raise StorageError(f"{file} is damaged: not JSON ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{file} is damaged: expected a JSON object, got {brief(value)}. {remedy}")
    return value


def check_format(file: epath.Path | Path, value: object, known: int) -> None:
    """Refuses a format that this version cannot read.

    Raises:
        ValueError: no format at all.
        StorageError: a newer one.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"{_FORMAT}: expected a whole number, got {brief(value)}")
    if value > known:
        raise StorageError(f"{file} has format {brief(value)}; this version reads format {known}. Update tinker_jax.")


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A record of these fields, ready to be written."""
    record = {_FORMAT: FORMAT, **fields}
    return {**record, _DIGEST: _digest(record)}


def unseal(file: epath.Path | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that was read from `file`. One without a format is older than formats, and has no digest.

    Raises:
        ValueError: the digest or the format is wrong.
        StorageError: a newer format.
    """
    fields = dict(record)
    digest = fields.pop(_DIGEST, None)
    version = fields.get(_FORMAT, 0)
    check_format(file, version, FORMAT)
    if (version or digest is not None) and digest != _digest(fields):
        raise ValueError("its content does not match its SHA-256")
    fields.pop(_FORMAT, None)
    return fields


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
