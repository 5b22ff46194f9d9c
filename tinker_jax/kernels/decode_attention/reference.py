"""The plain formula, for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tinker_jax.kernels.decode_attention.pages import Pages, visible


def reference_attend(
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
    """See `PagedAttention.attend`; everything is float32. `values` are the numbers of a latent that are the value."""
    R, T, N, H = q_RTNH.shape
    K = pages.k.shape[1]
    k_PKCH = pages.k.swapaxes(2, 3)
    v_PKCV = k_PKCH[..., :values] if pages.v is None else pages.v
    k_RKSH, v_RKSV = (x[tables_RW].swapaxes(1, 2).reshape(R, K, -1, x.shape[3]).astype(jnp.float32) for x in (k_PKCH, v_PKCV))
    q_RTKGH = q_RTNH.reshape(R, T, K, N // K, H).astype(jnp.float32)
    scores_RKGTS = jnp.einsum("RTKGH,RKSH->RKGTS", q_RTKGH, k_RKSH, precision="highest") * scale
    keys = jnp.arange(k_RKSH.shape[2])[None, None]
    seen_RTS = visible(keys, positions_RT[:, :, None], window)
    scores_RKGTS = jnp.where(seen_RTS[:, None, None], scores_RKGTS, -jnp.inf)
    if sinks_N is not None:
        sinks_RKGT1 = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (R, K, N // K, T, 1))
        scores_RKGTS = jnp.concatenate([scores_RKGTS, sinks_RKGT1], axis=-1)
    probs_RKGTS = jax.nn.softmax(scores_RKGTS, axis=-1)[..., : keys.size]
    probs_RKGTS = jnp.where(seen_RTS[:, None, None], probs_RKGTS, 0)  # padding sees nothing: its softmax is NaN
    out = jnp.einsum("RKGTS,RKSV->RTKGV", probs_RKGTS, v_RKSV, precision="highest")
    return out.reshape(R, T, N, -1).astype(q_RTNH.dtype)
