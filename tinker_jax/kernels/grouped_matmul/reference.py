"""The plain formula, for tests: every row times every weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_grouped_matmul(x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """See `tinker_jax.kernels.grouped_matmul.grouped_matmul`."""
    ends_E = jnp.cumsum(sizes_E)
    row_S1 = jnp.arange(x_SD.shape[0])[:, None]
    own_SE = ((row_S1 >= (ends_E - sizes_E)[None]) & (row_S1 < ends_E[None])).astype(jnp.float32)
    x_SD = jnp.where(row_S1 < ends_E[-1], x_SD, 0)
    axes = "SD,END,SE->SN" if transposed else "SD,EDN,SE->SN"
    y_SN = jnp.einsum(axes, x_SD.astype(jnp.float32), w.astype(jnp.float32), own_SE, precision="highest")
    return y_SN.astype(x_SD.dtype)
