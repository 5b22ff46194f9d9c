"""Checks and conversions at the API's door, before anything is queued."""

from __future__ import annotations

import functools
import os
import re
import stat
from typing import TYPE_CHECKING, Any

from tinker_jax.checkpoints.hub import EMBEDDED_PREFIX, load_tokenizer
from tinker_jax.engine.config import EngineConfig
from tinker_jax.types import Datum, _check
from tinker_jax.types._show import brief
from tinker_jax.types.coerce import coerce, looks_like
from tinker_jax.types.errors import BadRequestError, UnsupportedError
from tinker_jax.types.training import AdamOptimizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_data(data: Any) -> list[Datum]:
    """The batch as our own datums over memory of their own: what the caller does to theirs afterwards changes nothing.

    Raises:
        BadRequestError: no data, or an item that is not a datum.
    """
    if not _check.is_list(data):
        raise BadRequestError(f"data: expected a list of Datum, got {type(data).__name__}")
    if not data:
        raise BadRequestError("No data provided")
    batch = []
    for i, item in enumerate(data):
        if not looks_like(Datum, item):
            raise BadRequestError(f"data[{i}]: expected Datum, got {type(item).__name__}")
        try:
            batch.append(coerce(Datum, item, "datum").copy())
        except (BadRequestError, TypeError) as error:
            raise BadRequestError(f"data[{i}]: {error}") from error
    return batch


#: Tinker's suffixes name how a model is served, such as `org/model:peft:262144`.
_SERVED = re.compile(r"([^:/]+/[^:/]+)(:[\w.-]+)+")


def base_model_name(base_model: Any) -> str:
    """A model's name, by which engines are shared and which checkpoints keep.

    A local directory's is its absolute path, so that a checkpoint finds its base model from anywhere. Of a name with suffixes
    (`org/model:peft:262144`) the model's remains: how it is served is a matter of `EngineConfig` here.
    """
    if not isinstance(base_model, str) or not base_model:
        raise _check.refuse("base_model", "a hub id, a local directory or an embedded model's name", base_model)
    local = _directory(base_model)
    if local is not None and not base_model.startswith(EMBEDDED_PREFIX):
        return local
    served = _SERVED.fullmatch(base_model)
    return served[1] if served else base_model


def _directory(base_model: str) -> str | None:
    """The absolute path of a directory that is there."""
    try:
        local = os.path.abspath(os.path.expanduser(base_model))
        return local if stat.S_ISDIR(os.stat(local).st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # too long a name, a character that no path has, a directory out of bounds
        why = getattr(error, "strerror", None) or error
        raise BadRequestError(f"base_model: cannot look for a directory {brief(base_model)}: {why}") from error


def engine_config(engine: Any) -> EngineConfig:
    """The configuration of a client; None is the default one."""
    if engine is not None and not isinstance(engine, EngineConfig):
        raise BadRequestError(f"engine: expected EngineConfig, got {type(engine).__name__}")
    return engine or EngineConfig()


def refuse_other_optimizers(optimizer: Any) -> None:
    """AdamW is the one optimiser here."""
    if optimizer is not None and not looks_like(AdamOptimizerConfig, optimizer):
        kind = getattr(optimizer, "type", type(optimizer).__name__)
        raise UnsupportedError(
            f"optimizer {brief(kind)} is not available: its mathematics is unpublished; leave `optimizer` out for AdamW"
        )


def check_metadata(user_metadata: Any) -> dict[str, str] | None:
    """A copy, strings by string, or None."""
    from tinker_jax.checkpoints import records

    return records.check_metadata(user_metadata)


def check_save(name: Any, ttl_seconds: Any, user_metadata: Any) -> tuple[int | None, dict[str, str] | None]:
    """What a checkpoint is to be called; gives how long it lives and what is kept with it."""
    from tinker_jax.checkpoints import records

    records.check_name(_check.name(name, "checkpoint name"))
    return check_ttl(ttl_seconds), check_metadata(user_metadata)


def check_ttl(ttl_seconds: Any) -> int | None:
    """Seconds that a checkpoint lives; None: for ever."""
    from tinker_jax.checkpoints import records

    ttl_seconds = None if ttl_seconds is None else _check.integer(ttl_seconds, "ttl_seconds")
    records.check_ttl(ttl_seconds)
    return ttl_seconds


@functools.lru_cache(maxsize=8)
def tokenizer_of(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory, one object for all clients."""
    return load_tokenizer(directory)
