"""Tiled backend in plain XLA, with a derivative of its own.

The head is attention of a row over the vocabulary, with the head's rows as keys and as values: Σ_v p_v · head[v] is what the
gradient needs of the softmax, whatever the loss, so the forward pass makes it beside the log-probabilities, from the same
logits. Where the vocabulary comes in blocks, the softmax is online (Milakov & Gimelshein, arXiv:1805.02867).

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
_LOWEST = -1e30  # finite: `_LOWEST − _LOWEST` must not be NaN


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def linear_cross_entropy(
    tiles: Tiles, block: int, entropy: bool, h_MD: jax.Array, kernel_VD: jax.Array, targets_MK: jax.Array, lora: Lora
) -> tuple[jax.Array, jax.Array | None]:
    """`(logprobs [M, K], entropy [M] | None)`; see the API for the contract."""
    softmax = _softmax(tiles, block, h_MD, kernel_VD, targets_MK, lora, entropy=entropy)
    return softmax.logprobs_MK, softmax.entropy_M


def linear_top_k(tiles: Tiles, h_MD: jax.Array, kernel_VD: jax.Array, k: int, lora: Lora) -> tuple[jax.Array, jax.Array]:
    """`(logprobs [M, k], ids [M, k])` of the likeliest tokens."""

    def one_tile(h_mD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_mV = _logits(h_mD, kernel_VD, lora)
        values_mk, ids_mk = jax.lax.top_k(logits_mV, k)
        return values_mk - jax.nn.logsumexp(logits_mV, axis=-1, keepdims=True), ids_mk

    return _map_tiles(tiles, one_tile, h_MD)


class _Softmax(NamedTuple):
    """What one pass over the head leaves of the softmax of every row.

    Attributes:
        mean_MD: Σ_v p_v · head[v], float32; None unless asked for.
        mean_MR: the same of LoRA's second factor.
    """

    logprobs_MK: jax.Array
    lse_M: jax.Array
    entropy_M: jax.Array | None
    mean_MD: jax.Array | None
    mean_MR: jax.Array | None


class _Running(NamedTuple):
    """The softmax of a tile after some blocks of the vocabulary, relative to the largest logit so far."""

    top_m1: jax.Array
    total_m1: jax.Array  # Σ e, where e = exp(logit − top)
    target_mK: jax.Array  # logits of the targets met so far
    weighted_m1: jax.Array | None  # Σ e · (logit − top)
    mean_mD: jax.Array | None  # Σ e · head[v]
    mean_mR: jax.Array | None


def _softmax(
    tiles: Tiles,
    block: int,
    h_MD: jax.Array,
    kernel_VD: jax.Array,
    targets_MK: jax.Array,
    lora: Lora,
    *,
    entropy: bool = False,
    mean: bool = False,
) -> _Softmax:
    def one_tile(h_mD: jax.Array, targets_mK: jax.Array) -> _Softmax:
        z_mR = None if lora is None else _rank(h_mD, lora[0])

        def one_block(j: Any, so_far: _Running) -> _Running:
            top, total, target, weighted, mean_mD, mean_mR = so_far
            columns = _columns(j, block, kernel_VD, lora)
            logits_mv = _block_logits(h_mD, z_mR, columns)
            if columns.again_1v is not None:
                logits_mv = jnp.where(columns.again_1v, _LOWEST, logits_mv)
            new_top = jnp.maximum(top, jnp.max(logits_mv, axis=-1, keepdims=True))
            e_mv = jnp.exp(logits_mv - new_top)
            shrink = jnp.exp(top - new_top)
            here = (targets_mK >= j * block) & (targets_mK < (j + 1) * block)
            found = jnp.take_along_axis(logits_mv, targets_mK - columns.start, axis=-1, mode="clip")
            if weighted is not None:
                # Of log total − weighted / total neither term is negative, so nothing cancels.
                weighted = (weighted + total * (top - new_top)) * shrink
                weighted += jnp.sum(e_mv * (logits_mv - new_top), axis=-1, keepdims=True)
            if mean_mD is not None:
                # The likeliest token has e = 1 in any dtype, so `target − mean` keeps its digits where p is near 1.
                mean_mD = mean_mD * shrink + _product("mv,vD->mD", e_mv.astype(h_mD.dtype), columns.kernel_vD)
            if mean_mR is not None and columns.b_Rv is not None:
                mean_mR = mean_mR * shrink + _product("mv,Rv->mR", e_mv.astype(h_mD.dtype), columns.b_Rv)
            total = total * shrink + jnp.sum(e_mv, axis=-1, keepdims=True)
            return _Running(new_top, total, jnp.where(here, found, target), weighted, mean_mD, mean_mR)

        rows = h_mD.shape[0]
        zero = jnp.zeros((rows, 1))
        start = _Running(
            zero + _LOWEST,
            zero,
            jnp.zeros(targets_mK.shape),
            zero if entropy else None,
            jnp.zeros((rows, h_mD.shape[1])) if mean else None,
            jnp.zeros((rows, lora[1].shape[0])) if mean and lora is not None else None,
        )
        end = _walk(kernel_VD.shape[0], block, one_block, start)
        lse_m1 = end.top_m1 + jnp.log(end.total_m1)
        return _Softmax(
            end.target_mK - lse_m1,
            lse_m1[:, 0],
            None if end.weighted_m1 is None else (jnp.log(end.total_m1) - end.weighted_m1 / end.total_m1)[:, 0],
            None if end.mean_mD is None else end.mean_mD / end.total_m1,
            None if end.mean_mR is None else end.mean_mR / end.total_m1,
        )

    return _map_tiles(tiles, one_tile, h_MD, targets_MK)


def _fwd(tiles: Tiles, block: int, entropy: bool, h_MD, kernel_VD, targets_MK, lora: Lora) -> Any:
    softmax = _softmax(tiles, block, h_MD, kernel_VD, targets_MK, lora, entropy=entropy, mean=True)
    hidden = jnp.zeros((0,), h_MD.dtype) if lora is None else h_MD  # else its dtype alone is needed
    residuals = hidden, kernel_VD, targets_MK, lora, softmax.lse_M, softmax.mean_MD, softmax.mean_MR
    return (softmax.logprobs_MK, softmax.entropy_M), residuals


def _bwd(tiles: Tiles, block: int, entropy: bool, residuals: Any, cotangents: tuple[jax.Array, jax.Array | None]) -> Any:
    """d logprob_k / d h = head[target_k] − Σ_v p_v · head[v], whose second term the forward pass has made."""
    h_MD, kernel_VD, targets_MK, lora, lse_M, mean_MD, mean_MR = residuals
    g_MK, _ = cotangents  # entropy carries no gradient
    g_M1 = jnp.sum(g_MK, axis=-1, keepdims=True)
    dtype = h_MD.dtype

    def at_targets(table: jax.Array) -> jax.Array:
        """Σ_k g_k · table[target_k], one target after the other: K of these rows at once could be large."""

        def add(k: Any, total: jax.Array) -> jax.Array:
            return total + g_MK[:, k, None] * table[targets_MK[:, k]].astype(jnp.float32)

        K, start = g_MK.shape[1], jnp.zeros((g_MK.shape[0], table.shape[1]))
        return add(0, start) if K == 1 else jax.lax.fori_loop(0, K, add, start)

    dh_MD = at_targets(kernel_VD.astype(dtype)) - g_M1 * mean_MD
    if lora is None:
        return dh_MD.astype(dtype), None, None, None  # None: the frozen head and the targets, symbolically zero
    a, b = (factor.astype(dtype) for factor in lora)
    dz_MR = (at_targets(b.T) - g_M1 * mean_MR).astype(dtype)
    dh_MD += _product("MR,DR->MD", dz_MR, a)
    da = _product("MD,MR->DR", h_MD, dz_MR)
    db = _second_factor_gradient(tiles, block, h_MD, kernel_VD, targets_MK, lora, lse_M, g_MK)
    return dh_MD.astype(dtype), None, None, (da.astype(lora[0].dtype), db.astype(lora[1].dtype))


def _second_factor_gradient(tiles: Tiles, block: int, h_MD, kernel_VD, targets_MK, lora, lse_M, g_MK) -> jax.Array:
    """zᵀ · d logits with d logits = Σ_k g_k · (onehot_k − p): the one gradient for which logits are computed again."""
    V = kernel_VD.shape[0]

    def one_tile(db_RV: jax.Array, h_mD, targets_mK, lse_m, g_mK) -> tuple[jax.Array, None]:
        z_mR = _rank(h_mD, lora[0])
        minus_g_m1 = -jnp.sum(g_mK, axis=-1, keepdims=True)

        def one_block(j: Any, db_RV: jax.Array) -> jax.Array:
            columns = _columns(j, block, kernel_VD, lora)
            p_mv = jnp.exp(_block_logits(h_mD, z_mR, columns) - lse_m[:, None])
            places_mK = targets_mK - columns.start
            places_mK = jnp.where(places_mK < 0, V, places_mK)  # of another block: a negative one would count from the end
            dlogits_mv = _add_at_targets(minus_g_m1 * p_mv, places_mK, g_mK)
            if columns.again_1v is not None:
                dlogits_mv = jnp.where(columns.again_1v, 0.0, dlogits_mv)
            db_Rv = _product("mR,mv->Rv", z_mR, dlogits_mv.astype(h_mD.dtype))
            if block >= V:
                return db_RV + db_Rv
            old = jax.lax.dynamic_slice_in_dim(db_RV, columns.start, block, 1)
            return jax.lax.dynamic_update_slice_in_dim(db_RV, old + db_Rv, columns.start, 1)

        return _walk(V, block, one_block, db_RV), None

    db_RV, _ = _scan_tiles(tiles, one_tile, jnp.zeros(lora[1].shape, jnp.float32), h_MD, targets_MK, lse_M, g_MK)
    return db_RV


linear_cross_entropy.defvjp(_fwd, _bwd)


class _Columns(NamedTuple):
    """A block of the vocabulary. The last one is moved back to end with it; `again_1v` marks what another has had."""

    start: Any
    kernel_vD: jax.Array
    b_Rv: jax.Array | None
    again_1v: jax.Array | None


def _walk(V: int, block: int, one_block: Callable[..., Any], carry: Any) -> Any:
    """`one_block(j, carry)` over all blocks of the vocabulary."""
    return one_block(0, carry) if block >= V else jax.lax.fori_loop(0, -(-V // block), one_block, carry)


def _columns(j: Any, block: int, kernel_VD: jax.Array, lora: Lora) -> _Columns:
    V, b_RV = kernel_VD.shape[0], None if lora is None else lora[1]
    if block >= V:
        return _Columns(0, kernel_VD, b_RV, None)
    start = jnp.minimum(j * block, V - block)
    kernel_vD = jax.lax.dynamic_slice_in_dim(kernel_VD, start, block, 0)
    b_Rv = None if b_RV is None else jax.lax.dynamic_slice_in_dim(b_RV, start, block, 1)
    again_1v = None
    if V % block:
        again_1v = start + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < j * block
    return _Columns(start, kernel_vD, b_Rv, again_1v)


def _product(axes: str, x: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.einsum(axes, x, factor.astype(x.dtype), preferred_element_type=jnp.float32)


def _rank(h_mD: jax.Array, a_DR: jax.Array) -> jax.Array:
    return _product("mD,DR->mR", h_mD, a_DR).astype(h_mD.dtype)


def _block_logits(h_mD: jax.Array, z_mR: jax.Array | None, columns: _Columns) -> jax.Array:
    """`head_logits` of a block."""
    logits_mv = _product("mD,vD->mv", h_mD, columns.kernel_vD)
    if z_mR is None or columns.b_Rv is None:
        return logits_mv
    return logits_mv + _product("mR,Rv->mv", z_mR, columns.b_Rv)


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
