"""The plain formula, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, scale: float
) -> jax.Array:
    """See `tinker_jax.kernels.attention.attention`."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32) * scale
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    mask_BTS = same & jnp.tril(jnp.ones((T, T), bool))[None]
    probs = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", probs.astype(v_BTKH.dtype), v_BTKH)
    return out.reshape(B, T, N, H)
