"""Weight gradients of narrow factors as one batched product over blocks of rows: for GPUs, where a loop waits for the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BLOCK = 128


def weight_gradient(x_SD: jax.Array, g_SN: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """Σ over each group's rows of x gᵀ, float32 [E, D, N], or, transposed, [E, N, D].

    Every group begins a block of its own, so there are S / 128 + E of them at most. A group's blocks are summed by a product
    with zeros and ones: a scatter would add them in another order every time.
    """
    left_SD, right_SN = (g_SN, x_SD) if transposed else (x_SD, g_SN)
    S, E = left_SD.shape[0], sizes_E.shape[0]
    C = min(_BLOCK, S)
    blocks_E = (sizes_E + C - 1) // C
    block_B = jnp.arange(S // C + E, dtype=jnp.int32)
    ends_E, last_block_E = jnp.cumsum(sizes_E), jnp.cumsum(blocks_E)
    group_B = jnp.sum(block_B[:, None] >= last_block_E[None], axis=1)
    at = jnp.minimum(group_B, E - 1)
    first_B = (ends_E - sizes_E)[at] + (block_B - (last_block_E - blocks_E)[at]) * C
    row_BC = first_B[:, None] + jnp.arange(C, dtype=jnp.int32)[None]
    own_BC = (group_B < E)[:, None] & (row_BC < ends_E[at][:, None])

    def blocks(x_SD: jax.Array) -> jax.Array:
        return jnp.where(own_BC[..., None], x_SD[jnp.minimum(row_BC, S - 1)], 0)

    parts_BDN = jnp.einsum("BCD,BCN->BDN", blocks(left_SD), blocks(right_SN), preferred_element_type=jnp.float32)
    members_EB = (group_B[None] == jnp.arange(E)[:, None]).astype(jnp.float32)
    return jnp.einsum("EB,BDN->EDN", members_EB, parts_BDN, precision="highest")
