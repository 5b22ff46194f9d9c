"""cuDNN's flash attention on packed rows, for NVIDIA GPUs from Hopper on.

JAX's public `jax.nn.dot_product_attention(implementation="cudnn")` knows no segments. The private function below it does: it
takes where each segment of a row starts and how long it is. This file is the only one that touches it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tinker_jax.kernels.cudnn import private

MAX_SEGMENTS = 64
"""Most segments a row may hold, padding counted as one."""

_KEYWORDS = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type", "qkv_layout"}


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    segment_ids_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    most_segments: int = MAX_SEGMENTS,
) -> jax.Array:
    """See `tinker_jax.kernels.attention.attention`. A row of more than `most_segments` segments becomes NaN.

    cuDNN keeps float32 [B · most_segments, N, T] for the backward pass, and looks at all of it.
    """
    (T, N, H), V = q_BTNH.shape[1:], v_BTKV.shape[3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 and float16, not {q_BTNH.dtype.name}")
    width = max(H, V)
    if width > 256 or width % 8:
        raise NotImplementedError(f"cuDNN attention takes head widths up to 256 that 8 divides, not {width}")
    if sinks_N is not None:
        raise NotImplementedError("cuDNN attention has no attention sinks: JAX drops the gradient of its log-sum-exp")
    if window is not None:
        raise NotImplementedError("cuDNN attention with a sliding window has not been tried on packed rows")
    module = _private()
    if N != k_BTKH.shape[2] and jax.__version_info__ < (0, 11, 1):
        raise NotImplementedError(
            f"jax {jax.__version__} reads the wrong keys in packed cuDNN attention with fewer key than query heads "
            "(jax-ml/jax#39521); jax 0.11.1 does not"
        )
    starts_BS, lengths_BM, too_many_B = segments(segment_ids_BT, max(2, min(T, most_segments)))

    def as_wide(x):
        # JAX counts where a segment's values begin in the width of keys. Numbers that are zero change nothing.
        return jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, width - x.shape[3])])

    out_BTNV = module.dot_product_attention(
        as_wide(q_BTNH),
        as_wide(k_BTKH),
        as_wide(v_BTKV),
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BS,
        kv_offsets=starts_BS,
        scale=scale,
        mask_type=module.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
    )
    return jnp.where(too_many_B[:, None, None, None], jnp.nan, out_BTNV[..., :V])


def segments(segment_ids_BT: jax.Array, M: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segments in the form the private function wants.

    Args:
        segment_ids_BT: as for `attention`.
        M: most segments a row may hold.

    Returns:
        Starts, int32 [B, M + 1], and lengths, int32 [B, M], of each row's segments, then -1; and bool [B]: are there more?
    """
    B, T = segment_ids_BT.shape
    edge_BT = jnp.concatenate([jnp.ones((B, 1), bool), segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1)
    bounds_BS = jax.vmap(lambda edge_T: jnp.nonzero(edge_T, size=M + 1, fill_value=T)[0])(edge_BT).astype(jnp.int32)
    too_many_B = bounds_BS[:, M] < T
    used_BM = bounds_BS[:, :M] < T
    starts_BM = jnp.where(used_BM, bounds_BS[:, :M], -1)
    lengths_BM = jnp.where(used_BM, jnp.diff(bounds_BS, axis=1), -1)
    return jnp.pad(starts_BM, [(0, 0), (0, 1)], constant_values=-1), lengths_BM, too_many_B


def _private() -> Any:
    return private("dot_product_attention", {"query", "key", "value", *_KEYWORDS}, 90600)
