"""Small modules that the families share: linear with optional LoRA, RMS norm.

Tokens are flat [M, D] through every linear: on CPU the transposing copies of [B, T, D] operands cost more than the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tinker_jax import lora
from tinker_jax.kernels.products import times_transposed


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
