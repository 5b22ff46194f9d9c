"""The mathematics in its plainest form: full logits, JAX's own derivatives. For tests and for reading.

`head_logits` is also what the tiled backend and the sampler call on a few rows at a time, so that trainer and sampler
round alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tinker_jax.kernels.products import times_transposed


def head_logits(
    h_MD: jax.Array,
    kernel_VD: jax.Array,
    lora: Mapping[str, jax.Array] | None = None,
    slots_MR: jax.Array | None = None,
) -> jax.Array:
    """Logits `h @ kernel.T + (h @ a) @ b`, multiplied in `h`'s dtype, accumulated and returned in float32.

    Args:
        h_MD: hidden states `[M, D]`.
        kernel_VD: head in embedding orientation `[V, D]`. A dtype other than `h`'s is cast, which copies the head.
        lora: `{"a": [D, R], "b": [R, V]}` with the LoRA scale already inside `b`, or None.
        slots_MR: bool, which part of the rank axis belongs to each row's adapter; None: all of it.

    Returns:
        `[M, V]` float32.
    """
    f32 = {"preferred_element_type": jnp.float32}
    logits_MV = times_transposed(h_MD, kernel_VD.astype(h_MD.dtype), jnp.float32)
    if lora is not None:
        z_MR = jnp.einsum("MD,DR->MR", h_MD, lora["a"].astype(h_MD.dtype), **f32).astype(h_MD.dtype)
        if slots_MR is not None:
            z_MR = jnp.where(slots_MR, z_MR, 0)
        logits_MV += jnp.einsum("MR,RV->MV", z_MR, lora["b"].astype(h_MD.dtype), **f32)
    return logits_MV


def linear_cross_entropy_reference(
    h_MD: jax.Array,
    kernel_VD: jax.Array,
    targets_MK: jax.Array,
    *,
    lora: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(logprobs [M, K], entropy [M])` in float32 from full logits; entropy carries no gradient."""
    logp_MV = jax.nn.log_softmax(head_logits(h_MD, jax.lax.stop_gradient(kernel_VD), lora), axis=-1)
    entropy_M = -jnp.sum(jnp.exp(logp_MV) * logp_MV, axis=-1)
    return jnp.take_along_axis(logp_MV, targets_MK, axis=-1), jax.lax.stop_gradient(entropy_M)


def linear_top_k_reference(
    h_MD: jax.Array, kernel_VD: jax.Array, k: int, *, lora: Mapping[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(logprobs [M, k], ids [M, k])` of the k likeliest tokens, likeliest first, from full logits."""
    return jax.lax.top_k(jax.nn.log_softmax(head_logits(h_MD, kernel_VD, lora), axis=-1), k)
