"""Adapter and optimiser state on disk: orbax arrays, and beside them a JSON description that needs no jax to read.

    <directory>/meta.json    what the caller tells, the LoRA constant, the shape and dtype of every tensor
    <directory>/adapter/     orbax
    <directory>/optimizer/   orbax; absent when saved without
    <directory>/SHA256SUMS   a digest of every file above, held against what is read before it is used

Orbax's `StandardCheckpointHandler` is used: its v1 interface still lives under `experimental` and can read these files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from tinker_jax.checkpoints.digests import SUMS, verify, write_sums
from tinker_jax.checkpoints.json_files import check_format, read_object
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, StorageError, TinkerError, UnprocessableEntityError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
_META = "meta.json"
_DTYPES = ("float32", "int32")
_REMEDY = "Restore the checkpoint from a copy, or use another one."
_log = logging.getLogger(__name__)


class MismatchError(UnprocessableEntityError):
    """A checkpoint of other tensors or shapes than are asked for."""


def save_adapter(
    directory: epath.PathLike, adapter: Mapping[str, Any], opt_state: Mapping[str, Any] | None, meta: Mapping[str, Any]
) -> None:
    """Writes an adapter, and its optimiser state unless None, into an empty directory.

    Args:
        directory: as handed to the writer by `Store.write`, which makes the save atomic.
        adapter: float32 arrays, any sharding.
        opt_state: `{"mu", "nu", "count"}`, or None.
        meta: JSON values that describe the adapter (base model, rank, groups, seed, …).

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    import orbax.checkpoint as ocp

    from tinker_jax.lora import ALPHA

    directory = epath.Path(directory)
    trees = {"adapter": adapter} if opt_state is None else {"adapter": adapter, "optimizer": opt_state}
    for part, tree in trees.items():
        with _orbax("write", directory), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(directory / part, args=ocp.args.StandardSave(tree))
    tensors = {
        part: {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in _leaves(tree)}
        for part, tree in trees.items()
    }
    description = {"format": FORMAT, "digests": SUMS, "lora_alpha": ALPHA, "meta": dict(meta), "tensors": tensors}
    with _orbax("write", directory):
        (directory / _META).write_text(json.dumps(description, indent=1))
        write_sums(directory)


def read_meta(directory: epath.PathLike) -> dict[str, Any]:
    """The JSON description: `format`, `lora_alpha`, `meta` as given to `save_adapter`, `tensors` by part and name.

    Raises:
        StorageError: it is missing, damaged, or of a newer format.
    """
    file = epath.Path(directory) / _META
    try:
        description = read_object(file, _REMEDY)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}. Was the checkpoint removed?") from error
    try:
        _check_description(file, description)
    except ValueError as error:
        raise StorageError(f"{file} is damaged: {error}. {_REMEDY}") from error
    return description


def load_adapter(
    directory: epath.PathLike, abstract_adapter: Mapping[str, Any], abstract_opt: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads an adapter straight to its devices, bit for bit as saved: files are held against their digests first.

    Args:
        directory: a checkpoint's data.
        abstract_adapter: `jax.ShapeDtypeStruct` leaves; each array is placed by its `sharding`, else on the default device.
        abstract_opt: the same for the optimiser state, None to leave that alone.

    Returns:
        The adapter, and the optimiser state or None.

    Raises:
        BadRequestError: optimiser state is asked for, but was not saved.
        MismatchError: a tensor is missing, surplus, or has another shape or dtype; all are checked before any is read.
        UnprocessableEntityError: a tensor holds NaN or infinity.
        StorageError: files are missing, surplus or damaged.
    """
    wanted = {"adapter": abstract_adapter} if abstract_opt is None else {"adapter": abstract_adapter, "optimizer": abstract_opt}
    description = _verified(directory, wanted)
    if abstract_opt is not None and "optimizer" not in description["tensors"]:
        raise BadRequestError(
            f"checkpoint {directory} was saved without optimizer state (save_weights_for_sampler leaves it out); "
            "load the weights only, or use a checkpoint made by save_state."
        )
    for part, tree in wanted.items():
        _check(part, description["tensors"][part], tree)
    loaded = {part: _restore(epath.Path(directory) / part, tree) for part, tree in wanted.items()}
    return loaded["adapter"], loaded.get("optimizer")


def read_adapter(directory: epath.PathLike) -> dict[str, np.ndarray]:
    """The adapter in host memory, float32, by dotted name such as `"layers.q_proj.a"`; verified as by `load_adapter`.

    Raises:
        UnprocessableEntityError: a tensor holds NaN or infinity.
        StorageError: files are missing, surplus or damaged.
    """
    import jax
    import numpy as np

    description = _verified(directory, ("adapter",))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract: dict[str, Any] = {}
    for name, spec in description["tensors"]["adapter"].items():
        *path, leaf = name.split(".")
        node = abstract
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jax.ShapeDtypeStruct(tuple(spec["shape"]), spec["dtype"], sharding=host)
    return {name: np.asarray(array) for name, array in _leaves(_restore(epath.Path(directory) / "adapter", abstract))}


def _verified(directory: epath.PathLike, parts: Collection[str]) -> dict[str, Any]:
    """The description, once it and the files of the parts are what was saved."""
    directory = epath.Path(directory)
    has_digests = verify(directory, (_META, *parts))
    description = read_meta(directory)
    if not has_digests:
        if "digests" in description:
            raise StorageError(f"{directory / SUMS} is missing, so the checkpoint cannot be verified. {_REMEDY}")
        _note_unverified(os.fspath(directory))
    return description


@functools.cache
def _note_unverified(directory: str) -> None:
    _log.warning("checkpoint data %s is older than digests and cannot be verified; a checkpoint saved anew can.", directory)


def _check_description(file: epath.Path, description: Mapping[str, Any]) -> None:
    """Refuses what no reader could use."""

    def need(name: str, expected: str, valid: bool) -> None:
        if not valid:
            raise ValueError(f"{name}: expected {expected}, got {brief(description.get(name))}")

    check_format(file, description.get("format"), FORMAT)
    alpha, tensors = description.get("lora_alpha"), description.get("tensors")
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < math.inf
    need("lora_alpha", "a finite number above 0", is_number)
    meta = description.get("meta")
    need("meta", "an object", isinstance(meta, dict))
    assert isinstance(meta, dict)
    need("meta", "a list as its groups", isinstance(meta.get("groups", []), list))
    need("tensors", "objects 'adapter' and, perhaps, 'optimizer'", isinstance(tensors, dict) and "adapter" in tensors)
    assert isinstance(tensors, dict)
    for part, specs in tensors.items():
        need("tensors", "an object of tensors for each part", isinstance(specs, dict))
        for name, spec in specs.items():
            if not _is_spec(spec):
                raise ValueError(f"{part} tensor {brief(name)}: expected its shape and dtype, got {brief(spec)}")
            if any(name.startswith(f"{other}.") for other in specs):
                raise ValueError(f"{part} tensor {brief(name)} lies within another tensor")


def _is_spec(spec: object) -> bool:
    if not isinstance(spec, dict):
        return False
    shape = spec.get("shape")
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**31 for size in shape)
    return sizes and spec.get("dtype") in _DTYPES


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node


def _check(part: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    expected = {name: (list(leaf.shape), str(leaf.dtype)) for name, leaf in _leaves(wanted)}
    got = {name: (spec["shape"], spec["dtype"]) for name, spec in saved.items()}
    if missing := sorted(expected.keys() - got.keys()):
        raise MismatchError(
            f"{part} tensor {missing[0]!r} is expected, but the checkpoint has none ({len(missing)} are missing); "
            "it was trained with other train_attn, train_mlp or train_unembed, or on another model."
        )
    if surplus := sorted(got.keys() - expected.keys()):
        raise MismatchError(
            f"{part} tensor {brief(surplus[0])} of the checkpoint has no place here ({len(surplus)} are surplus); "
            "it was trained with other train_attn, train_mlp or train_unembed, or on another model."
        )
    for name, (shape, dtype) in expected.items():
        if got[name][0] != shape:
            raise MismatchError(
                f"{part} tensor {name!r}: expected shape {shape}, the checkpoint has {brief(got[name][0])}; "
                "its LoRA rank or base model is another."
            )
        if got[name][1] != dtype:
            raise MismatchError(f"{part} tensor {name!r}: expected dtype {dtype}, the checkpoint has {got[name][1]}.")


def _restore(directory: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    with _orbax("read", directory), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(directory, args=ocp.args.StandardRestore(jax.tree.map(placed, abstract)))
    _check_finite(directory, tree)
    return tree


def _check_finite(directory: epath.Path, tree: Mapping[str, Any]) -> None:
    """Refuses an array with NaN or infinity: nothing that is computed with it would be a number."""
    import numpy as np

    for name, array in _leaves(tree):
        # Shard by shard on the host: nothing to compile, and no device holds more than its own part.
        own = (np.asarray(shard.data) for shard in array.addressable_shards if shard.replica_id == 0)
        if bad := sum(shard.size - np.count_nonzero(np.isfinite(shard)) for shard in own):
            raise UnprocessableEntityError(
                f"{directory.name} tensor {name!r} of checkpoint {directory.parent} holds {bad} values that are NaN or "
                "infinite; use a checkpoint from before training diverged."
            )


@contextlib.contextmanager
def _orbax(action: str, directory: epath.Path) -> Iterator[None]:
    """Orbax without its chatter, and with its errors turned into one type.

    Tensorstore reports a full disk or a damaged file as ValueError or RuntimeError, so every Exception counts as the
    storage's; shapes were checked before.
    """
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)  # it logs each error too, once a thread; ours carries it as cause
    try:
        yield
    except TinkerError:
        raise
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        # What follows in brackets is how tensorstore opened the array.
        why = os.strerror(int(code[1])) if code else str(error).partition("\n")[0].partition(" [tensorstore_spec")[0][:500]
        raise StorageError(f"cannot {action} checkpoint data {directory}: {why}.") from error
    finally:
        absl.setLevel(level)
