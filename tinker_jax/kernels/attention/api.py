"""Causal grouped-query attention over packed rows: one signature, several implementations."""

from __future__ import annotations

from typing import Literal

import jax

from tinker_jax.kernels.attention.blockwise import blockwise_attention
from tinker_jax.kernels.attention.reference import reference_attention

Implementation = Literal["blockwise", "reference"]


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    implementation: Implementation = "blockwise",
) -> jax.Array:
    """softmax(scale · q kᵀ) v, where a token sees itself and what came before it in its own segment.

    Args:
        q_BTNH: queries.
        k_BTKH: keys; N is a multiple of K, and query head n reads key head n // (N / K).
        v_BTKH: values.
        segment_ids_BT: int32. Tokens of one sequence share an id and are contiguous. Padding has an id of its own.
        scale: factor of the scores, usually H ** -0.5.
        implementation: `"blockwise"` never holds a T × T array and skips blocks that no segment touches; `"reference"` is
            the plain formula.

    Returns:
        [B, T, N, H] in q's dtype; scores and softmax are computed in float32.
    """
    run = {"blockwise": blockwise_attention, "reference": reference_attention}[implementation]
    return run(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, scale)
