"""Attention over pages in plain XLA: a loop over blocks of positions that ends with the longest row.

The online softmax is that of Milakov & Gimelshein (arXiv:1805.02867). Blocks start at multiples of their length in every row,
and a block that a row does not see changes none of its numbers, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tinker_jax.kernels.decode_attention.pages import PAGE, Pages, visible, weighted_values

_MASKED = -1e30  # finite: exp(_MASKED - _MASKED) of a query that has seen nothing yet must not be NaN


def xla_attend(
    pages: Pages,
    q_RTNH: jax.Array,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    block: int = 512,
    keys_as_rows: bool = False,
    values: int | None = None,
) -> jax.Array:
    """See `PagedAttention.attend`.

    Args:
        pages: pool; the rest as there.
        block: positions of one step of the loop, a multiple of `PAGE`.
        keys_as_rows: keys lie as values do, [P, K, PAGE, H].
        values: numbers of a latent that are the value; None where the pool holds values.
    """
    R, T, N, H = q_RTNH.shape
    K, V = pages.k.shape[1], values if pages.v is None else pages.v.shape[3]
    G, C, W = N // K, block, block // PAGE
    tables_RW = jnp.pad(tables_RW, [(0, 0), (0, -tables_RW.shape[1] % W)])

    def gathered(ids_RW):
        k, v = jax.tree.map(lambda x: x.at[ids_RW].get(mode="promise_in_bounds", wrap_negative_indices=False), pages)
        v = None if v is None else v.swapaxes(1, 2).reshape(-1, K, C, V)
        if keys_as_rows:
            return Pages(k.swapaxes(1, 2).reshape(-1, K, C, H), v)
        return Pages(k.transpose(0, 2, 3, 1, 4).reshape(-1, K, H, C), v)

    q_RKGTH = q_RTNH.reshape(R, T, K, G, H).transpose(0, 2, 3, 1, 4)
    scores = "RKGTH,RKCH->RKGTC" if keys_as_rows else "RKGTH,RKHC->RKGTC"

    def step(carry):
        i, top, total, acc = carry
        ids = jax.lax.dynamic_slice_in_dim(tables_RW, i * W, W, axis=1)
        own = gathered(ids)
        keys = (i * C + jnp.arange(C, dtype=jnp.int32))[None, None]
        seen = visible(keys, positions_RT[:, :, None], window)[:, None, None]
        s = jnp.einsum(scores, q_RKGTH, own.k, preferred_element_type=jnp.float32) * scale
        new_top = jnp.maximum(top, jnp.max(jnp.where(seen, s, _MASKED), axis=-1))
        p = jnp.where(seen, jnp.exp(s - new_top[..., None]), 0)
        shrink = jnp.exp(top - new_top)
        pv = weighted_values(p, own, values)
        return i + 1, new_top, total * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + pv

    last = jnp.max(positions_RT)
    first = 0
    if window is not None:
        own = jnp.where(positions_RT < 0, jnp.iinfo(jnp.int32).max, positions_RT)
        first = jnp.maximum(jnp.min(own) - window + 1, 0) // C
    top = jnp.full((R, K, G, T), _MASKED)
    if sinks_N is not None:
        top = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, G, 1), top.shape)
    total = jnp.full((R, K, G, T), 0.0 if sinks_N is None else 1.0)
    start = (jnp.int32(first), top, total, jnp.zeros((R, K, G, T, V)))
    _, _, total, acc = jax.lax.while_loop(lambda carry: carry[0] * C <= last, step, start)
    out = acc / jnp.where(total == 0, 1, total)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(R, T, N, V).astype(q_RTNH.dtype)


rows_attend = functools.partial(xla_attend, keys_as_rows=True)
"""Over a pool of `empty_rows`."""
