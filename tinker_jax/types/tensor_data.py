"""`TensorData`: a small dense or CSR tensor in one of the two dtypes of the API."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tinker_jax.types import _check
from tinker_jax.types._arrays import as_numpy, is_torch, widened
from tinker_jax.types._show import brief, listing
from tinker_jax.types.errors import ArgumentTypeError, BadRequestError, MissingPackageError

if TYPE_CHECKING:
    import jax
    import torch

TensorDtype = Literal["int64", "float32"]
AnyArray: TypeAlias = "npt.NDArray[Any] | jax.Array | torch.Tensor"

_NUMPY_DTYPES: dict[str, type[np.generic]] = {"int64": np.int64, "float32": np.float32}


@dataclass(frozen=True, eq=False, init=False)
class TensorData:
    """A tensor of `int64` or `float32`, dense or sparse (CSR). Equality and hash are by identity.

    Args:
        data: the values, of any shape when dense; the listed values in row order when sparse. Numbers in lists, or an array of
            NumPy, JAX or PyTorch. `None` is empty.
        dtype: `"int64"` or `"float32"`; required.
        shape: dense: `data` is reshaped to it. Sparse: the `[rows, columns]` of the dense tensor; required.
        sparse_crow_indices: row pointers, rows + 1 of them; their presence makes the tensor sparse.
        sparse_col_indices: column of each listed value, ascending within a row.

    Attributes:
        shape: a list, or None for a dense tensor made without one (then its shape is that of `to_numpy()`).

    Raises:
        ArgumentTypeError: no dtype (also a TypeError).
        BadRequestError: unknown dtype, what is no number, non-integral values for int64, a shape that does not fit, broken
            CSR indices, a sparse tensor that would not fit into memory once dense.
    """

    dtype: TensorDtype
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None
    _numpy: np.ndarray = field(repr=False)

    def __init__(
        self,
        data: Sequence[Any] | AnyArray | float | None = None,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | AnyArray | None = None,
        sparse_col_indices: Sequence[int] | AnyArray | None = None,
        *,
        _numpy: np.ndarray | None = None,  # `dataclasses.replace` hands the values over under the field's name
    ) -> None:
        if dtype is None:
            raise ArgumentTypeError("TensorData requires `dtype`; pass 'int64' or 'float32'")
        if not isinstance(dtype, str) or dtype not in _NUMPY_DTYPES:
            raise BadRequestError(f"dtype: expected 'int64' or 'float32', got {brief(dtype)}")
        values = _as_array(_numpy if data is None and _numpy is not None else data, dtype)
        sizes = None if shape is None else _as_shape(shape)
        crow = col = None
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            crow, col = _check_csr(values, sizes, sparse_crow_indices, sparse_col_indices)
        elif sizes is not None and list(values.shape) != sizes:
            values = _reshaped(values, sizes)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "sparse_crow_indices", crow)
        object.__setattr__(self, "sparse_col_indices", col)
        object.__setattr__(self, "_numpy", values)

    def __repr__(self) -> str:
        shape = list(self._numpy.shape) if self.shape is None else self.shape
        layout = "" if self.sparse_crow_indices is None else ", sparse"
        return f"TensorData(dtype={self.dtype!r}, shape={shape}{layout}, data={listing(self._numpy.ravel(), str)})"

    @property
    def data(self) -> list[Any]:
        """The stored values as one flat Python list (of a sparse tensor, the listed values only)."""
        return self._numpy.ravel().tolist()

    @classmethod
    def from_numpy(cls, array: AnyArray) -> TensorData:
        """A dense tensor of `array`, one of NumPy or JAX: floats become float32, signed integers int64; other kinds are a
        ValueError."""
        source = np.asarray(array) if isinstance(array, np.generic) else as_numpy(array, "from_numpy")
        if source is None:
            raise ArgumentTypeError(f"from_numpy: expected a numpy array, got {type(array).__name__}")
        if source.dtype.kind not in "fi":
            raise BadRequestError(
                f"Unsupported numpy dtype: {source.dtype}; expected floats or signed integers (cast it first)"
            )
        return cls(source, "float32" if source.dtype.kind == "f" else "int64", shape=list(source.shape))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """A dense tensor of `tensor`, on whatever device: any float becomes float32, any signed integer int64; bool is a
        ValueError, and so is a tensor that requires gradients, as in the SDK."""
        if not is_torch(tensor):
            raise ArgumentTypeError(f"from_torch: expected a torch tensor, got {type(tensor).__name__}")
        return cls.from_numpy(tensor)

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """As `from_torch`, but CSR where the tensor is 2-D and leaving out its `pad_value` entries saves space."""
        pad_value = _check_pad_value(pad_value)
        dense = cls.from_torch(tensor)
        values = dense.to_numpy()
        if values.ndim != 2:
            return dense
        rows, columns = np.nonzero(values != pad_value)
        crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=values.shape[0]))])
        if len(crow) + 2 * len(rows) >= values.size:
            return dense
        return cls(values[rows, columns], dense.dtype, list(values.shape), crow.tolist(), columns.tolist())

    @classmethod
    def _from_foreign(cls, other: Any) -> TensorData:
        sparse = other.sparse_crow_indices is not None
        try:
            values = other.data if sparse else other.to_numpy()
        except Exception as error:  # whatever a foreign class raises
            raise BadRequestError(f"data: this TensorData cannot be read: {error}") from error
        return cls(values, other.dtype, other.shape, other.sparse_crow_indices, other.sparse_col_indices)

    def to_numpy(self, pad_value: int = 0) -> npt.NDArray[Any]:
        """The dense array (of a dense tensor, the stored one, not a copy); unlisted entries are `pad_value`."""
        if self.sparse_crow_indices is None:
            return self._numpy
        assert self.shape is not None
        dense = np.full(self.shape, _check_pad_value(pad_value), dtype=self._numpy.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, np.asarray(self.sparse_col_indices, dtype=np.int64)] = self._numpy
        return dense

    def to_torch(self, pad_value: int = 0) -> torch.Tensor:
        """The dense tensor, as a torch tensor.

        Raises:
            MissingPackageError: PyTorch is not installed (also an ImportError).
        """
        try:
            import torch
        except ImportError:
            raise MissingPackageError("to_torch needs PyTorch installed; to_numpy() does not") from None
        return torch.from_numpy(self.to_numpy(pad_value))

    def tolist(self, pad_value: int = 0) -> list[Any]:
        """The dense tensor as nested lists."""
        return self.to_numpy(pad_value).tolist()

    def copy(self) -> TensorData:
        """The same tensor over memory of its own."""
        return TensorData(self._numpy.copy(), self.dtype, self.shape, self.sparse_crow_indices, self.sparse_col_indices)


def _as_array(data: Any, dtype: str) -> np.ndarray:
    """`data` in the numpy dtype of `dtype`, writable; refuses what is no number, and for int64 what the cast would change.
    Beyond float32's range a float becomes infinite."""
    if data is None:
        return np.empty(0, dtype=_NUMPY_DTYPES[dtype])
    array = as_numpy(data, "data")
    source = _of_items(data) if array is None else array
    if source.dtype.kind not in "biuf":
        source = _of_objects(data if array is None else array, dtype)
    if dtype == "int64" and source.dtype.kind == "f":
        wrong = source[~(np.isfinite(source) & (source == np.trunc(source)))]
        if wrong.size:
            raise BadRequestError(f"data: expected integers for dtype 'int64', got {wrong.flat[0]}")
    if dtype == "int64" and source.dtype.kind in "uf" and (large := np.abs(source) >= 2.0**63).any():
        raise BadRequestError(f"data: {source[large].flat[0]} does not fit dtype 'int64'")
    with np.errstate(over="ignore"):
        values = source.astype(_NUMPY_DTYPES[dtype], copy=False)
    # torch warns about, and could write through, read-only memory such as a memory map.
    return values if values.flags.writeable else values.copy()


def _of_items(data: Any) -> np.ndarray:
    """What NumPy makes of a list, which may hold arrays of others."""
    if _check.is_text(data):
        raise _check.refuse("data", "numbers", data)
    try:
        return widened(np.asarray(data))
    except ValueError:
        raise BadRequestError(
            "data: expected numbers in a rectangular list, got rows of different lengths or lists nested too deep"
        ) from None
    except Exception as error:  # whatever an item raises when it is read
        raise BadRequestError(f"data: expected numbers, got {type(data).__name__}: {error}") from error


def _of_objects(data: Any, dtype: str) -> np.ndarray:
    """`data` with items that NumPy has no number type for: huge integers, fractions, or text among the numbers."""
    items = np.asarray(data, dtype=object)
    values = []
    for item in items.flat:
        value = int(item) if isinstance(item, (bool, np.bool_)) else _check.number(item, "data")
        if value is None:
            raise _check.refuse("data", "numbers", item)
        if dtype == "int64" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if dtype == "int64" and not isinstance(value, Integral):
            raise BadRequestError(f"data: expected integers for dtype 'int64', got {brief(item)}")
        try:
            values.append(np.int64(int(value)) if dtype == "int64" else float(value))
        except OverflowError:
            raise BadRequestError(f"data: {brief(item)} does not fit dtype {dtype!r}") from None
    return np.array(values).reshape(items.shape)


def _as_shape(shape: Any) -> list[int]:
    array = as_numpy(shape, "shape")
    sizes = shape if array is None else array.tolist()
    if not _check.is_list(sizes):
        raise _check.refuse("shape", "a list of sizes", shape)
    return [_check.integer(size, f"shape[{i}]", minimum=0) for i, size in enumerate(sizes)]


def _reshaped(values: np.ndarray, shape: list[int]) -> np.ndarray:
    error = BadRequestError(f"shape: {values.size} values cannot take the shape {brief(shape)}")
    if math.prod(shape) != values.size:
        raise error
    try:
        return values.reshape(shape)
    except ValueError:  # NumPy has 64 axes at most
        raise error from None


def _check_csr(values: np.ndarray, shape: list[int] | None, crow: Any, col: Any) -> tuple[list[int], list[int]]:
    if crow is None or col is None:
        raise BadRequestError("sparse_crow_indices and sparse_col_indices come together; one of them is missing")
    if shape is None or len(shape) != 2:
        raise BadRequestError(f"shape: a sparse tensor needs [rows, columns], got {brief(shape)}")
    if values.ndim != 1:
        raise BadRequestError(f"data: the values of a sparse tensor are one flat list, got {values.ndim} axes")
    rows, width = shape
    dense = max(rows, 1) * max(width, 1) * values.itemsize
    if dense > _memory():
        raise BadRequestError(f"shape: {shape} takes {dense:,} bytes when it is made dense, and this machine has {_memory():,}")
    pointers, columns = _as_indices("sparse_crow_indices", crow), _as_indices("sparse_col_indices", col)
    if pointers.shape != (rows + 1,) or pointers[0] != 0 or pointers[-1] != values.size or np.any(np.diff(pointers) < 0):
        raise BadRequestError(
            f"sparse_crow_indices: expected {rows + 1} ascending pointers from 0 to {values.size}, got {brief(crow)}"
        )
    if columns.shape != values.shape or np.any(columns < 0) or np.any(columns >= width):
        raise BadRequestError(f"sparse_col_indices: expected {values.size} columns in [0, {width}), got {brief(col)}")
    row_of = np.repeat(np.arange(rows), np.diff(pointers))
    if np.any((np.diff(row_of) == 0) & (np.diff(columns) <= 0)):
        raise BadRequestError("sparse_col_indices: columns of a row must ascend and not repeat")
    return pointers.tolist(), columns.tolist()


def _as_indices(name: str, indices: Any) -> np.ndarray:
    try:
        return _as_array(indices, "int64")
    except BadRequestError as error:
        raise BadRequestError(f"{name}: expected integers: {error.message.removeprefix('data: ')}") from None


def _memory() -> int:
    """Bytes of memory that the machine has; on a system that does not tell, more than any has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**62


def _check_pad_value(pad_value: Any) -> int:
    if isinstance(pad_value, bool) or not isinstance(pad_value, (int, np.integer)):
        raise ArgumentTypeError(f"pad_value must be an integer, got {type(pad_value).__name__}: {brief(pad_value)}")
    return _check.integer(pad_value, "pad_value")
