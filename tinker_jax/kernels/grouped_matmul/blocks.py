"""Products in blocks of rows, many at once: for GPUs, where a loop over experts waits for the host at every turn.

Every block takes a copy of its group's weight; of large weights so few are copied at a time that they stay small beside the
rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LEAST, _MOST = 16, 512  # rows of a block: half of what an expert has on average, or less
_COPIED = 1 << 26  # numbers of the weights that are copied at a time


class _Blocks(NamedTuple):
    """Every group begins a block of its own, so there are B = S / C + E of them at most.

    Attributes:
        group_B: of each block; E: it has none.
        row_BC: of each of its places, in bounds.
        own_BC: is the row one of the group?
        block_S: of each row.
        place_S: of each row in its block.
    """

    group_B: jax.Array
    row_BC: jax.Array
    own_BC: jax.Array
    block_S: jax.Array
    place_S: jax.Array


def _blocks(S: int, sizes_E: jax.Array) -> _Blocks:
    E = sizes_E.shape[0]
    C = min(S, max(_LEAST, min(_MOST, 1 << max(0, (S // E // 2).bit_length() - 1))))
    blocks_E, ends_E = (sizes_E + C - 1) // C, jnp.cumsum(sizes_E)
    last_block_E = jnp.cumsum(blocks_E)
    block_B, row_S = jnp.arange(S // C + E, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)
    group_B, group_S = (
        jnp.sum(at[:, None] >= last_E[None], axis=1) for at, last_E in ((block_B, last_block_E), (row_S, ends_E))
    )
    at_B, at_S = jnp.minimum(group_B, E - 1), jnp.minimum(group_S, E - 1)
    first_E, first_block_E = ends_E - sizes_E, last_block_E - blocks_E
    row_BC = (first_E[at_B] + (block_B - first_block_E[at_B]) * C)[:, None] + jnp.arange(C, dtype=jnp.int32)[None]
    own_BC = (group_B < E)[:, None] & (row_BC < ends_E[at_B][:, None])
    within_S = row_S - first_E[at_S]
    return _Blocks(group_B, jnp.minimum(row_BC, S - 1), own_BC, first_block_E[at_S] + within_S // C, within_S % C)


def _of_blocks(x_SD: jax.Array, row_BC: jax.Array, own_BC: jax.Array) -> jax.Array:
    return jnp.where(own_BC[..., None], x_SD[row_BC], 0)


def product(x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """See `tinker_jax.kernels.grouped_matmul.grouped_matmul`."""
    S, E = x_SD.shape[0], sizes_E.shape[0]
    blocks, axes = _blocks(S, sizes_E), "BCD,BND->BCN" if transposed else "BCD,BDN->BCN"

    def some(_, xs):
        group_B, row_BC, own_BC = xs
        x_BCD, own_w = _of_blocks(x_SD, row_BC, own_BC), w[jnp.minimum(group_B, E - 1)]
        return None, jnp.einsum(axes, x_BCD, own_w, preferred_element_type=jnp.float32).astype(x_SD.dtype)

    B, C = blocks.row_BC.shape
    each = min(B, max(1, _COPIED // (w.shape[1] * w.shape[2])))
    xs = blocks.group_B, blocks.row_BC, blocks.own_BC
    xs = [jnp.pad(x, [(0, -B % each), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, each, *x.shape[1:]) for x in xs]
    _, y = jax.lax.scan(some, None, xs)
    y_BCN = y.reshape(-1, C, y.shape[-1])
    used_S1 = jnp.arange(S)[:, None] < jnp.sum(sizes_E)
    return jnp.where(used_S1, y_BCN[blocks.block_S, blocks.place_S], 0)


def weight_gradient(x_SD: jax.Array, g_SN: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """Σ over each group's rows of x gᵀ, float32 [E, D, N], or, transposed, [E, N, D].

    A group's blocks are summed by a product with zeros and ones: a scatter would add them in another order every time.
    """
    left_SD, right_SN = (g_SN, x_SD) if transposed else (x_SD, g_SN)
    blocks, E = _blocks(left_SD.shape[0], sizes_E), sizes_E.shape[0]
    left_BCD, right_BCN = (_of_blocks(x_SD, blocks.row_BC, blocks.own_BC) for x_SD in (left_SD, right_SN))
    parts_BDN = jnp.einsum("BCD,BCN->BDN", left_BCD, right_BCN, preferred_element_type=jnp.float32)
    members_EB = (blocks.group_B[None] == jnp.arange(E)[:, None]).astype(jnp.float32)
    return jnp.einsum("EB,BDN->EDN", members_EB, parts_BDN, precision="highest")
