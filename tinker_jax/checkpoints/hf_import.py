"""Hugging Face weights → the flat parameter dict, one tensor of one layer at a time.

The host never holds more than the tensor just read: it is placed on the devices in its final sharding, cast there and
written into the stacked weight there, in a donated buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from tinker_jax.checkpoints.tensor_files import TensorEntry, read_index
from tinker_jax.models.weights import Weight
from tinker_jax.types.errors import UnprocessableEntityError

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def load_base(
    directory: Path,
    table: Sequence[Weight],
    dtype: DTypeLike,
    shardings: Mapping[str, Sharding] | None = None,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Loads the base weights of a model directory.

    Args:
        directory: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        table: the model's weights (`tinker_jax.models.weights`).
        dtype: of every weight on the device.
        shardings: sharding of each weight by its name, layer axis included; None is the default device.
        progress: show a progress bar.

    Returns:
        `{weight.name: array of shape weight.full_shape}`.

    Raises:
        NotFoundError: no weights, or a shard is missing.
        StorageError: a file is damaged.
        UnprocessableEntityError: a tensor is missing, unexpected, or of another shape; checked before anything is read.
        UnsupportedError: a tensor is stored in a dtype other than f32, f16, bf16.
    """
    from tqdm import tqdm

    entries = read_index(directory)
    check_names(directory, entries, table)
    total = sum(entries[name].nbytes for weight in table for name in hf_names(weight))
    params: dict[str, jax.Array] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {directory.name}", delay=0.5, disable=not progress) as bar:
        for weight in table:
            sharding = shardings[weight.name] if shardings else SingleDeviceSharding(jax.local_devices()[0])
            buffer = _zeros(weight.full_shape, jnp.dtype(dtype), sharding) if weight.stacked else None
            for layer, name in enumerate(hf_names(weight)):
                entry = entries[name]
                tensor = _to_devices(entry.read(), _file_sharding(weight, sharding))
                if buffer is None:
                    buffer = _convert(tensor, jnp.dtype(dtype), sharding)
                else:
                    buffer = _place(buffer, tensor, layer, sharding)
                # Without this the host would run ahead and pile up tensors that wait for their transfer.
                buffer.block_until_ready()
                bar.update(entry.nbytes)
            assert buffer is not None
            params[weight.name] = buffer
    return params


def hf_names(weight: Weight) -> list[str]:
    """Names in the file of a weight's tensors, layer by layer."""
    return [weight.hf.format(layer=layer) for layer in range(weight.stacked)] if weight.stacked else [weight.hf]


def check_names(directory: Path, entries: Mapping[str, TensorEntry], table: Sequence[Weight]) -> None:
    """Holds the file's tensors against the table, both ways.

    Raises:
        UnprocessableEntityError: a tensor is missing, unexpected, or of another shape.
    """
    expected = {name: weight.shape for weight in table for name in hf_names(weight)}
    if missing := [name for name in expected if name not in entries]:
        files = _listing({entry.file.name for entry in entries.values()})
        raise UnprocessableEntityError(
            f"{directory} lacks tensor {missing[0]!r} ({len(missing)} of {len(expected)} are missing; looked in {files}). "
            "Do config.json and weights belong together?"
        )
    surplus = [name for name in entries if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if _HEAD in surplus and _EMBEDDING in expected:
        if not _same_bytes(entries[_HEAD], entries[_EMBEDDING]):
            raise UnprocessableEntityError(
                f"{directory}: config.json ties the unembedding to the embedding, but {_HEAD} differs from {_EMBEDDING}; "
                "set tie_word_embeddings to false."
            )
        surplus.remove(_HEAD)
    if surplus:
        raise UnprocessableEntityError(
            f"{directory} holds {len(surplus)} tensors that the model has no place for: {_listing(surplus)}. "
            "Do config.json and weights belong together?"
        )
    for name, shape in expected.items():
        if entries[name].shape != shape:
            raise UnprocessableEntityError(
                f"tensor {name!r} in {entries[name].file}: expected shape {list(shape)} from config.json, "
                f"got {list(entries[name].shape)}."
            )


def _listing(names: Sequence[str] | set[str], most: int = 10) -> str:
    names = [name[:100] for name in sorted(names)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and all(a == b for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _file_sharding(weight: Weight, sharding: Sharding) -> Sharding:
    """Sharding of one tensor as the file holds it: the layer axis dropped."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = list(sharding.spec) + [None] * (len(weight.full_shape) - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*(axes[1:] if weight.stacked else axes)))


def _to_devices(tensor: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(tensor: jax.Array, dtype: jnp.dtype, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(tensor.astype(dtype), sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _place(buffer: jax.Array, tensor: jax.Array, layer: int, sharding: Sharding) -> jax.Array:
    cast = tensor.astype(buffer.dtype)
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(buffer, cast, layer, 0), sharding)
