"""XLA's own ragged product, for TPUs. On a CPU and a GPU it multiplies every row by every weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """See `tinker_jax.kernels.grouped_matmul.grouped_matmul`."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    # A TPU sums in float32 whatever the dtype of the result, which a float32 one would make twice as large.
    y_SN = jax.lax.ragged_dot_general(x_SD, w, sizes_E, dims, preferred_element_type=x_SD.dtype)
    used_S1 = jnp.arange(x_SD.shape[0])[:, None] < jnp.sum(sizes_E)  # the rows behind are nobody's
    return jnp.where(used_S1, y_SN, 0)


def weight_gradient(x_SD: jax.Array, g_SN: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """Σ over each group's rows of x gᵀ, float32 [E, D, N], or, transposed, [E, N, D]."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    used_S1 = jnp.arange(x_SD.shape[0])[:, None] < jnp.sum(sizes_E)
    x_SD, g_SN = (jnp.where(used_S1, a, 0) for a in (x_SD, g_SN))
    left, right = (g_SN, x_SD) if transposed else (x_SD, g_SN)
    return jax.lax.ragged_dot_general(left, right, sizes_E, dims, preferred_element_type=jnp.float32)
