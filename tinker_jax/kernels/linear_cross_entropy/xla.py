"""Token-tiled backend in plain XLA, with a derivative of its own.

Tile t holds the rows `t, t + tiles, t + 2·tiles, …`: rows are viewed as `[rows per tile, tiles]`, so a row axis that is
sharded over devices stays sharded inside every tile, where contiguous tiles would each live on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .reference import head_logits

Lora = tuple[jax.Array, jax.Array] | None

# Up to this many targets a row the one-hot of the backward pass is a chain of compares, which fuses with the softmax;
# beyond, a scatter costs less than the chain.
_MAX_COMPARES = 8


class Tiles(NamedTuple):
    """`count` tiles of `rows` rows; `count * rows` is at least the number of rows, the rest is padding."""

    count: int
    rows: int


def plan_tiles(num_rows: int, tile: int) -> Tiles:
    """Fewest tiles of at most `tile` rows, or up to twice as many where that divides the rows without padding."""
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row, got {tile}")
    fewest = max(1, -(-num_rows // tile))
    for count in range(fewest, 2 * fewest + 1):
        if num_rows % count == 0:
            return Tiles(count, num_rows // count)
    return Tiles(fewest, -(-num_rows // fewest))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_cross_entropy(
    tiles: Tiles, entropy: bool, h_MD: jax.Array, kernel_VD: jax.Array, targets_MK: jax.Array, lora: Lora
) -> tuple[jax.Array, jax.Array | None]:
    """`(logprobs [M, K], entropy [M] | None)`; see the API for the contract."""
    logprobs_MK, entropy_M, _ = _forward(tiles, entropy, h_MD, kernel_VD, targets_MK, lora)
    return logprobs_MK, entropy_M


def linear_top_k(tiles: Tiles, h_MD: jax.Array, kernel_VD: jax.Array, k: int, lora: Lora) -> tuple[jax.Array, jax.Array]:
    """`(logprobs [M, k], ids [M, k])` of the likeliest tokens."""

    def one_tile(h_mD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_mV = _logits(h_mD, kernel_VD, lora)
        values_mk, ids_mk = jax.lax.top_k(logits_mV, k)
        return values_mk - jax.nn.logsumexp(logits_mV, axis=-1, keepdims=True), ids_mk

    return _map_tiles(tiles, one_tile, h_MD)


def _forward(
    tiles: Tiles, entropy: bool, h_MD: jax.Array, kernel_VD: jax.Array, targets_MK: jax.Array, lora: Lora
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    def one_tile(h_mD: jax.Array, targets_mK: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        logits_mV = _logits(h_mD, kernel_VD, lora)
        lse_m = jax.nn.logsumexp(logits_mV, axis=-1)
        logprobs_mK = jnp.take_along_axis(logits_mV, targets_mK, axis=-1, mode="clip") - lse_m[:, None]
        entropy_m = None
        if entropy:
            logp_mV = logits_mV - lse_m[:, None]  # before the sum: lse − Σ p·logits would cancel
            entropy_m = -jnp.sum(jnp.exp(logp_mV) * logp_mV, axis=-1)
        return logprobs_mK, entropy_m, lse_m

    return _map_tiles(tiles, one_tile, h_MD, targets_MK)


def _fwd(tiles: Tiles, entropy: bool, h_MD: jax.Array, kernel_VD: jax.Array, targets_MK: jax.Array, lora: Lora) -> Any:
    logprobs_MK, entropy_M, lse_M = _forward(tiles, entropy, h_MD, kernel_VD, targets_MK, lora)
    return (logprobs_MK, entropy_M), (h_MD, kernel_VD, targets_MK, lora, lse_M)


def _bwd(tiles: Tiles, entropy: bool, residuals: Any, cotangents: tuple[jax.Array, jax.Array | None]) -> Any:
    """d logits = Σ_k g_k · (onehot_k − softmax), tile by tile, contracted at once with head and LoRA factors."""
    h_MD, kernel_VD, targets_MK, lora, lse_M = residuals
    g_MK, _ = cotangents  # entropy carries no gradient
    dtype = h_MD.dtype
    f32 = {"preferred_element_type": jnp.float32}

    def one_tile(
        sums: Lora, h_mD: jax.Array, targets_mK: jax.Array, lse_m: jax.Array, g_mK: jax.Array
    ) -> tuple[Lora, jax.Array]:
        p_mV = jnp.exp(_logits(h_mD, kernel_VD, lora) - lse_m[:, None])
        dlogits_mV = _add_at_targets(-jnp.sum(g_mK, axis=-1, keepdims=True) * p_mV, targets_mK, g_mK).astype(dtype)
        dh_mD = jnp.einsum("mV,VD->mD", dlogits_mV, kernel_VD.astype(dtype), **f32)
        if lora is None or sums is None:
            return None, dh_mD.astype(dtype)
        a, b = (factor.astype(dtype) for factor in lora)
        z_mR = jnp.einsum("mD,DR->mR", h_mD, a, **f32).astype(dtype)
        dz_mR = jnp.einsum("mV,RV->mR", dlogits_mV, b, **f32).astype(dtype)
        dh_mD += jnp.einsum("mR,DR->mD", dz_mR, a, **f32)
        da = sums[0] + jnp.einsum("mD,mR->DR", h_mD, dz_mR, **f32)
        db = sums[1] + jnp.einsum("mR,mV->RV", z_mR, dlogits_mV, **f32)
        return (da, db), dh_mD.astype(dtype)

    zeros = None if lora is None else tuple(jnp.zeros(factor.shape, jnp.float32) for factor in lora)
    sums, dh_MD = _scan_tiles(tiles, one_tile, zeros, h_MD, targets_MK, lse_M, g_MK)
    dlora = None if lora is None else tuple(s.astype(f.dtype) for s, f in zip(sums, lora, strict=True))
    return dh_MD, None, None, dlora  # None: the frozen head and the targets, symbolically zero


linear_cross_entropy.defvjp(_fwd, _bwd)


def _logits(h_mD: jax.Array, kernel_VD: jax.Array, lora: Lora) -> jax.Array:
    return head_logits(h_mD, kernel_VD, None if lora is None else {"a": lora[0], "b": lora[1]})


def _add_at_targets(x_mV: jax.Array, targets_mK: jax.Array, g_mK: jax.Array) -> jax.Array:
    if targets_mK.shape[1] > _MAX_COMPARES:
        return x_mV.at[jnp.arange(x_mV.shape[0])[:, None], targets_mK].add(g_mK, mode="drop")
    ids_1V = jax.lax.broadcasted_iota(targets_mK.dtype, (1, x_mV.shape[1]), 1)
    for k in range(targets_mK.shape[1]):
        x_mV = x_mV + jnp.where(targets_mK[:, k, None] == ids_1V, g_mK[:, k, None], 0.0)
    return x_mV


def _map_tiles(tiles: Tiles, one_tile: Callable[..., Any], *arrays: jax.Array) -> Any:
    _, outputs = _scan_tiles(tiles, lambda carry, *tile: (carry, one_tile(*tile)), None, *arrays)
    return outputs


def _scan_tiles(tiles: Tiles, body: Callable[..., Any], carry: Any, *arrays: jax.Array) -> tuple[Any, Any]:
    """`body(carry, *tile_of_each_array) -> (carry, outputs)` over all tiles; outputs come back in row order."""
    num_rows = arrays[0].shape[0]
    if tiles.count == 1:
        return body(carry, *arrays)
    padding = tiles.count * tiles.rows - num_rows

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x
        return jnp.swapaxes(x.reshape(tiles.rows, tiles.count, *x.shape[1:]), 0, 1)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape(tiles.rows * tiles.count, *x.shape[2:])[:num_rows]

    carry, outputs = jax.lax.scan(lambda c, xs: body(c, *xs), carry, tuple(split(x) for x in arrays))
    return carry, jax.tree.map(join, outputs)
