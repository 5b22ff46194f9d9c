"""`TensorData`: a small dense or CSR tensor in one of the two dtypes of the API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tinker_jax.types import _check
from tinker_jax.types.errors import BadRequestError

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["int64", "float32"]

_NUMPY_DTYPES: dict[str, type[np.generic]] = {"int64": np.int64, "float32": np.float32}


@dataclass(frozen=True, eq=False, init=False)
class TensorData:
    """A tensor of `int64` or `float32`, dense or sparse (CSR). Equality and hash are by identity.

    Args:
        data: the values, of any shape when dense; the listed values in row order when sparse. `None` is empty.
        dtype: `"int64"` or `"float32"`; required.
        shape: dense: `data` is reshaped to it. Sparse: the `[rows, columns]` of the dense tensor; required.
        sparse_crow_indices: row pointers, rows + 1 of them; their presence makes the tensor sparse.
        sparse_col_indices: column of each listed value, ascending within a row.

    Attributes:
        shape: a list, or None for a dense tensor made without one (then its shape is that of `to_numpy()`).

    Raises:
        TypeError: no dtype.
        BadRequestError: unknown dtype, what is no number, non-integral values for int64, a shape that does not fit, broken
            CSR indices.
    """

    dtype: TensorDtype
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None
    _numpy: np.ndarray = field(repr=False)

    def __init__(
        self,
        data: list[Any] | np.ndarray | None = None,
        dtype: TensorDtype | None = None,
        shape: list[int] | None = None,
        sparse_crow_indices: list[int] | None = None,
        sparse_col_indices: list[int] | None = None,
        *,
        _numpy: np.ndarray | None = None,  # `dataclasses.replace` hands the values over under the field's name
    ) -> None:
        if dtype is None:
            raise TypeError("TensorData requires `dtype`")
        if dtype not in _NUMPY_DTYPES:
            raise BadRequestError(f"dtype: expected 'int64' or 'float32', got {dtype!r}")
        values = _as_array(_numpy if data is None and _numpy is not None else data, dtype)
        shape = None if shape is None else _as_shape(shape)
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            sparse_crow_indices, sparse_col_indices = _check_csr(values, shape, sparse_crow_indices, sparse_col_indices)
        elif shape is not None and list(values.shape) != shape:
            try:
                values = values.reshape(shape)
            except ValueError:
                raise BadRequestError(f"shape: {values.size} values cannot take the shape {shape}") from None
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "sparse_crow_indices", sparse_crow_indices)
        object.__setattr__(self, "sparse_col_indices", sparse_col_indices)
        object.__setattr__(self, "_numpy", values)

    @property
    def data(self) -> list[Any]:
        """The stored values as one flat Python list (of a sparse tensor, the listed values only)."""
        return self._numpy.ravel().tolist()

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        """A dense tensor of `array`: floats become float32, signed integers int64; other kinds are a ValueError."""
        if not hasattr(array, "dtype"):
            raise TypeError(f"from_numpy: expected a numpy array, got {type(array).__name__}")
        if array.dtype.kind not in "fi":
            raise BadRequestError(f"Unsupported numpy dtype: {array.dtype}; expected floats or signed integers (cast it first)")
        return cls(array, "float32" if array.dtype.kind == "f" else "int64", shape=list(array.shape))

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        """A dense tensor of `tensor`: any float becomes float32, any signed integer int64; bool is a ValueError."""
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()  # numpy has no bfloat16
        return cls.from_numpy(tensor.contiguous().numpy())

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
        values = np.asarray(other.data) if sparse else other.to_numpy()
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
        """The dense tensor, as a torch tensor."""
        import torch

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
    try:
        source = data if isinstance(data, np.ndarray) else np.asarray(data)
    except ValueError:
        raise BadRequestError("data: expected numbers in a rectangular list, got rows of different lengths") from None
    if source.dtype.kind not in "biufV":  # V: bfloat16
        source = _from_objects(data, dtype)
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


def _from_objects(data: Any, dtype: str) -> np.ndarray:
    """`data` whose items numpy has no number type for: huge integers, say, or text among the numbers."""
    for item in _items(data):
        if not isinstance(item, Real) and (isinstance(item, np.generic) or not hasattr(item, "__float__")):
            raise _check.refuse("data", "numbers", item)
    try:
        return np.asarray(data, dtype=_NUMPY_DTYPES[dtype])
    except OverflowError:
        largest = max(_items(data), key=abs)
        raise BadRequestError(f"data: {largest} does not fit dtype {dtype!r}") from None


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, (list, tuple)):
        for part in data:
            yield from _items(part)
    else:
        yield from data.flat if isinstance(data, np.ndarray) else (data,)


def _as_shape(shape: Any) -> list[int]:
    try:
        sizes = list(shape)
    except TypeError:
        raise _check.refuse("shape", "a list of sizes", shape) from None
    return [_check.integer(size, f"shape[{i}]", minimum=0) for i, size in enumerate(sizes)]


def _check_csr(
    values: np.ndarray, shape: list[int] | None, crow: list[int] | None, col: list[int] | None
) -> tuple[list[int], list[int]]:
    if crow is None or col is None:
        raise BadRequestError("sparse_crow_indices and sparse_col_indices come together; one of them is missing")
    if shape is None or len(shape) != 2:
        raise BadRequestError(f"shape: a sparse tensor needs [rows, columns], got {shape}")
    if values.ndim != 1:
        raise BadRequestError(f"data: the values of a sparse tensor are one flat list, got {values.ndim} axes")
    pointers, columns = _as_indices("sparse_crow_indices", crow), _as_indices("sparse_col_indices", col)
    rows, width = shape
    if pointers.shape != (rows + 1,) or pointers[0] != 0 or pointers[-1] != values.size or np.any(np.diff(pointers) < 0):
        raise BadRequestError(
            f"sparse_crow_indices: expected {rows + 1} ascending pointers from 0 to {values.size}, got {crow}"
        )
    if columns.shape != values.shape or np.any(columns < 0) or np.any(columns >= width):
        raise BadRequestError(f"sparse_col_indices: expected {values.size} columns in [0, {width}), got {col}")
    row_of = np.repeat(np.arange(rows), np.diff(pointers))
    if np.any((np.diff(row_of) == 0) & (np.diff(columns) <= 0)):
        raise BadRequestError("sparse_col_indices: columns of a row must ascend and not repeat")
    return pointers.tolist(), columns.tolist()


def _as_indices(name: str, indices: Any) -> np.ndarray:
    try:
        return np.asarray(indices, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequestError(f"{name}: expected integers: {error}") from None


def _check_pad_value(pad_value: Any) -> int:
    if isinstance(pad_value, bool) or not isinstance(pad_value, (int, np.integer)):
        raise TypeError(f"pad_value must be an integer, got {type(pad_value).__name__}: {pad_value!r}")
    return int(pad_value)
