"""Attention over pages for CPUs: through a list of the pages that rows see, a few at a time.

Rows of any lengths cost what their pages cost: none waits for a longer one, and rows without a token cost nothing. Every page's
part of the softmax is computed by itself, whatever stands beside it in the list, and a row's parts are put together in the
order of its pages, so that a row's result does not depend on its neighbours. The parts are put together as in flash-decoding,
by the online softmax of Milakov & Gimelshein (arXiv:1805.02867).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tinker_jax.kernels.decode_attention.pages import PAGE, Pages, visible, weighted_values
from tinker_jax.kernels.decode_attention.xla import xla_attend

_MANY, _MANY_KEYS = 128, 256  # queries of a row that outweigh its gathers: then whole blocks of keys are faster than pages
_LOWEST = -1e30  # of a query that has seen nothing yet; finite, as -inf - -inf is NaN
_SPAN = 8  # pages of every row that are put together at a time
_AT_ONCE = 16  # pages gathered at a time, two of a row at most: what is gathered stays in a core's cache
_MOST_QUERIES = 1024  # of the pages gathered at a time


def worklist_attend(
    pages: Pages,
    q_RTNH: jax.Array,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    values: int | None = None,
) -> jax.Array:
    """See `PagedAttention.attend`. J are entries of the list, C places of a page.

    `values` are the numbers of a latent that are the value; None where the pool holds values.
    """
    R, T, N, H = q_RTNH.shape
    if T >= _MANY:
        more = {"scale": scale, "window": window, "values": values}
        return xla_attend(pages, q_RTNH, tables_RW, positions_RT, sinks_N, block=_MANY_KEYS, **more)
    K, V = pages.k.shape[1], values if pages.v is None else pages.v.shape[3]
    G = N // K
    few = max(1, min(2 * R, _AT_ONCE, _MOST_QUERIES // T))
    most = (-(-R * _SPAN // few) + 1) * few
    q_RKGTH = q_RTNH.reshape(R, T, K, G, H).transpose(0, 2, 3, 1, 4)
    end_R = jnp.max(positions_RT, axis=1) // PAGE + 1
    begin_R = jnp.zeros_like(end_R)
    if window is not None:
        own = jnp.where(positions_RT < 0, jnp.iinfo(jnp.int32).max, positions_RT)
        begin_R = jnp.maximum(jnp.min(own, axis=1) - window + 1, 0) // PAGE
    top = jnp.full((R, K, G, T), _LOWEST)
    if sinks_N is not None:
        top = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, G, 1), top.shape)
    total = jnp.full((R, K, G, T), 0.0 if sinks_N is None else 1.0)

    def span(carry):
        at, top, total, acc = carry
        first_R = jnp.maximum(begin_R, at * _SPAN)
        count_R = jnp.maximum(jnp.minimum(end_R, (at + 1) * _SPAN) - first_R, 0)
        ends_R = jnp.cumsum(count_R)
        starts_R = ends_R - count_R
        entry_J = jnp.arange(most, dtype=jnp.int32)
        row_J = jnp.minimum(jnp.sum(entry_J[:, None] >= ends_R[None], axis=1, dtype=jnp.int32), R - 1)
        page_J = entry_J - starts_R[row_J] + first_R[row_J]
        id_J = jnp.where(entry_J < ends_R[-1], jnp.asarray(tables_RW).at[row_J, page_J].get(mode="clip"), 0)

        def some(carry):
            i, *parts = carry
            row, page, id = (jax.lax.dynamic_slice_in_dim(x, i * few, few) for x in (row_J, page_J, id_J))
            own = jax.tree.map(lambda x: _rows(x, id), pages)
            keys = (page[:, None] * PAGE + jnp.arange(PAGE, dtype=jnp.int32)[None])[:, None]
            seen = visible(keys, positions_RT[row][:, :, None], window)[:, None, None]
            s = jnp.einsum("JKGTH,JKHC->JKGTC", _rows(q_RKGTH, row), own.k, preferred_element_type=jnp.float32)
            s = jnp.where(seen, s * scale, -jnp.inf)
            top = jnp.maximum(jnp.max(s, axis=-1), _LOWEST)
            p = jnp.exp(s - top[..., None])
            new = top, jnp.sum(p, axis=-1), weighted_values(p, own, values)
            return i + 1, *(jax.lax.dynamic_update_slice_in_dim(x, y, i * few, 0) for x, y in zip(parts, new, strict=True))

        # No list reaches the last entry: it stays as it is, for the pages that a row does not have.
        parts = jnp.full((most, K, G, T), -jnp.inf), jnp.zeros((most, K, G, T)), jnp.zeros((most, K, G, T, V))
        _, *parts = jax.lax.while_loop(lambda carry: carry[0] * few < ends_R[-1], some, (jnp.int32(0), *parts))

        def put_together(n, carry):
            top, total, acc = carry
            at_R = jnp.where(n < count_R, starts_R + n, most - 1)
            part_top, part_total, part_acc = (_rows(x, at_R) for x in parts)
            new_top = jnp.maximum(top, part_top)
            old, new = jnp.exp(top - new_top), jnp.exp(part_top - new_top)
            return new_top, total * old + part_total * new, acc * old[..., None] + part_acc * new[..., None]

        # A loop: XLA's reduction of these takes a CPU longer than all of the above.
        return at + 1, *jax.lax.fori_loop(0, jnp.max(count_R), put_together, (top, total, acc))

    start = jnp.min(begin_R) // _SPAN, top, total, jnp.zeros((R, K, G, T, V))
    _, _, total, acc = jax.lax.while_loop(lambda carry: carry[0] * _SPAN < jnp.max(end_R), span, start)
    out = acc / jnp.where(total == 0, 1, total)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(R, T, N, V).astype(q_RTNH.dtype)


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    return x.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False)
