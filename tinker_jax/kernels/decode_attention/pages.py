"""The pool of pages of one layer, as the plain formula and the XLA backend keep it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

PAGE = 32
"""Tokens of a page. With 16 the loop over 64 mixed rows took a quarter longer on a CPU; prefixes are shared by whole pages."""


class Pages(NamedTuple):
    """Keys and values of one layer, [P, K, PAGE, H] each. Page 0 belongs to no row: padding is written there.

    Heads stand before places, so that the keys of one head in a page are contiguous.
    """

    k: jax.Array
    v: jax.Array


def empty_pages(pages: int, K: int, H: int, dtype: jnp.dtype) -> Pages:
    """Zeroed pool."""
    return Pages(jnp.zeros((pages, K, PAGE, H), dtype), jnp.zeros((pages, K, PAGE, H), dtype))


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
    k, v = (pool.at[page_RT, :, place_RT].set(finite(x)) for pool, x in zip(pages, (k_RTKH, v_RTKH), strict=True))
    return Pages(k, v)


def visible(keys: jax.Array, positions: jax.Array, window: int | None) -> jax.Array:
    """Does the query at each of `positions` see the key at each of `keys`? Their shapes broadcast."""
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)
