"""Adapter and optimiser state on disk: orbax arrays, and beside them a JSON description that needs no jax to read.

    <directory>/meta.json    what the caller tells, the LoRA constant, the shape and dtype of every tensor
    <directory>/adapter/     orbax
    <directory>/optimizer/   orbax; absent when saved without

Orbax's `StandardCheckpointHandler` is used: its v1 interface still lives under `experimental` and can read these files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from tinker_jax.types.errors import BadRequestError, StorageError, TinkerError, UnprocessableEntityError

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
_META = "meta.json"
_PARTS = ("adapter", "optimizer")


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
    text = json.dumps({"format": FORMAT, "lora_alpha": ALPHA, "meta": dict(meta), "tensors": tensors}, indent=1)
    (directory / _META).write_text(text)


def read_meta(directory: epath.PathLike) -> dict[str, Any]:
    """The JSON description: `format`, `lora_alpha`, `meta` as given to `save_adapter`, `tensors` by part and name.

    Raises:
        StorageError: it is missing, damaged, or of a newer format.
    """
    file = epath.Path(directory) / _META
    try:
        description = json.loads(file.read_text())
        version = description["format"]
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}. Was the checkpoint removed?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{file} is damaged: {error!r}.") from error
    if version != FORMAT:
        raise StorageError(f"{file} has format {version!r}; this version reads format {FORMAT}. Update tinker_jax.")
    return description


def load_adapter(
    directory: epath.PathLike, abstract_adapter: Mapping[str, Any], abstract_opt: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads an adapter straight to its devices, bit for bit as saved.

    Args:
        directory: a checkpoint's data.
        abstract_adapter: `jax.ShapeDtypeStruct` leaves; each array is placed by its `sharding`, else on the default device.
        abstract_opt: the same for the optimiser state, None to leave that alone.

    Returns:
        The adapter, and the optimiser state or None.

    Raises:
        BadRequestError: optimiser state is asked for, but was not saved.
        UnprocessableEntityError: a tensor is missing, surplus, or has another shape; all are checked before any is read.
        StorageError: files are missing or damaged.
    """
    description = read_meta(directory)
    wanted = {"adapter": abstract_adapter}
    if abstract_opt is not None:
        if "optimizer" not in description["tensors"]:
            raise BadRequestError(
                f"checkpoint {directory} was saved without optimizer state (save_weights_for_sampler leaves it out); "
                "load the weights only, or use a checkpoint made by save_state."
            )
        wanted["optimizer"] = abstract_opt
    for part, tree in wanted.items():
        _check(part, description["tensors"][part], tree)
    loaded = {part: _restore(epath.Path(directory) / part, tree) for part, tree in wanted.items()}
    return loaded["adapter"], loaded.get("optimizer")


def read_adapter(directory: epath.PathLike) -> dict[str, np.ndarray]:
    """The adapter in host memory, float32, by dotted name such as `"layers.q_proj.a"`.

    Raises:
        StorageError: files are missing or damaged.
    """
    import jax
    import numpy as np

    description = read_meta(directory)
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract: dict[str, Any] = {}
    for name, spec in description["tensors"]["adapter"].items():
        *path, leaf = name.split(".")
        node = abstract
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jax.ShapeDtypeStruct(tuple(spec["shape"]), spec["dtype"], sharding=host)
    return {name: np.asarray(array) for name, array in _leaves(_restore(epath.Path(directory) / "adapter", abstract))}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _leaves(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", node


def _check(part: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    expected = {name: tuple(leaf.shape) for name, leaf in _leaves(wanted)}
    got = {name: tuple(spec["shape"]) for name, spec in saved.items()}
    if missing := sorted(expected.keys() - got.keys()):
        raise UnprocessableEntityError(
            f"{part} tensor {missing[0]!r} is expected, but the checkpoint has none ({len(missing)} are missing); "
            "it was trained with other train_attn, train_mlp or train_unembed, or on another model."
        )
    if surplus := sorted(got.keys() - expected.keys()):
        raise UnprocessableEntityError(
            f"{part} tensor {surplus[0]!r} of the checkpoint has no place here ({len(surplus)} are surplus); "
            "it was trained with other train_attn, train_mlp or train_unembed, or on another model."
        )
    for name, shape in expected.items():
        if got[name] != shape:
            raise UnprocessableEntityError(
                f"{part} tensor {name!r}: expected shape {list(shape)}, the checkpoint has {list(got[name])}; "
                "its LoRA rank or base model is another."
            )


def _restore(directory: epath.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    import jax
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)

    with _orbax("read", directory), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory, args=ocp.args.StandardRestore(jax.tree.map(placed, abstract)))


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
        why = os.strerror(int(code[1])) if code else str(error).partition("\n")[0]
        raise StorageError(f"cannot {action} checkpoint data {directory}: {why}.") from error
    finally:
        absl.setLevel(level)
