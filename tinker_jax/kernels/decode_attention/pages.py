"""The pool of pages, as all backends but the ragged kernel keep it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

PAGE = 64
"""Tokens of a page. A CPU copies a page as it lies before it works on it: 64 mixed rows took 12 ms, and 16 to 20 ms
with blocks of 128 put together from smaller pages. Prefixes are shared by whole pages, which speaks against larger ones."""


class Pages(NamedTuple):
    """Keys [P, K, H, PAGE] and values [P, K, PAGE, H]. Page 0 belongs to no row: padding is written there.

    Keys lie as the product with a query wants them; a CPU would transpose them in every product.
    """

    k: jax.Array
    v: jax.Array


def empty_pages(pages: int, K: int, H: int, dtype: jnp.dtype) -> Pages:
    """Zeroed pool."""
    return Pages(jnp.zeros((pages, K, H, PAGE), dtype), jnp.zeros((pages, K, PAGE, H), dtype))


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


def write_pages(pages: Pages, k_RTKH: jax.Array, v_RTKH: jax.Array, tables_RW: jax.Array, positions_RT: jax.Array) -> Pages:
    """See `PagedAttention.write`."""
    page_RT, place_RT = places(tables_RW, positions_RT)
    k = pages.k.at[page_RT, :, :, place_RT].set(finite(k_RTKH))
    return Pages(k, pages.v.at[page_RT, :, place_RT].set(finite(v_RTKH)))


def empty_rows(pages: int, K: int, H: int, dtype: jnp.dtype) -> Pages:
    """Zeroed pool of a GPU's kernels, whose keys lie as values do, [P, K, PAGE, H]."""
    return Pages(*(jnp.zeros((pages, K, PAGE, H), dtype) for _ in range(2)))


def write_rows(pages: Pages, k_RTKH: jax.Array, v_RTKH: jax.Array, tables_RW: jax.Array, positions_RT: jax.Array) -> Pages:
    """See `PagedAttention.write`; for pools of `empty_rows`."""
    page_RT, place_RT = places(tables_RW, positions_RT)
    return Pages(*(x.at[page_RT, :, place_RT].set(finite(new)) for x, new in zip(pages, (k_RTKH, v_RTKH), strict=True)))


def visible(keys: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """Does the query at each of `positions` see the key at each of `keys`? Their shapes broadcast."""
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)
