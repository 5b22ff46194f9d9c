"""JAX's ragged paged attention, a Pallas kernel for TPUs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from tinker_jax.kernels.decode_attention.pages import PAGE, finite, places
from tinker_jax.kernels.heads import Heads

# Of one block of the kernel. Left to itself it asks the devices of this process, not those compiled for.
_KEYS, _QUERIES = 512, 32
MOST_ENTRIES = 1 << 17
"""Of the tables of one call, which the kernel keeps in scalar memory. So many compile for v6e."""


class CombinedPages(NamedTuple):
    """Keys and values, [P, PAGE, 2·K, H], every key head before its value head. Page 0 belongs to no row."""

    kv: jax.Array


def check_heads(heads: Heads, dtype: jnp.dtype) -> None:
    """Refuses what the kernel cannot hold in a TPU's tiles.

    Args:
        heads: of one device.
        dtype: of queries, keys and values.

    Raises:
        NotImplementedError: the text says why.
    """
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"ragged paged attention takes bfloat16 and float32, not {jnp.dtype(dtype).name}")
    K, H = heads.K, heads.H
    if H % 128:
        raise NotImplementedError(f"ragged paged attention takes head widths that 128 divides, not {H}")
    sublanes, odd = divmod(2 * K * jnp.dtype(dtype).itemsize, 4)
    if odd or (sublanes not in (1, 2, 4) and sublanes % 8):
        raise NotImplementedError(f"ragged paged attention cannot tile {K} key heads of a device in {jnp.dtype(dtype).name}")


def empty_combined(pages: int, heads: Heads, dtype: jnp.dtype) -> CombinedPages:
    """Zeroed pool."""
    return CombinedPages(jnp.zeros((pages, PAGE, 2 * heads.K, heads.H), dtype))


def write_combined(
    pages: CombinedPages, k_RTKH: jax.Array, v_RTKH: jax.Array, tables_RW: jax.Array, positions_RT: jax.Array
) -> CombinedPages:
    """See `PagedAttention.write`."""
    R, T, K, H = k_RTKH.shape
    kv = jnp.stack([finite(k_RTKH), finite(v_RTKH)], axis=3).reshape(R, T, 2 * K, H)
    return CombinedPages(pages.kv.at[places(tables_RW, positions_RT)].set(kv))


def ragged_attend(
    pages: CombinedPages,
    q_RTNH: jax.Array,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """See `PagedAttention.attend`."""
    if sinks_N is not None:
        raise NotImplementedError("ragged paged attention has no attention sinks")
    R, T, N, H = q_RTNH.shape
    # The kernel wants T tokens of every row. Those behind the row's last one see pages that are not its own, and are dropped.
    lengths_R = jnp.maximum(positions_RT[:, 0], 0) + T
    tables_RW = jnp.pad(tables_RW, [(0, 0), (0, -(-(T - 1) // PAGE))])
    out = ragged_paged_attention(
        q_RTNH.reshape(R * T, N, H),
        pages.kv,
        lengths_R,
        tables_RW,
        jnp.arange(R + 1, dtype=jnp.int32) * T,
        jnp.array([R], jnp.int32),
        sm_scale=scale,
        sliding_window=window,
        num_kv_pages_per_block=min(_KEYS // PAGE, tables_RW.shape[1]),
        num_queries_per_block=min(_QUERIES, R * T),
    )
    return jnp.where((positions_RT >= 0)[..., None, None], out.reshape(R, T, N, H), 0)
