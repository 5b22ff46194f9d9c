"""Attention in blocks, in plain XLA: no T × T array in either direction, and no work on blocks that no segment touches.

The online softmax is that of Milakov & Gimelshein (arXiv:1805.02867), the recomputing backward pass that of Dao et al.,
FlashAttention (arXiv:2205.14135).

What a CPU wants decides the layout. Scores are held transposed, keys down and queries across, and every operand is laid out
so that each product is a plain matrix product: a transposed left side costs three times as much. The query heads that share a
key head lie side by side (R = G·C columns), and everything that depends on the query alone is a row of R numbers, so that the
mask is two vector comparisons.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinker_jax.kernels.attention.names import RESIDUALS

BLOCK = 256
_MASKED = -1e30  # finite: exp(_MASKED - _MASKED) of a query that sees nothing of a block must not be NaN


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    segment_ids_BT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    rows_at_once: int | None = None,
) -> jax.Array:
    """See `tinker_jax.kernels.attention.attention`.

    Args:
        q_BTNH: queries; k, v and the rest as there.
        rows_at_once: rows of one block product, a divisor of B; None: all. One keeps a block of scores in a CPU's cache.
    """
    T = q_BTNH.shape[1]
    C = min(BLOCK, T)
    padding = -T % C
    if padding:
        q_BTNH, k_BTKH, v_BTKV = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKV))
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), constant_values=-1)
    first_BT, last_BT = _seen(segment_ids_BT, window)
    static = (C, rows_at_once or q_BTNH.shape[0], scale)
    out_BTNV: Any = _attention(static, q_BTNH, k_BTKH, v_BTKV, sinks_N, first_BT, last_BT)
    return out_BTNV[:, :T]


def _seen(segment_ids_BT: jax.Array, window: int | None) -> tuple[jax.Array, jax.Array]:
    """For each position the first that it sees, and the last that sees it, int32 [B, T]."""
    B, T = segment_ids_BT.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    change = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    edge = jnp.ones((B, 1), bool)
    starts = jnp.concatenate([edge, change], axis=1)
    ends = jnp.concatenate([change, edge], axis=1)
    first = jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, positions, T), axis=1, reverse=True)
    if window is None:
        return first, last
    return jnp.maximum(first, positions - window + 1), jnp.minimum(last, positions + window - 1)


# ---- layouts: blocks of C positions first, then P = B·K key heads; G·C queries, or C keys, in every block ----
#
# Rows and heads are one axis: a row axis of length 1 makes XLA copy every operand between two equal layouts of it.


def _down(x_BTNH: jax.Array, K: int, C: int) -> jax.Array:
    """[B, T, K·G, H] → [T / C, P, G·C, H]."""
    B, T, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, T // C, C, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(T // C, B * K, N // K * C, H)


def _across(x_BTNH: jax.Array, K: int, C: int) -> jax.Array:
    """[B, T, K·G, H] → [T / C, P, H, G·C]."""
    B, T, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, T // C, C, K, N // K, H).transpose(1, 0, 3, 5, 4, 2)
    return x.reshape(T // C, B * K, H, N // K * C)


def _from_down(x: jax.Array, B: int) -> jax.Array:
    """[blocks, P, C, H] → [B, T, K, H]."""
    blocks, P, C, H = x.shape
    return x.reshape(blocks, B, P // B, C, H).transpose(1, 0, 3, 2, 4).reshape(B, blocks * C, P // B, H)


def _from_across(x: jax.Array, B: int, C: int) -> jax.Array:
    """[blocks, P, H, G·C] → [B, T, K·G, H]."""
    blocks, P, H, R = x.shape
    x = x.reshape(blocks, B, P // B, H, R // C, C).transpose(1, 0, 5, 2, 4, 3)
    return x.reshape(B, blocks * C, P // B * (R // C), H)


def _a_query(x_BT: jax.Array, K: int, G: int, C: int) -> jax.Array:
    """One number a position, [B, T] → [T / C, P, 1, G·C], or with 1 for P where there is one row."""
    B, T = x_BT.shape
    x = jnp.tile(x_BT.reshape(B, T // C, C).transpose(1, 0, 2), (1, 1, G))
    return (x if B == 1 else jnp.repeat(x, K, axis=1))[:, :, None]


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _scores(k_PCH: jax.Array, q_PHR: jax.Array, scale: float, j: jax.Array, first: jax.Array, own: jax.Array) -> jax.Array:
    """Masked scores [P, C, R] of the keys of block j."""
    C = k_PCH.shape[1]
    keys = (j * C + jnp.arange(C, dtype=jnp.int32))[None, :, None]
    s = _product("PCH,PRH->PCR", k_PCH, q_PHR) * scale
    return jnp.where((first <= keys) & (keys <= own), s, _MASKED)


def _queries(first_BT: jax.Array, K: int, G: int, C: int) -> tuple[jax.Array, jax.Array]:
    """What the mask asks of each query: the first position it sees, and its own."""
    own_BT = jnp.broadcast_to(jnp.arange(first_BT.shape[1], dtype=jnp.int32)[None], first_BT.shape)
    return _a_query(first_BT, K, G, C), _a_query(own_BT, K, G, C)


def _by_group(one_group: Any, rows: int, arrays: tuple[jax.Array, ...]) -> Any:
    """`one_group` on so many rows of all arrays at a time."""
    count = arrays[0].shape[0] // rows
    if count == 1:
        return one_group(*arrays)
    split = tuple(x.reshape(count, rows, *x.shape[1:]) for x in arrays)
    out = jax.lax.map(lambda group: one_group(*group), split)
    return jax.tree.map(lambda x: x.reshape(count * rows, *x.shape[2:]), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q_BTNH, k_BTKH, v_BTKV, sinks_N, first_BT, last_BT):
    return _forward(static, q_BTNH, k_BTKH, v_BTKV, sinks_N, first_BT, last_BT)[0]


def _forward(static, q_BTNH, k_BTKH, v_BTKV, sinks_N, first_BT, last_BT):
    C, rows, scale = static
    N, (K, V) = q_BTNH.shape[2], v_BTKV.shape[2:]
    G = N // K
    if sinks_N is None:
        top, total = jnp.full((rows * K, 1, G * C), _MASKED), jnp.zeros((rows * K, 1, G * C))
    else:  # a sink is a score that every query meets first; its value is zero
        sink = jnp.repeat(sinks_N.astype(jnp.float32).reshape(K, G), C, axis=1)[:, None]
        top, total = jnp.tile(sink, (rows, 1, 1)), jnp.ones((rows * K, 1, G * C))
    start = (jnp.zeros((rows * K, V, G * C)), top, total)

    def group(q_BTNH, k_BTKH, v_BTKV, first_BT):
        q, k, v = _down(q_BTNH, K, C), _down(k_BTKH, K, C), _across(v_BTKV, K, C)
        lowest = jnp.min(first_BT, axis=0).reshape(-1, C).min(axis=1) // C

        def query_block(_, xs):
            i, qi, first, own, low = xs

            def key_block(j, carry):
                acc, top, total = carry
                s = _scores(k[j], qi, scale, j, first, own)
                new_top = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
                p = jnp.exp(s - new_top)
                shrink = jnp.exp(top - new_top)
                pv = _product("PVC,PCR->PVR", v[j], p.astype(v.dtype))
                return acc * shrink + pv, new_top, total * shrink + jnp.sum(p, axis=1, keepdims=True)

            # A query that sees nothing of a block gives it weight 1 a key; `shrink` = 0 wipes that out at its first real
            # key, which always comes: a token sees itself, in the last block.
            acc, top, total = jax.lax.fori_loop(low, i + 1, key_block, start)
            return None, ((acc / total).astype(q.dtype), top + jnp.log(total))

        blocks = jnp.arange(q.shape[0], dtype=jnp.int32)
        _, (out, lse) = jax.lax.scan(query_block, None, (blocks, q, *_queries(first_BT, K, G, C), lowest))
        return _from_across(out, rows, C), _from_across(lse, rows, C)

    out_BTNV, lse_BTN1 = _by_group(group, rows, (q_BTNH, k_BTKH, v_BTKV, first_BT))
    out_BTNV, lse_BTN1 = checkpoint_name(out_BTNV, RESIDUALS), checkpoint_name(lse_BTN1, RESIDUALS)
    return out_BTNV, (q_BTNH, k_BTKH, v_BTKV, sinks_N, first_BT, last_BT, out_BTNV, lse_BTN1)


def _backward(static, saved, grad_BTNV):
    C, rows, scale = static
    q_BTNH, k_BTKH, v_BTKV, sinks_N, first_BT, last_BT, out_BTNV, lse_BTN1 = saved
    K, H = k_BTKH.shape[2:]
    G = q_BTNH.shape[2] // K
    delta_BTN1 = jnp.sum(grad_BTNV.astype(jnp.float32) * out_BTNV.astype(jnp.float32), axis=-1, keepdims=True)

    def group(q_BTNH, k_BTKH, v_BTKV, grad_BTNV, delta_BTN1, lse_BTN1, first_BT, last_BT):
        q = q_down = _down(q_BTNH, K, C)
        grad = grad_down = _down(grad_BTNV, K, C)
        delta, lse = _across(delta_BTN1, K, C), _across(lse_BTN1, K, C)
        first, own = _queries(first_BT, K, G, C)
        highest = jnp.max(last_BT, axis=0).reshape(-1, C).max(axis=1) // C
        no_dk, no_dv = (jnp.zeros((rows * K, C, width), jnp.float32) for width in (H, v_BTKV.shape[3]))

        def key_block(dq, xs):
            j, k, k_across, v, high = xs

            def query_block(i, carry):
                dq, dk, dv = carry
                p = jnp.exp(_scores(k, q[i], scale, j, first[i], own[i]) - lse[i])
                dv = dv + _product("PCR,PRV->PCV", p.astype(grad.dtype), grad_down[i])
                dp = _product("PCV,PRV->PCR", v, grad[i])
                ds = (p * (dp - delta[i])).astype(q.dtype)
                dk = dk + _product("PCR,PRH->PCH", ds, q_down[i])
                dqi = _product("PHC,PCR->PHR", k_across, ds)
                return jax.lax.dynamic_update_index_in_dim(dq, dq[i] + dqi, i, 0), dk, dv

            dq, dk, dv = jax.lax.fori_loop(j, high + 1, query_block, (dq, no_dk, no_dv))
            return dq, (dk, dv)

        blocks = jnp.arange(q.shape[0], dtype=jnp.int32)
        k = _down(k_BTKH, K, C)
        xs = (blocks, k, k.swapaxes(-1, -2), _down(v_BTKV, K, C), highest)
        dq, (dk, dv) = jax.lax.scan(key_block, jnp.zeros((q.shape[0], q.shape[1], H, q.shape[2]), jnp.float32), xs)
        dq = (_from_across(dq, rows, C) * scale).astype(q_BTNH.dtype)
        return dq, (_from_down(dk, rows) * scale).astype(k_BTKH.dtype), _from_down(dv, rows).astype(v_BTKV.dtype)

    arrays = (q_BTNH, k_BTKH, v_BTKV, grad_BTNV, delta_BTN1, lse_BTN1, first_BT, last_BT)
    dq, dk, dv = _by_group(group, rows, arrays)
    dsinks = None
    if sinks_N is not None:
        share_BTN = jnp.exp(sinks_N.astype(jnp.float32)[None, None] - lse_BTN1[..., 0])
        dsinks = -jnp.sum(share_BTN * delta_BTN1[..., 0], axis=(0, 1)).astype(sinks_N.dtype)
    return dq, dk, dv, dsinks, None, None


_attention.defvjp(_forward, _backward)
