"""Small modules that the families share: linear with optional LoRA, RMS norm, rotary embedding.

Tokens are flat [M, D] through every linear: on CPU the transposing copies of [B, T, D] operands cost more than the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tinker_jax import lora
from tinker_jax.kernels.products import times_transposed
from tinker_jax.models.config import Rope


class Linear(nnx.Module):
    """y = x Wᵀ + b, plus an adapter's update when one is given. W [D_out, D_in], as files hold it."""

    def __init__(self, kernel: jax.Array, bias: jax.Array | None = None) -> None:
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x_MD: jax.Array, update: jax.Array | None = None) -> jax.Array:
        y = times_transposed(x_MD, self.kernel[...])
        if self.bias is not None:
            y = y + self.bias[...][None]
        if update is not None:
            y = y + update
        return checkpoint_name(y, lora.PRODUCTS)


def project(
    x_MD: jax.Array,
    linears: Sequence[Linear],
    adapters: Sequence[Mapping[str, jax.Array] | None],
    slots_MR: jax.Array | None = None,
) -> list[jax.Array]:
    """Several linears of the same tokens, each with its adapter where it has one; `slots_MR` as in `lora.updates`."""
    updates = lora.updates(x_MD, adapters, slots_MR)
    return [linear(x_MD, update) for linear, update in zip(linears, updates, strict=True)]


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis; statistics in float32."""

    def __init__(self, scale: jax.Array, eps: float) -> None:
        self.scale = nnx.Param(scale)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...]
        return f.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def rope_frequencies(rope: Rope, H: int) -> np.ndarray:
    """Angular frequency of each of the H/2 planes, float32.

    `"llama3"` divides low frequencies by `factor`, keeps high ones, and blends linearly in between, by how often a plane
    turns within the original context (Llama 3.1 release).
    """
    freq = 1.0 / rope.theta ** (np.arange(0, H, 2, dtype=np.float64) / H)
    if rope.kind == "llama3":
        turns = rope.original_max_position * freq / (2 * np.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / rope.factor
    return freq.astype(np.float32)


def rope_table(rope: Rope, H: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., H/2] in float32 of integer positions [...]."""
    freq = rope_frequencies(rope, H).reshape((1,) * positions.ndim + (H // 2,))
    angle = positions.astype(jnp.float32)[..., None] * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_MNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of each head against each other (the half-split layout of Hugging Face checkpoints)."""
    cos, sin = (t[:, None, :] for t in table)
    lo, hi = jnp.split(x_MNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x_MNH.dtype)
