"""The plain formula, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    segment_ids_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """See `tinker_jax.kernels.attention.attention`."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32) * scale
    position = jnp.arange(T)
    before_TS = position[:, None] - position[None, :]
    near_TS = (before_TS >= 0) & (before_TS < (T if window is None else window))
    mask_BTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & near_TS[None]
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    if sinks_N is not None:
        sinks_BKGT1 = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (B, K, N // K, T, 1))
        scores_BKGTS = jnp.concatenate([scores_BKGTS, sinks_BKGT1], axis=-1)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)[..., :T]
    out = jnp.einsum("BKGTS,BSKV->BTKGV", probs_BKGTS.astype(v_BTKV.dtype), v_BTKV)
    return out.reshape(B, T, N, v_BTKV.shape[3])
