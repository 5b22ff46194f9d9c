"""JAX's Pallas kernels of ragged products for NVIDIA's Hopper cards."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.kernels.grouped_matmul import blocks
from tinker_jax.kernels.grouped_matmul.reference import reference_grouped_matmul

_MODULE = "jax.experimental.pallas.ops.gpu"
_KEYWORDS = {"group_sizes", "block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n"}
_MANY_ROWS = 128  # mean rows of an expert from which on a tile has 128 of them: fewer would waste more than they gain
_TILE = 64  # width; products of narrower ones compile, and hang or fault on an H200 with jax 0.11.2
_STAGES = 4  # tiles on their way: 4 x 32 KiB at most, of 227
_MOST_ERROR = 0.05  # relative; bfloat16 stays below 0.01, a wrong row is far above


def check(D: int, N: int, dtype: Any, compute_capability: str | None, *, on_this_device: bool) -> None:
    """Looks at whether the kernels can do the case, and on a GPU that is there whether they are right.

    Args:
        D: width of x.
        N: width of y.
        dtype: of x and w.
        compute_capability: of the GPU, if it is known.
        on_this_device: programs will run on this process's first device.

    Raises:
        NotImplementedError: they cannot, or are not; the text says why.
    """
    name = jnp.dtype(dtype).name
    if compute_capability is not None and int(float(compute_capability)) != 9:
        raise NotImplementedError(f"the kernel is for compute capability 9.0 (Hopper), the GPU has {compute_capability}")
    if name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"the kernel takes bfloat16 and float16, not {name}")
    if D % _TILE or N % _TILE or min(D, N) == _TILE:
        raise NotImplementedError(f"the kernel takes widths of several times {_TILE}, not {D} and {N}")
    _kernel("ragged_dot")
    if on_this_device and (wrong := fault(product, D, N, name)):
        raise NotImplementedError(f"the kernel failed its self-check: {wrong}")


def product(x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """See `tinker_jax.kernels.grouped_matmul.grouped_matmul`. Rows are filled up to whole tiles."""
    rows = x_SD.shape[0]
    block_m = 128 if rows >= _MANY_ROWS * w.shape[0] else 64
    x_SD = jnp.pad(x_SD, [(0, -rows % block_m), (0, 0)])
    S, N = x_SD.shape[0], w.shape[1 if transposed else 2]
    block_n = 2 * _TILE if N % (2 * _TILE) == 0 else _TILE
    y_SN = _kernel("ragged_dot")(
        x_SD,
        w,
        group_sizes=sizes_E.astype(jnp.int32),
        block_m=block_m,
        block_n=block_n,
        block_k=_TILE,
        max_concurrent_steps=min(_STAGES, x_SD.shape[1] // _TILE),
        grid_block_n=N // block_n,  # all columns of some rows, then the next rows: x is read from memory once
        transpose_rhs=transposed,
    )
    used_S1 = jnp.arange(S)[:, None] < jnp.sum(sizes_E)  # the kernel does not write the rows behind
    return jnp.where(used_S1, y_SN, 0)[:rows]


weight_gradient = blocks.weight_gradient
"""Of LoRA's factors. JAX's kernel for it cannot be compiled for a card that is not there, and asks for wider factors."""


def _kernel(name: str) -> Callable[..., jax.Array]:
    try:
        kernel = getattr(importlib.import_module(f"{_MODULE}.{name}_mgpu"), name)
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"jax {jax.__version__} has no {name} for Mosaic GPU here: {error}") from error
    missing = _KEYWORDS - set(inspect.signature(kernel).parameters)
    if missing:
        raise NotImplementedError(f"{name} of jax {jax.__version__} takes other arguments: it lacks {sorted(missing)}")
    return kernel


@functools.cache
def fault(product: Callable[..., jax.Array], D: int, N: int, dtype: str) -> str | None:
    """Why `product` must not be used on this process's first device; None: it agrees with the plain formula both ways.

    Args:
        product: with the arguments of `product` above.
        D: width of x.
        N: width of y.
        dtype: of x and w, by name.
    """

    def compare() -> str | None:
        rng, sizes_E = np.random.default_rng(0), np.array([70, 0, 1, 190, 0], np.int32)
        w = jnp.asarray(rng.standard_normal((5, N, D)), dtype)
        for x_width, transposed in ((D, True), (N, False)):
            for S in (300, 640):  # blocks of 64 and of 128 rows
                x = jnp.asarray(rng.standard_normal((S, x_width)), dtype)
                try:
                    ours, formula = (
                        np.asarray(jax.jit(functools.partial(f, transposed=transposed))(x, w, sizes_E), np.float32)
                        for f in (product, reference_grouped_matmul)
                    )
                except Exception as error:  # the lowering of a kernel raises whatever it likes
                    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
                error = float(np.linalg.norm(ours - formula) / np.linalg.norm(formula))
                if not error < _MOST_ERROR:
                    return (
                        f"x {'wᵀ' if transposed else 'w'} of {S} rows differs from the plain formula by {error:.3g} of its norm"
                    )
        return None

    # A thread of its own: the caller may be tracing, and what is computed there would become a part of its program.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compare).result()
