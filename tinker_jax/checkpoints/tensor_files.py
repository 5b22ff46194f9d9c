"""Reading and writing safetensors one tensor at a time, so that a model never has to fit in host memory.

Format: 8 bytes little-endian header length, a JSON header `{name: {"dtype", "shape", "data_offsets"}}`, then the tensors'
bytes. A sharded model has an index file that maps each tensor to its shard.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from tinker_jax.checkpoints.hub import DOWNLOAD_AGAIN, read_json
from tinker_jax.types._show import brief
from tinker_jax.types.errors import NotFoundError, StorageError, UnsupportedError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: Types that a frozen weight may be stored in.
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Bytes of an element; the integers and F8_E4M3 are parts of quantised weights (`checkpoints/stored.py`).
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U8": 1, "I8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1}
#: Bytes of a header at most, as in safetensors itself: a damaged length must not have gigabytes read as JSON.
_MOST_HEADER = 100_000_000
_SHARD = re.compile(r"[\w-][\w.-]{0,240}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes `start` to `stop` of `file`, `shape` and `dtype` (the format's name, e.g. `"BF16"`)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype on disk.

        Raises:
            UnsupportedError: other than F32, F16, BF16.
        """
        if self.dtype not in DTYPES:
            raise UnsupportedError(
                f"tensor {self.name!r} in {self.file} is stored as {self.dtype[:20]}; supported are {', '.join(DTYPES)}. "
                "Use the model's bf16 checkpoint."
            )
        return DTYPES[self.dtype]

    def rows(self, start: int, stop: int) -> TensorEntry:
        """Where indices `start` to `stop` of the leading axis lie."""
        assert 0 <= start <= stop <= self.shape[0], f"rows {start} to {stop} of {self.name}, which has shape {self.shape}"
        size = self.nbytes // max(self.shape[0], 1)
        return replace(
            self, shape=(stop - start, *self.shape[1:]), start=self.start + start * size, stop=self.start + stop * size
        )

    def read(self) -> np.ndarray:
        """The tensor in host memory, in its stored dtype.

        Raises:
            UnsupportedError: as `stored_dtype`.
            StorageError: the file cannot be read.
        """
        return np.frombuffer(self.read_bytes(), self.stored_dtype).reshape(self.shape)

    def read_bytes(self) -> bytes:
        """The tensor's bytes as stored, whatever the dtype."""
        return b"".join(self.blocks(max(self.nbytes, 1)))

    def blocks(self, size: int = 1 << 26) -> Iterator[bytes]:
        """The tensor's bytes in pieces of at most `size`.

        Raises:
            StorageError: the file cannot be read, or is too short.
        """
        try:
            with open(self.file, "rb") as file:
                file.seek(self.start)
                left = self.nbytes
                while left:
                    data = file.read(min(size, left))
                    if not data:
                        raise StorageError(f"{self.file} ends within tensor {self.name!r}. {DOWNLOAD_AGAIN}")
                    left -= len(data)
                    yield data
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {self.file}: {error.strerror or error}.") from error


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Entries of one safetensors file, in the order of the file.

    Raises:
        NotFoundError: no such file.
        StorageError: not a whole safetensors file: as the format demands, tensors fill what follows the header without gap or
            overlap, and each has the bytes that its shape and dtype need.
    """
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= min(size - 8, _MOST_HEADER):
                raise _damaged(file, f"its header is said to have {length} bytes, of {size} in the file")
            header = handle.read(length)
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist; is the download complete?") from error
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}.") from error
    try:
        parsed = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "no valid safetensors header") from error
    if not isinstance(parsed, dict):
        raise _damaged(file, "no valid safetensors header")
    parsed.pop("__metadata__", None)
    base = 8 + length
    entries = sorted((_entry(file, name, spec, base) for name, spec in parsed.items()), key=lambda one: (one.start, one.stop))
    end = base
    for entry in entries:
        if entry.stop > size:
            raise _damaged(file, f"it ends within tensor {brief(entry.name)} ({size} bytes)")
        if entry.start != end:
            raise _damaged(file, f"tensor {brief(entry.name)} begins at byte {entry.start}, where {end} was expected")
        end = entry.stop
    if end != size:
        raise _damaged(file, f"its tensors end at byte {end} of {size}")
    return {entry.name: entry for entry in entries}


def _entry(file: Path, name: str, spec: object, base: int) -> TensorEntry:
    fields = spec if isinstance(spec, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(file, f"tensor {brief(name)} is described as {brief(spec)}")
    start, stop = offsets
    size = _SIZES.get(dtype)
    if start > stop or (size is not None and math.prod(shape) * size != stop - start):
        raise _damaged(file, f"tensor {brief(name)} has bytes {start} to {stop} for shape {brief(shape)} of {brief(dtype)}")
    return TensorEntry(name, file, dtype, tuple(shape), base + start, base + stop)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _damaged(file: Path, why: str) -> StorageError:
    return StorageError(f"{file} is damaged: {why}. {DOWNLOAD_AGAIN}")


def read_index(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model directory, from one `model.safetensors` or from the shards that its index names.

    Raises:
        NotFoundError: no safetensors weights there, or a shard is missing.
        StorageError: a file is damaged, or index and shards disagree.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        if (directory / SINGLE_FILE).exists():
            return read_header(directory / SINGLE_FILE)
        torch_only = " It has PyTorch .bin weights; convert them to safetensors." if list(directory.glob("*.bin")) else ""
        raise NotFoundError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.{torch_only}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _damaged(index, f"weight_map: expected an object of file names, got {brief(weight_map)}")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not _SHARD.fullmatch(shard):
            raise StorageError(f"{index} names the shard {brief(shard)}, which is not a plain file name. {DOWNLOAD_AGAIN}")
        if not (directory / shard).exists():
            lost = [name for name, file in weight_map.items() if file == shard]
            raise NotFoundError(
                f"{directory} lacks its shard {shard}, which holds {brief(lost[0])} and {len(lost) - 1} more tensors."
            )
        found = read_header(directory / shard)
        entries |= {name: entry for name, entry in found.items() if weight_map.get(name, shard) == shard}
    for name, shard in weight_map.items():
        if name not in entries:
            raise StorageError(
                f"{index} places tensor {brief(name)} in {shard}, but that file does not hold it. {DOWNLOAD_AGAIN}"
            )
    return entries


@dataclass(frozen=True)
class Plan:
    """A tensor to be written: its name, dtype (the format's name) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def plan(name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> Plan:
    """Plan of a float tensor."""
    return Plan(name, _NAMES[np.dtype(dtype)], shape, math.prod(shape) * np.dtype(dtype).itemsize)


def shards(plans: Iterable[Plan], max_bytes: int) -> list[list[Plan]]:
    """Splits tensors, in order, into groups of at most `max_bytes`; a larger tensor has a group of its own."""
    groups: list[list[Plan]] = []
    room = 0
    for one in plans:
        if not groups or one.nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(one)
        room -= one.nbytes
    return groups


def write(file: Path, plans: Sequence[Plan], tensors: Iterable[np.ndarray | Iterator[bytes | np.ndarray]]) -> None:
    """Writes one safetensors file; `tensors` yields each tensor, or its pieces in order, in the order of `plans`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in plans:
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [offset, offset + one.nbytes]}
        offset += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for one, tensor in zip(plans, tensors, strict=True):
            written = 0
            for piece in (tensor,) if isinstance(tensor, np.ndarray) else tensor:
                # numpy has no buffer protocol for bfloat16, hence the view as bytes.
                data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                written += out.write(data)
            assert written == one.nbytes, f"{one.name}: planned {one.nbytes} bytes, got {written}"
        out.flush()
        os.fsync(out.fileno())
