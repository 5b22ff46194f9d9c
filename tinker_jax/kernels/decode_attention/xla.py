"""Attention over pages in plain XLA: a loop over blocks of positions that ends with the longest row.

The online softmax is that of Milakov & Gimelshein (arXiv:1805.02867). Blocks start at multiples of their length in every row,
and a block that a row does not see changes none of its numbers, so that a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tinker_jax.kernels.decode_attention.pages import PAGE, Pages, visible

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
    block: int,
    queries_at_once: int | None,
) -> jax.Array:
    """See `PagedAttention.attend`.

    Args:
        pages: pool; the rest as there.
        block: positions of one step of the loop, a multiple of `PAGE`.
        queries_at_once: about so many queries share a loop, those of one row in any case; None: all. What a loop works on then
            stays in a CPU's cache, and rows of like length share one.
    """
    R, T, N, H = q_RTNH.shape
    K = pages.k.shape[1]
    G, C, W = N // K, block, block // PAGE
    tables_RW = jnp.pad(tables_RW, [(0, 0), (0, -tables_RW.shape[1] % W)])
    sink_KGT = jnp.full((K, G, T), _MASKED)
    if sinks_N is not None:
        sink_KGT = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(K, G, 1), (K, G, T))

    def gathered(pool, ids_RW):
        return pool[ids_RW].swapaxes(1, 2).reshape(ids_RW.shape[0], K, C, H)

    def tile(xs):
        q_RTNH, tables_RW, positions_RT = xs
        rows = q_RTNH.shape[0]
        q_RKGTH = q_RTNH.reshape(rows, T, K, G, H).transpose(0, 2, 3, 1, 4)

        def step(carry):
            i, top, total, acc = carry
            ids = jax.lax.dynamic_slice_in_dim(tables_RW, i * W, W, axis=1)
            k_RKCH, v_RKCH = gathered(pages.k, ids), gathered(pages.v, ids)
            keys = (i * C + jnp.arange(C, dtype=jnp.int32))[None, None]
            seen = visible(keys, positions_RT[:, :, None], window)[:, None, None]
            s = jnp.einsum("RKGTH,RKCH->RKGTC", q_RKGTH, k_RKCH, preferred_element_type=jnp.float32) * scale
            new_top = jnp.maximum(top, jnp.max(jnp.where(seen, s, _MASKED), axis=-1))
            p = jnp.where(seen, jnp.exp(s - new_top[..., None]), 0)
            shrink = jnp.exp(top - new_top)
            pv = jnp.einsum("RKGTC,RKCH->RKGTH", p.astype(v_RKCH.dtype), v_RKCH, preferred_element_type=jnp.float32)
            return i + 1, new_top, total * shrink + jnp.sum(p, axis=-1), acc * shrink[..., None] + pv

        last = jnp.max(positions_RT)
        first = 0
        if window is not None:
            own = jnp.where(positions_RT < 0, jnp.iinfo(jnp.int32).max, positions_RT)
            first = jnp.maximum(jnp.min(own) - window + 1, 0) // C
        top = jnp.broadcast_to(sink_KGT[None], (rows, K, G, T))
        total = jnp.full((rows, K, G, T), 0.0 if sinks_N is None else 1.0)
        start = (jnp.int32(first), top, total, jnp.zeros((rows, K, G, T, H)))
        _, _, total, acc = jax.lax.while_loop(lambda carry: carry[0] * C <= last, step, start)
        out = acc / jnp.where(total == 0, 1, total)[..., None]
        return out.transpose(0, 3, 1, 2, 4).reshape(rows, T, N, H).astype(q_RTNH.dtype)

    rows = R if queries_at_once is None else min(R, max(1, queries_at_once // T))
    padding = ((0, -R % rows), (0, 0))
    positions_RT = jnp.pad(positions_RT, padding, constant_values=-1)
    xs = (jnp.pad(q_RTNH, (*padding, (0, 0), (0, 0))), jnp.pad(tables_RW, padding), positions_RT)
    if rows == R:
        return tile(xs)
    order = jnp.argsort(jnp.max(positions_RT, axis=1))
    out = jax.lax.map(tile, tuple(x[order].reshape(-1, rows, *x.shape[1:]) for x in xs))
    return out.reshape(-1, T, N, H)[jnp.argsort(order)[:R]]
