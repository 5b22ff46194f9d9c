"""Splash attention, Pallas' flash attention for TPUs that ships with JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from tinker_jax.kernels.attention.names import RESIDUALS

_LANES = 128  # a row's length must be a multiple


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    segment_ids_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """See `tinker_jax.kernels.attention.attention`. `interpret` runs the kernel on any platform, slowly."""
    _, T, N, _ = q_BTNH.shape
    padding = -T % _LANES
    kernel: Any = splash.make_splash_mha(  # its declared result includes residuals, which are not asked for
        mask=splash.MultiHeadMask([_mask(T + padding, window)] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_blocks(T + padding),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def heads_first(x):
        return jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)]).swapaxes(1, 2)

    ids_BT = jnp.pad(segment_ids_BT, [(0, 0), (0, padding)], constant_values=-1)
    # The kernel returns the gradient of the sinks in the dtype of its output.
    sinks_N = None if sinks_N is None else sinks_N.astype(q_BTNH.dtype)
    run = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids), sinks_N))
    out_BNTV = run(heads_first(q_BTNH * scale), heads_first(k_BTKH), heads_first(v_BTKV), ids_BT)
    return out_BNTV.swapaxes(1, 2)[:, :T]


def _mask(T: int, window: int | None):
    return splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)


def _blocks(T: int) -> splash.BlockSizes:
    """The largest blocks up to 512 that divide a row: they fit the fast memory of every TPU with heads of 256."""
    size = next(size for size in (512, 384, 256, 128) if T % size == 0)
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
