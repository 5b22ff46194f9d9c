"""`ModelInput` and the chunks it is made of."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from tinker_jax.types import _check
from tinker_jax.types._arrays import as_numpy
from tinker_jax.types._show import listing
from tinker_jax.types.coerce import coerce
from tinker_jax.types.errors import BadRequestError
from tinker_jax.types.tensor_data import AnyArray


@dataclass(frozen=True, kw_only=True)
class EncodedTextChunk:
    """Token ids of text.

    Attributes:
        tokens: Python ints; a tuple stays a tuple, any other sequence, or an array of NumPy, JAX or PyTorch, becomes a list.
    """

    tokens: Sequence[int]
    type: Literal["encoded_text"] = "encoded_text"

    if TYPE_CHECKING:
        # What is taken is more than what is kept.
        def __init__(self, *, tokens: Sequence[int] | AnyArray, type: Literal["encoded_text"] = "encoded_text") -> None: ...

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("encoded_text",), "EncodedTextChunk.type")
        object.__setattr__(self, "tokens", _as_tokens(self.tokens))

    def __repr__(self) -> str:
        tokens = repr(self.tokens) if len(self.tokens) <= 8 else listing(self.tokens)
        return f"EncodedTextChunk(tokens={tokens}, type={self.type!r})"

    @property
    def length(self) -> int:
        """Positions taken in the context."""
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class ImageChunk:
    """An encoded image. Text models refuse it; it is here so that data can be described.

    Attributes:
        data: the file's bytes (a base64 string is decoded).
        expected_tokens: positions the image should take; `length` needs it.
    """

    data: bytes = field(repr=False)
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("image",), "ImageChunk.type")
        _check.one_of(self.format, ("png", "jpeg"), "ImageChunk.format")
        object.__setattr__(self, "data", _as_bytes(self.data, "ImageChunk.data"))
        _check_expected_tokens(self)

    @property
    def length(self) -> int:
        """Positions taken in the context; ValueError where `expected_tokens` is unset."""
        return _expected_length(self.expected_tokens, "ImageChunk")


@dataclass(frozen=True, kw_only=True)
class ImageAssetPointerChunk:
    """An image by location. Text models refuse it."""

    format: Literal["png", "jpeg"]
    location: str
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("image_asset_pointer",), "ImageAssetPointerChunk.type")
        _check.one_of(self.format, ("png", "jpeg"), "ImageAssetPointerChunk.format")
        _check.text(self.location, "ImageAssetPointerChunk.location")
        _check_expected_tokens(self)

    @property
    def length(self) -> int:
        """Positions taken in the context; ValueError where `expected_tokens` is unset."""
        return _expected_length(self.expected_tokens, "ImageAssetPointerChunk")


@dataclass(frozen=True, kw_only=True)
class DmelChunk:
    """Audio as a serialised tensor of frames (a base64 string is decoded). Text models refuse it."""

    dmel: bytes = field(repr=False)
    type: Literal["dmel"] = "dmel"

    def __post_init__(self) -> None:
        _check.one_of(self.type, ("dmel",), "DmelChunk.type")
        object.__setattr__(self, "dmel", _as_bytes(self.dmel, "DmelChunk.dmel"))

    @property
    def length(self) -> int:
        """Frames: the first axis of the serialised tensor."""
        return _container_shape(self.dmel)[0]


ModelInputChunk: TypeAlias = EncodedTextChunk | ImageAssetPointerChunk | ImageChunk | DmelChunk

_CHUNK_TYPES: dict[str, type] = {
    "encoded_text": EncodedTextChunk,
    "image_asset_pointer": ImageAssetPointerChunk,
    "image": ImageChunk,
    "dmel": DmelChunk,
}


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A sequence of chunks. Methods that add to it return a new one.

    Attributes:
        chunks: a list; dicts with a `type` and chunks of the `tinker` package are converted.
    """

    chunks: list[ModelInputChunk]

    def __post_init__(self) -> None:
        if not _check.is_list(self.chunks):
            raise _check.refuse("ModelInput.chunks", "a list of chunks", self.chunks)
        chunks = [_as_chunk(chunk, f"ModelInput.chunks[{i}]") for i, chunk in enumerate(self.chunks)]
        object.__setattr__(self, "chunks", chunks)

    def __repr__(self) -> str:
        return f"ModelInput(chunks={listing(self.chunks)})"

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | AnyArray) -> ModelInput:
        """One text chunk of `tokens`: a sequence of integers, or an array of NumPy, JAX or PyTorch with one axis."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])

    def to_ints(self) -> list[int]:
        """All token ids; ValueError where a chunk is not text."""
        for i, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise BadRequestError(f"to_ints: chunks[{i}] is {type(chunk).__name__}, which has no token ids")
        return [token for chunk in self.chunks for token in chunk.tokens]  # type: ignore[union-attr]

    @property
    def length(self) -> int:
        """Positions taken in the context."""
        return sum(chunk.length for chunk in self.chunks)

    @classmethod
    def empty(cls) -> ModelInput:
        """No chunks."""
        return cls(chunks=[])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A new input with `chunk` at the end."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token, in a chunk of its own."""
        return self.append(EncodedTextChunk(tokens=[token]))


def _as_chunk(value: Any, what: str) -> ModelInputChunk:
    if isinstance(value, (EncodedTextChunk, ImageChunk, ImageAssetPointerChunk, DmelChunk)):
        return value
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    cls = _CHUNK_TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise _check.refuse(what, "a chunk such as EncodedTextChunk", value)
    if isinstance(value, Mapping):
        try:
            return cls(**value)
        except TypeError as error:
            raise BadRequestError(f"{what}: {error}") from None
    return coerce(cls, value, what)


def _as_tokens(tokens: Any) -> Sequence[int]:
    """Checked Python ints: integers, booleans and integral floats pass, as in the SDK, but no array of booleans."""
    field_name = "EncodedTextChunk.tokens"
    array = as_numpy(tokens, field_name)
    if array is not None:
        if array.ndim != 1:
            raise BadRequestError(f"{field_name}: expected one axis, got shape {list(array.shape)}")
        if array.dtype.kind not in "iuf":
            raise BadRequestError(f"{field_name}: expected integers, got an array of {array.dtype}")
    else:
        if not _check.is_list(tokens):
            hint = " (of what a tokenizer returns, take ['input_ids'])" if isinstance(tokens, Mapping) else ""
            raise _check.refuse(field_name, f"a list of token ids{hint}", tokens)
        try:
            array = np.asarray(tokens) if len(tokens) else np.empty(0, np.int64)
        except Exception:  # nested lists of different lengths, or whatever an item raises when it is read
            raise _odd_token(field_name, tokens) from None
        if array.ndim != 1 or array.dtype.kind not in "iubf":
            raise _odd_token(field_name, tokens)
    if array.dtype.kind == "f":
        wrong = np.flatnonzero(~(np.isfinite(array) & (array == np.trunc(array))))
        if wrong.size:
            raise BadRequestError(f"{field_name}[{wrong[0]}]: expected an integer, got {array[wrong[0]]}")
    if array.dtype.kind in "uf" and (np.abs(array) >= 2.0**63).any():
        raise _odd_token(field_name, array.tolist())
    ints = array.astype(np.int64, copy=False).tolist()
    return tuple(ints) if isinstance(tokens, tuple) else ints


def _odd_token(field_name: str, tokens: Sequence[Any]) -> BadRequestError:
    """The error for the first of `tokens` that is no number, or too large."""
    for i, token in enumerate(tokens):
        number = int(token) if isinstance(token, (bool, np.bool_)) else _check.number(token, f"{field_name}[{i}]")
        if number is None:
            return _check.refuse(f"{field_name}[{i}]", "an integer", token)
        if not abs(number) < 2**63:
            return _check.refuse(f"{field_name}[{i}]", "an integer below 2**63", token)
    return _check.refuse(field_name, "integers", tokens)


def _as_bytes(value: Any, field_name: str) -> bytes:
    if isinstance(value, str):
        try:
            return base64.b64decode(value)
        except ValueError as error:
            raise BadRequestError(f"{field_name}: not base64: {error}") from None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise _check.refuse(field_name, "bytes", value)


def _check_expected_tokens(chunk: ImageChunk | ImageAssetPointerChunk) -> None:
    if chunk.expected_tokens is not None:
        field_name = f"{type(chunk).__name__}.expected_tokens"
        object.__setattr__(chunk, "expected_tokens", _check.integer(chunk.expected_tokens, field_name, minimum=0))


def _expected_length(expected_tokens: int | None, chunk: str) -> int:
    if expected_tokens is None:
        raise BadRequestError(f"{chunk}.expected_tokens must be set before the length of the input is known")
    return expected_tokens


def _container_shape(data: bytes) -> list[int]:
    """Shape in the header of a serialised tensor: [0xFE if constant] dtype(0..7) varint(ndim) varint(dim)*."""
    position = 1 if data[:1] == b"\xfe" else 0
    if position >= len(data):
        raise BadRequestError("DmelChunk.dmel: the tensor header is cut short")
    if data[position] > 7:
        raise BadRequestError(f"DmelChunk.dmel: unknown dtype byte {data[position]}")
    position += 1

    def varint() -> int:
        nonlocal position
        value, shift = 0, 0
        while True:
            if position >= len(data) or shift > 63:
                raise BadRequestError("DmelChunk.dmel: the tensor header is cut short")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7

    shape = [varint() for _ in range(varint())]
    if not shape:
        raise BadRequestError("DmelChunk.dmel: the tensor has no frame axis")
    return shape
