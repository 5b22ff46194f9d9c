"""Tensors under the names and shapes of the model's bf16 checkpoint, whatever their encoding on disk.

Besides plain floats, X may be stored as one of these (E experts, N rows, K columns, G blocks of a row):

- `mxfp4` (gpt-oss): `X_blocks` U8 [E, N, G, 16] and `X_scales` U8 [E, N, G] → X [E, 32·G, N],
  X[e, j, n] = e2m1 code j of row n · 2^(scale of block j // 32 - 127).
- `fp8` in blocks of n × k (DeepSeek-V3, Qwen3-FP8): `X` F8_E4M3 [N, K] and `X_scale_inv` [⌈N/n⌉, ⌈K/k⌉] → X [N, K],
  X[i, j] = e4m3 · scale[i // n, j // k]; the last blocks may be partial, and all may have a leading axis of experts.
- `compressed-tensors` with 4-bit integers in groups of g (Kimi-K2-Thinking): `X_packed` I32 [N, K/8], `X_scale` [N, K/g] and
  `X_shape` [2] → X [N, K], X[i, j] = (code j of row i - 8) · scale[i, j // g].

The lower half of a byte is the earlier code, and so is the lower byte of an integer. Values are products in float32, rounded
to bfloat16: bit for bit what transformers makes of MXFP4 and of FP8 in whole blocks.

References:
    OCP Microscaling Formats (MX) Specification 1.0: e2m1, and scales that are powers of two.
    DeepSeek-V3 Technical Report, https://arxiv.org/abs/2412.19437, section 3.3: blocks of 128 × 128.
    https://github.com/vllm-project/compressed-tensors: the format pack-quantized.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from tinker_jax.checkpoints.tensor_files import DTYPES, TensorEntry
from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import UnprocessableEntityError, UnsupportedError

_BF16 = DTYPES["BF16"]
#: Rows that are decoded at once: the scratch space is small, and stays in a core's cache.
_ROWS = 64
_SUPPORTED = "supported are mxfp4, fp8 in blocks, and compressed-tensors with 4-bit integers in groups"
_USE_BF16 = "Use the model's bf16 checkpoint."

# An encoding tells how to find the parts of X, and how to read them:
#   method: what config.json calls it.
#   suffix, codes: end of the name, and dtype, of the part that holds the codes.
#   companions, excluded: ends of the names of the other parts, and of parts that would change X in ways not implemented.
#   shape(*parts): the shape of X; checks that the parts agree.
#   fill(out, start, *parts): writes X into `out`, from index `start` of the leading axis on.


@dataclass(frozen=True)
class Mxfp4:
    """4-bit floats in blocks of 32 that share a power of two. X is the transpose, for each expert, of what is stored."""

    method: ClassVar[str] = "mxfp4"
    suffix: ClassVar[str] = "_blocks"
    codes: ClassVar[str] = "U8"
    companions: ClassVar[tuple[str, ...]] = ("_scales",)
    excluded: ClassVar[tuple[str, ...]] = ()

    def shape(self, blocks: TensorEntry, scales: TensorEntry) -> tuple[int, ...]:
        if len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise _wrong(blocks, "U8 [experts, rows, blocks, 16]")
        E, N, G, _ = blocks.shape
        _require(scales, ("U8",), (E, N, G))
        return E, 32 * G, N

    def fill(self, out: np.ndarray, start: int, blocks: TensorEntry, scales: TensorEntry) -> None:
        pairs = _mxfp4_pairs()
        for e, X in enumerate(out, start):
            codes_NGC, scale_NG = _rows(blocks, np.uint8, e, e + 1)[0], _rows(scales, np.uint8, e, e + 1)[0]
            for i in range(0, len(codes_NGC), _ROWS):
                rows = slice(i, i + _ROWS)
                index = scale_NG[rows, :, None].astype(np.uint16) << 8 | codes_NGC[rows]
                X[:, rows] = pairs.take(index).view(_BF16).reshape(len(index), len(X)).T


@dataclass(frozen=True)
class Fp8:
    """8-bit floats in blocks of rows × columns that share a factor."""

    block: tuple[int, int]

    method: ClassVar[str] = "fp8"
    suffix: ClassVar[str] = ""
    codes: ClassVar[str] = "F8_E4M3"
    companions: ClassVar[tuple[str, ...]] = ("_scale_inv",)
    excluded: ClassVar[tuple[str, ...]] = ()

    def shape(self, weight: TensorEntry, scale: TensorEntry) -> tuple[int, ...]:
        if len(weight.shape) not in (2, 3):
            raise _wrong(weight, "F8_E4M3 of 2 or 3 axes")
        *lead, N, K = weight.shape
        n, k = self.block
        _require(scale, ("F32", "BF16"), (*lead, -(-N // n), -(-K // k)))
        return weight.shape

    def fill(self, out: np.ndarray, start: int, weight: TensorEntry, scale: TensorEntry) -> None:
        dtype = scale.stored_dtype
        if out.ndim == 3:
            for e, X in enumerate(out, start):
                self._decode(X, 0, _rows(weight, np.uint8, e, e + 1)[0], _rows(scale, dtype, e, e + 1)[0])
        else:
            n, stop = self.block[0], start + len(out)
            scales = _rows(scale, dtype, start // n, -(-stop // n))
            self._decode(out, start % n, _rows(weight, np.uint8, start, stop), scales)

    def _decode(self, X: np.ndarray, skipped: int, codes_NK: np.ndarray, scales: np.ndarray) -> None:
        """Rows of X, of whose first block of rows `skipped` are left out."""
        n, k, values = self.block[0], min(self.block[1], X.shape[1]), _e4m3()
        for i, scale in enumerate(scales.astype(np.float32)):
            rows = slice(max(i * n - skipped, 0), (i + 1) * n - skipped)
            X[rows] = values.take(codes_NK[rows]) * np.repeat(scale, k)[: X.shape[1]]


@dataclass(frozen=True)
class Int4:
    """4-bit integers, symmetric about 0, in groups of columns that share a factor."""

    group: int

    method: ClassVar[str] = "compressed-tensors"
    suffix: ClassVar[str] = "_packed"
    codes: ClassVar[str] = "I32"
    companions: ClassVar[tuple[str, ...]] = ("_scale", "_shape")
    excluded: ClassVar[tuple[str, ...]] = ("_zero_point", "_g_idx")

    def shape(self, packed: TensorEntry, scale: TensorEntry, shape: TensorEntry) -> tuple[int, ...]:
        if len(packed.shape) != 2 or 8 * packed.shape[1] % self.group:
            raise _wrong(packed, f"I32 [rows, columns / 8], with columns a multiple of group_size={self.group}")
        N, K = packed.shape[0], 8 * packed.shape[1]
        _require(scale, ("F32", "BF16"), (N, K // self.group))
        _require(shape, ("I32", "I64"), (2,))
        return N, K

    def fill(self, out: np.ndarray, start: int, packed: TensorEntry, scale: TensorEntry, shape: TensorEntry) -> None:
        held, said = [packed.shape[0], 8 * packed.shape[1]], _rows(shape, f"<i{shape.nbytes // 2}", 0, 2).tolist()
        if held != said:
            raise UnprocessableEntityError(
                f"tensor {brief(shape.name)} in {shape.file}: expected {held}, the shape of what {brief(packed.name)} holds, "
                f"got {said}."
            )
        pairs, groups = _int4_pairs(), out.shape[1] // self.group
        codes_NC = _rows(packed, "<i4", start, start + len(out)).view(np.uint8)
        scale_NG = _rows(scale, scale.stored_dtype, start, start + len(out)).astype(np.float32)
        for i in range(0, len(out), _ROWS):
            rows = slice(i, i + _ROWS)
            values = pairs.take(codes_NC[rows]).view(np.float32)
            products = values.reshape(len(values), groups, self.group) * scale_NG[rows, :, None]
            out[rows] = products.reshape(values.shape)


Quantization = Mxfp4 | Fp8 | Int4
_KINDS: tuple[type[Quantization], ...] = (Mxfp4, Fp8, Int4)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the model.

    Attributes:
        name: as in the model's bf16 checkpoint.
        shape: of the tensor, not of its parts on disk.
        sources: where its parts lie; of a plain tensor, one.
        quantization: how it is encoded; None is plain.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[TensorEntry, ...]
    quantization: Quantization | None = None

    @property
    def file(self) -> Path:
        return self.sources[0].file

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all parts."""
        return sum(source.nbytes for source in self.sources)

    @property
    def is_encoded(self) -> bool:
        return self.quantization is not None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `read()`: bfloat16 of an encoded tensor, else the dtype on disk.

        Raises:
            UnsupportedError: plain, and other than float32, float16 and bfloat16.
        """
        return _BF16 if self.is_encoded else self.sources[0].stored_dtype

    def read(self) -> np.ndarray:
        """The tensor in host memory.

        Raises:
            UnsupportedError: as `dtype`.
            StorageError: a file cannot be read.
            UnprocessableEntityError: parts on disk contradict each other.
        """
        if self.quantization is None:
            return self.sources[0].read()
        return self._decoded(self.quantization, 0, self.shape[0])

    def part(self, index: int) -> np.ndarray:
        """Index `index` of the leading axis (an expert, say) without that axis; reads no other. Raises: as `read`."""
        if self.quantization is None:
            return self.sources[0].rows(index, index + 1).read()[0]
        return self._decoded(self.quantization, index, index + 1)[0]

    def _decoded(self, quantization: Quantization, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), _BF16)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite on disk is not finite in the tensor
            quantization.fill(out, start, *self.sources)
        return out


def quantization(config_json: Mapping[str, Any]) -> Quantization | None:
    """The encoding that `quantization_config` of a config.json (or of its `text_config`) announces; None without one.

    Lists of modules that are not quantised need no attention: a tensor that has no scales is plain.

    Raises:
        BadRequestError: a field has a value of the wrong kind.
        UnsupportedError: an encoding, or a variant of one, that cannot be read.
    """
    place, section = "config.json: quantization_config", config_json.get("quantization_config")
    text = config_json.get("text_config")
    if section is None and isinstance(text, Mapping):
        place, section = "config.json: text_config.quantization_config", text.get("quantization_config")
    if section is None:
        return None
    section = _object(section, place)
    method = section.get("quant_method")
    if method == Mxfp4.method:
        return Mxfp4()
    if method == Fp8.method:
        return _fp8(section, place)
    if method == Int4.method:
        return _int4(section, place)
    raise UnsupportedError(f"{place}: quant_method={brief(method)} is not supported; {_SUPPORTED}. {_USE_BF16}")


def _fp8(section: Mapping[str, Any], place: str) -> Fp8:
    _only(section, place, "fmt", "e4m3", "e4m3")
    block = section.get("weight_block_size", [128, 128])
    if block is None:
        raise UnsupportedError(
            f"{place}.weight_block_size=None (one scale for all of a tensor) is not supported; {_SUPPORTED}. {_USE_BF16}"
        )
    if not _check.is_list(block) or len(block) != 2:
        raise _check.refuse(f"{place}.weight_block_size", "a list of two integers", block)
    n, k = (_check.integer(size, f"{place}.weight_block_size", minimum=1, maximum=2**31 - 1) for size in block)
    return Fp8((n, k))


def _int4(section: Mapping[str, Any], place: str) -> Int4:
    for key in ("sparsity_config", "transform_config"):
        if section.get(key):
            raise UnsupportedError(f"{place}.{key} is not supported; {_SUPPORTED}. {_USE_BF16}")
    groups = _object(section.get("config_groups"), f"{place}.config_groups")
    if len(groups) != 1:
        raise UnsupportedError(
            f"{place}.config_groups: {len(groups)} groups ({brief(list(groups))}) are not supported; only one is. {_USE_BF16}"
        )
    (label, group), *_ = groups.items()
    place = f"{place}.config_groups.{label[:80]}"
    group = _object(group, place)
    # Newer files name the format for each group, older ones once for all of them.
    layout = section.get("format") if group.get("format") is None else group["format"]
    if layout != "pack-quantized":
        raise UnsupportedError(f"{place}: format={brief(layout)} is not supported; only 'pack-quantized' is. {_USE_BF16}")
    weights = _object(group.get("weights"), f"{place}.weights")
    for key, supported, default in (
        ("num_bits", 4, 8),
        ("type", "int", "int"),
        ("symmetric", True, True),
        ("strategy", "group", None),
        ("actorder", None, None),
    ):
        _only(weights, f"{place}.weights", key, supported, default)
    size = _check.integer(weights.get("group_size"), f"{place}.weights.group_size", minimum=1, maximum=2**31 - 1)
    if size % 8:
        raise UnsupportedError(f"{place}.weights.group_size={size} is not supported; only multiples of 8 are. {_USE_BF16}")
    return Int4(size)


def _object(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _check.refuse(place, "an object", value)
    return value


def _only(section: Mapping[str, Any], place: str, key: str, supported: object, default: object) -> None:
    value = section.get(key, default)
    if value != supported:
        raise UnsupportedError(f"{place}.{key}={brief(value)} is not supported; only {supported!r} is. {_USE_BF16}")


def stored_tensors(entries: Mapping[str, TensorEntry], quantization: Quantization | None) -> dict[str, StoredTensor]:
    """The model's tensors by name, in the order of `entries`. Entries that belong to no encoding are plain tensors.

    Raises:
        UnprocessableEntityError: parts of a quantised weight that are missing, or of another shape or dtype than the weight
            needs, or that config.json does not announce. Nothing but headers is needed to tell.
    """
    encoded: dict[str, StoredTensor] = {}  # by the entry that holds the codes
    parts: set[str] = set()
    for entry in entries.values():
        kind = next((kind for kind in _KINDS if _holds_codes(entry, kind)), None)
        if kind is None:
            continue
        if not isinstance(quantization, kind):
            announced = "none" if quantization is None else repr(quantization.method)
            raise UnprocessableEntityError(
                f"tensor {brief(entry.name)} in {entry.file} is stored as {entry.dtype}: expected quant_method {kind.method!r} "
                f"in config.json's quantization_config, got {announced}."
            )
        name = entry.name.removesuffix(kind.suffix)
        sources = (entry, *(_companion(entries, entry, name + suffix) for suffix in kind.companions))
        for suffix in kind.excluded:
            if name + suffix in entries:
                raise UnprocessableEntityError(
                    f"tensor {brief(name + suffix)} in {entries[name + suffix].file}: expected none, since config.json's "
                    "quantization_config says that weights are symmetric and in order."
                )
        encoded[entry.name] = StoredTensor(name, quantization.shape(*sources), sources, quantization)
        parts.update(source.name for source in sources)
    tensors: dict[str, StoredTensor] = {}
    for entry in entries.values():
        if entry.name in parts and entry.name not in encoded:
            continue
        tensor = encoded.get(entry.name) or StoredTensor(entry.name, entry.shape, (entry,))
        if tensor.name in tensors:
            raise UnprocessableEntityError(
                f"{tensor.file} holds tensor {brief(tensor.name)} twice, plain and quantised; expected one of them."
            )
        tensors[tensor.name] = tensor
    return tensors


def _holds_codes(entry: TensorEntry, kind: type[Quantization]) -> bool:
    return entry.dtype == kind.codes and entry.name.endswith(kind.suffix)


def _companion(entries: Mapping[str, TensorEntry], entry: TensorEntry, name: str) -> TensorEntry:
    if name not in entries:
        raise UnprocessableEntityError(
            f"tensor {brief(entry.name)} in {entry.file} is stored as {entry.dtype}: expected tensor {brief(name)} beside it, "
            "which the checkpoint lacks."
        )
    return entries[name]


def _require(entry: TensorEntry, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if entry.dtype not in dtypes or entry.shape != shape:
        raise _wrong(entry, f"{' or '.join(dtypes)} {list(shape)}")


def _wrong(entry: TensorEntry, expected: str) -> UnprocessableEntityError:
    return UnprocessableEntityError(
        f"tensor {brief(entry.name)} in {entry.file}: expected {expected}, got {entry.dtype[:20]} {list(entry.shape)}. "
        "Do config.json and weights belong together?"
    )


def _rows(entry: TensorEntry, dtype: DTypeLike, start: int, stop: int) -> np.ndarray:
    """Indices `start` to `stop` of the leading axis, their bytes taken for `dtype`."""
    return np.frombuffer(entry.rows(start, stop).read_bytes(), dtype).reshape(stop - start, *entry.shape[1:])


@functools.cache
def _mxfp4_pairs() -> np.ndarray:
    """For each scale and byte, at `scale · 256 + byte`, both values in bfloat16, side by side in 4 bytes."""
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    e2m1 = np.concatenate([e2m1, -e2m1])
    byte = np.arange(256)
    with np.errstate(over="ignore"):  # 2^128 is infinite
        values = np.ldexp(e2m1, np.arange(256)[:, None] - 127).astype(_BF16)
    return np.stack([values[:, byte & 15], values[:, byte >> 4]], axis=-1).view(np.uint32).reshape(-1)


@functools.cache
def _e4m3() -> np.ndarray:
    """The value of each byte, float32. A table is three times as fast as ml_dtypes' conversion."""
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@functools.cache
def _int4_pairs() -> np.ndarray:
    """For each byte both integers in float32, side by side in 8 bytes."""
    byte = np.arange(256)
    return (np.stack([byte & 15, byte >> 4], axis=-1) - 8).astype(np.float32).view(np.uint64).reshape(-1)
