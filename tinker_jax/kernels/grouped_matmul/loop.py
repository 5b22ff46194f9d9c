"""A loop over the experts that have rows, and in it over blocks of their rows: for CPUs, and where no kernel takes the case.

An expert's weight is sliced out once, which leaves it in the CPU's cache. All blocks of a call have one size, which follows
from static shapes: every row goes through the same product, so its result does not depend on how many rows its expert and the
others have. (Smaller blocks for what is left of a group would waste less, but XLA:CPU rounds float32 products of other numbers
of rows another way.) A block that reaches beyond its group leaves the rows there as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tinker_jax.kernels.products import times_transposed

_BLOCKS = ((256, 64), (64, 32), (16, 16), (1, 4))  # mean rows of an expert from which on a block has so many
_GRADIENT_BLOCK = 128


def product(x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """See `tinker_jax.kernels.grouped_matmul.grouped_matmul`."""
    S, (E, N) = x_SD.shape[0], (w.shape[0], w.shape[1 if transposed else 2])
    C = min(S, next((block for mean, block in _BLOCKS if S >= mean * E), 1))
    busy_X, count, bounds = _groups(sizes_E, S)

    def expert(i, y_SN):
        first, end = bounds(busy_X[i])
        w_e = jax.lax.dynamic_index_in_dim(w, busy_X[i], keepdims=False)

        def block(j, y_SN):
            at, own_C1 = _block(first + j * C, first, end, C, S)
            x_CD = jax.lax.dynamic_slice_in_dim(x_SD, at, C)
            if transposed:
                y_CN = times_transposed(x_CD, w_e, jnp.float32)
            else:
                y_CN = jnp.dot(x_CD, w_e, preferred_element_type=jnp.float32)
            old_CN = jax.lax.dynamic_slice_in_dim(y_SN, at, C)
            return jax.lax.dynamic_update_slice_in_dim(y_SN, jnp.where(own_C1, y_CN.astype(y_SN.dtype), old_CN), at, 0)

        return jax.lax.fori_loop(0, (end - first + C - 1) // C, block, y_SN)

    return jax.lax.fori_loop(0, count, expert, jnp.zeros((S, N), x_SD.dtype))


def weight_gradient(x_SD: jax.Array, g_SN: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """Σ over each group's rows of x gᵀ, float32 [E, D, N], or, transposed, [E, N, D].

    The narrower side stands on the left, where a CPU has to transpose it: for LoRA's factors in up to a seventh of the time.
    """
    S, E = x_SD.shape[0], sizes_E.shape[0]
    C = min(S, _GRADIENT_BLOCK)
    left, right = (g_SN, x_SD) if transposed else (x_SD, g_SN)
    shape = (E, left.shape[1], right.shape[1])
    wide_left = left.shape[1] > right.shape[1]
    narrow, wide = (right, left) if wide_left else (left, right)
    busy_X, count, bounds = _groups(sizes_E, S)

    def expert(i, dw):
        first, end = bounds(busy_X[i])

        def block(j, dw_e):
            at, own_C1 = _block(first + j * C, first, end, C, S)
            left_C, right_C = (jnp.where(own_C1, jax.lax.dynamic_slice_in_dim(a, at, C), 0) for a in (narrow, wide))
            return dw_e + jnp.einsum("CR,CD->RD", left_C, right_C, preferred_element_type=jnp.float32)

        dw_e = jax.lax.fori_loop(0, (end - first + C - 1) // C, block, jnp.zeros((narrow.shape[1], wide.shape[1])))
        return jax.lax.dynamic_update_index_in_dim(dw, dw_e.T if wide_left else dw_e, busy_X[i], 0)

    return jax.lax.fori_loop(0, count, expert, jnp.zeros(shape))


def _groups(sizes_E: jax.Array, S: int):
    """Experts with rows, their number, and a function that gives an expert's first row and the row behind its last."""
    ends_E = jnp.cumsum(sizes_E)
    (busy_X,) = jnp.nonzero(sizes_E > 0, size=min(sizes_E.shape[0], S), fill_value=0)
    return busy_X, jnp.sum(sizes_E > 0), lambda e: (ends_E[e] - sizes_E[e], ends_E[e])


def _block(start: jax.Array, first: jax.Array, end: jax.Array, C: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Where the block lies that begins at `start`, moved back where it would reach beyond S, and which of its rows are new."""
    at = jnp.minimum(start, S - C)
    row_C1 = at + jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)
    return at, (row_C1 >= start) & (row_C1 < end)
