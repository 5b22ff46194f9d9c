"""The pool of pages, as all backends but the ragged kernel keep it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinker_jax.kernels.heads import Heads

PAGE = 64
"""Tokens of a page. A CPU copies a page as it lies before it works on it: 64 mixed rows took 12 ms, and 16 to 20 ms
with blocks of 128 put together from smaller pages. Prefixes are shared by whole pages, which speaks against larger ones."""


class Pages(NamedTuple):
    """Keys [P, K, H, PAGE] and values [P, K, PAGE, V]. Page 0 belongs to no row: padding is written there.

    Keys lie as the product with a query wants them; a CPU would transpose them in every product. Of latent heads there are no
    values: they are the first numbers of the keys.
    """

    k: jax.Array
    v: jax.Array | None


def empty_pages(pages: int, heads: Heads, dtype: jnp.dtype) -> Pages:
    """Zeroed pool."""
    k = jnp.zeros((pages, heads.K, heads.H, PAGE), dtype)
    return Pages(k, None if heads.latent else jnp.zeros((pages, heads.K, PAGE, heads.V), dtype))


def places(tables_RW: jax.Array, positions_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page and place within it of every token, int32 [R, T] each; page 0 for padding."""
    page_RT = jnp.take_along_axis(tables_RW, jnp.maximum(positions_RT, 0) // PAGE, axis=1, mode="clip")
    return jnp.where(positions_RT < 0, 0, page_RT), positions_RT % PAGE


def finite(x: jax.Array) -> jax.Array:
    """x, with zero for what is not finite.

    A masked key has weight zero, which does not silence a value that is not finite, and a page that a diverged model filled may
    go to another row. The row that made such a number has it in its hidden state, too, so nothing is hidden from it.
    """
    return jnp.where(jnp.isfinite(x), x, 0)


def write_pages(
    pages: Pages, k_RTKH: jax.Array, v_RTKV: jax.Array | None, tables_RW: jax.Array, positions_RT: jax.Array
) -> Pages:
    """See `PagedAttention.write`."""
    page_RT, place_RT = places(tables_RW, positions_RT)
    k = pages.k.at[page_RT, :, :, place_RT].set(finite(k_RTKH))
    if pages.v is None or v_RTKV is None:
        return Pages(k, None)
    return Pages(k, pages.v.at[page_RT, :, place_RT].set(finite(v_RTKV)))


def empty_rows(pages: int, heads: Heads, dtype: jnp.dtype) -> Pages:
    """Zeroed pool of a GPU's kernels, whose keys lie as values do, [P, K, PAGE, H]."""
    return Pages(*(jnp.zeros((pages, heads.K, PAGE, heads.H), dtype) for _ in range(2)))


def write_rows(pages: Pages, k_RTKH: jax.Array, v_RTKH: jax.Array, tables_RW: jax.Array, positions_RT: jax.Array) -> Pages:
    """See `PagedAttention.write`; for pools of `empty_rows`."""
    place = places(tables_RW, positions_RT)
    return jax.tree.map(lambda x, new: x.at[place[0], :, place[1]].set(finite(new)), pages, Pages(k_RTKH, v_RTKH))


def weighted_values(p_RKGTC: jax.Array, pages: Pages, values: int | None) -> jax.Array:
    """Sums of values, float32 [R, K, G, T, V].

    Args:
        p_RKGTC: weights of C keys.
        pages: these keys [R, K, H, C] and values [R, K, C, V].
        values: V of latent heads, whose values are the first numbers of the keys.
    """
    if pages.v is not None:
        return jnp.einsum("RKGTC,RKCV->RKGTV", p_RKGTC.astype(pages.v.dtype), pages.v, preferred_element_type=jnp.float32)
    # A CPU copies a part of the keys, or transposes them as the right side of a product. Both cost more than H - V numbers do.
    p_RKGTC = p_RKGTC.astype(pages.k.dtype)
    out_RKHGT = jnp.einsum("RKHC,RKGTC->RKHGT", pages.k, p_RKGTC, preferred_element_type=jnp.float32)
    return jnp.moveaxis(out_RKHGT, 2, -1)[..., :values]


def visible(keys: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """Does the query at each of `positions` see the key at each of `keys`? Their shapes broadcast."""
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)
