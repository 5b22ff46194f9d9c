"""Hugging Face weights → the flat parameter dict, one tensor of one layer at a time.

The host never holds more than the tensor just read, or of the experts of a layer one: it is placed on the devices in its final
sharding, cast there and written into the stacked weight there, in a donated buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from tinker_jax.checkpoints.stored import Quantization, StoredTensor, stored_tensors
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
    quantization: Quantization | None = None,
    unused: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """Loads the base weights of a model directory.

    Args:
        directory: holds `model.safetensors`, or shards with `model.safetensors.index.json`.
        table: the model's weights (`tinker_jax.models.weights`).
        dtype: of every weight on the device, those aside that stay `exact`.
        shardings: sharding of each weight by its name, layer axis included; None is the default device.
        progress: show a progress bar.
        quantization: how weights may be encoded, see `tinker_jax.checkpoints.stored`.
        unused: beginnings of names of tensors that may be there and are not read.

    Returns:
        `{weight.name: array of shape weight.full_shape}`.

    Raises:
        NotFoundError: no weights, or a shard is missing.
        StorageError: a file is damaged.
        UnprocessableEntityError: a tensor is missing, unexpected, or of another shape; checked before anything is read.
        UnsupportedError: a tensor is stored in a dtype other than f32, f16, bf16.
    """
    from tqdm import tqdm

    tensors = stored_tensors(read_index(directory), quantization)
    check_names(directory, tensors, table, unused)
    total = sum(math.prod(weight.full_shape) for weight in table)
    params: dict[str, jax.Array] = {}
    shown = {
        "unit": " parameters",
        "unit_scale": True,
        "desc": f"Loading {directory.name}",
        "delay": 0.5,
        "disable": not progress,
    }
    with tqdm(total=total, **shown) as bar:
        for weight in table:
            sharding = shardings[weight.name] if shardings else SingleDeviceSharding(jax.local_devices()[0])
            kept = jnp.dtype(jnp.float32 if weight.exact else dtype)
            buffer = _zeros(weight.full_shape, kept, sharding) if weight.stacked else None
            for at, value in _parts(weight, tensors):
                tensor = _to_devices(value, _file_sharding(weight, sharding, len(at)))
                buffer = _convert(tensor, kept, sharding) if buffer is None else _place(buffer, tensor, at, sharding)
                # Without this the host would run ahead and pile up tensors that wait for their transfer.
                buffer.block_until_ready()
                bar.update(value.size)
            assert buffer is not None
            params[weight.name] = buffer
    return params


def _parts(weight: Weight, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """What a weight is made of, one by one: where it goes (layer, and expert), and its value."""
    for layer, number in enumerate(weight.layers):
        if not weight.experts:
            yield (layer,), tensors[weight.hf.format(layer=number)].read()
        elif weight.fused is not None and (name := weight.fused.hf.format(layer=number)) in tensors:
            for expert in range(weight.experts):
                yield (layer, expert), weight.cut(tensors[name].part(expert))
        else:
            for expert in range(weight.experts):
                yield (layer, expert), tensors[weight.hf.format(layer=number, expert=expert)].read()
    if not weight.layers:
        yield (), tensors[weight.hf].read()


def stored_as(weight: Weight, tensors: Collection[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a weight's tensors, layer by layer, in whichever form a file of such names has its experts."""
    if not weight.layers:
        return [(weight.hf, weight.shape)]
    stored = []
    for layer in weight.layers:
        fused = weight.fused
        if fused is not None and ((name := fused.hf.format(layer=layer)) in tensors or "{expert}" not in weight.hf):
            stored.append((name, fused.shape))
        elif weight.experts:
            stored += [(weight.hf.format(layer=layer, expert=e), weight.shape[1:]) for e in range(weight.experts)]
        else:
            stored.append((weight.hf.format(layer=layer), weight.shape))
    return stored


def check_names(
    directory: Path, tensors: Mapping[str, StoredTensor], table: Sequence[Weight], unused: tuple[str, ...] = ()
) -> None:
    """Holds the file's tensors against the table, both ways; further ones may begin as `unused` says.

    Raises:
        UnprocessableEntityError: a tensor is missing, unexpected, or of another shape.
    """
    expected = {name: shape for weight in table for name, shape in stored_as(weight, tensors)}
    if missing := [name for name in expected if name not in tensors]:
        files = _listing({tensor.file.name for tensor in tensors.values()})
        raise UnprocessableEntityError(
            f"{directory} lacks tensor {missing[0]!r} ({len(missing)} of {len(expected)} are missing; looked in {files}). "
            "Do config.json and weights belong together?"
        )
    further = [name for name in tensors if name not in expected and not name.startswith(unused)]
    surplus = [name for name in further if not name.endswith("rotary_emb.inv_freq")]
    if _HEAD in surplus and _EMBEDDING in expected:
        if not _same_bytes(tensors[_HEAD].sources[0], tensors[_EMBEDDING].sources[0]):
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
        got = tensors[name].shape
        if got != shape:
            turned = len(shape) == 3 and got == (shape[0], shape[2], shape[1])
            order = " The two are transposed: this family's files have another order." if turned else ""
            raise UnprocessableEntityError(
                f"tensor {name!r} in {tensors[name].file}: expected shape {list(shape)} from config.json, "
                f"got {list(got)}.{order}"
            )


def _listing(names: Sequence[str] | set[str], most: int = 10) -> str:
    names = [name[:100] for name in sorted(names)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and all(a == b for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _file_sharding(weight: Weight, sharding: Sharding, dropped: int) -> Sharding:
    """Sharding of one tensor as the file holds it, without the first axes of ours."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = list(sharding.spec) + [None] * (len(weight.full_shape) - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes[dropped:]))


def _to_devices(tensor: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(tensor: jax.Array, dtype: jnp.dtype, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(tensor.astype(dtype), sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _place(buffer: jax.Array, tensor: jax.Array, at: tuple[int, ...], sharding: Sharding) -> jax.Array:
    cast = tensor.astype(buffer.dtype).reshape(*(1 for _ in at), *tensor.shape)
    start = (*at, *(0 for _ in tensor.shape))
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_slice(buffer, cast, start), sharding)
