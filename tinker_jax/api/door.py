"""Checks and conversions at the API's door, before anything is queued."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinker_jax.checkpoints.hub import EMBEDDED_PREFIX, load_tokenizer, local_directory
from tinker_jax.engine.config import EngineConfig
from tinker_jax.types import Datum
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
    if isinstance(data, (str, bytes, Mapping)) or looks_like(Datum, data) or not isinstance(data, Sequence):
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


def base_model_name(base_model: Any) -> str:
    """A model name. A local directory's is its absolute path, so that a checkpoint finds its base model from anywhere."""
    if not isinstance(base_model, str) or not base_model:
        raise BadRequestError(
            f"base_model: expected a hub id, a local directory or an embedded model's name, got {base_model!r}"
        )
    local = None if base_model.startswith(EMBEDDED_PREFIX) else local_directory(base_model)
    return base_model if local is None else os.path.abspath(local)


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
            f"optimizer {kind!r} is not available: its mathematics is unpublished; leave `optimizer` out for AdamW"
        )


def check_metadata(user_metadata: Any) -> None:
    """Strings by string, or None."""
    from tinker_jax.checkpoints import records

    if user_metadata is not None and not isinstance(user_metadata, Mapping):
        raise BadRequestError(f"user_metadata: expected a dict of strings, got {type(user_metadata).__name__}")
    records.check_metadata(user_metadata)


def check_save(name: Any, ttl_seconds: Any, user_metadata: Any) -> None:
    """What a checkpoint is to be called, how long it lives, what is kept with it."""
    from tinker_jax.checkpoints import records

    records.check_name(name)
    records.check_ttl(ttl_seconds)
    check_metadata(user_metadata)


@functools.lru_cache(maxsize=8)
def tokenizer_of(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory, one object for all clients."""
    return load_tokenizer(directory)
