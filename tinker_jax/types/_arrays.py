"""Arrays of NumPy, JAX and PyTorch as NumPy arrays. Loads neither of the latter: where one is not loaded, nothing is its."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tinker_jax.types.errors import BadRequestError


def is_torch(value: object) -> bool:
    """Whether `value` is a torch tensor."""
    return _is(value, "torch", "Tensor")


def as_numpy(value: Any, field: str) -> np.ndarray | None:
    """What an array of NumPy, JAX or PyTorch holds, on whatever device, as a NumPy array; None where `value` is no array.

    The dtype stays, except that floats and integers that NumPy has no type for (bfloat16, float8, int4) become float32 and
    int64. Memory is shared where it can be.

    Raises:
        BadRequestError: a tensor that requires gradients, as in the SDK; an array whose values cannot be read, such as a tracer
            of `jax.jit`, a deleted array, or a tensor of a sparse layout.
    """
    try:
        if isinstance(value, np.ndarray) or _is(value, "jax", "Array"):
            return widened(np.asarray(value))
        if is_torch(value):
            return _of_torch(value, field)
    except BadRequestError:
        raise
    except Exception as error:  # what JAX and PyTorch raise differs from case to case
        why = str(error).strip().partition("\n")[0]
        raise BadRequestError(f"{field}: this {type(value).__name__} cannot be read: {why}") from error
    return None


def widened(array: np.ndarray) -> np.ndarray:
    """The same numbers in a dtype of NumPy's own."""
    if array.dtype.kind == "V" and array.dtype.name.startswith(("bfloat", "float")):
        return array.astype(np.float32)
    if array.dtype.kind == "V" and array.dtype.name.startswith(("int", "uint")):
        return array.astype(np.int64)
    return array


def _of_torch(tensor: Any, field: str) -> np.ndarray:
    if tensor.requires_grad:
        raise BadRequestError(f"{field}: no gradient flows through this tensor, which requires one; pass tensor.detach()")
    tensor = tensor.cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()  # bfloat16 and float8 are not NumPy's
    return tensor.contiguous().numpy()


def _is(value: object, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
