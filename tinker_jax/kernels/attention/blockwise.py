"""Attention in blocks, in plain XLA: no T × T array in either direction, and no work on blocks that no segment touches.

The online softmax is that of Milakov & Gimelshein (arXiv:1805.02867), the recomputing backward pass that of Dao et al.,
FlashAttention (arXiv:2205.14135). Query heads that share a key head are stacked along the rows of one matrix product, and
arrays are laid out [B·K, rows, H], because on CPU the transposing copies of the obvious layout cost more than the products.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinker_jax.kernels.attention.names import RESIDUALS

BLOCK = 128
_MASKED = -1e30  # finite: exp(_MASKED - _MASKED) of a row that is masked throughout a block must not be NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, scale: float
) -> jax.Array:
    """See `tinker_jax.kernels.attention.attention`."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, scale)[0]


def _blocks(T: int) -> tuple[int, int]:
    """Block length and number of blocks for rows of T tokens."""
    C = min(BLOCK, T)
    return C, -(-T // C)


def _pad(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    width = size - x.shape[axis]
    return x if not width else jnp.pad(x, [(0, width if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def _to_heads(x_BTNH: jax.Array, K: int, T: int) -> jax.Array:
    """[B, T, K·G, H] → [B, K, G, T padded, H]."""
    B, _, N, H = x_BTNH.shape
    x = x_BTNH.reshape(B, x_BTNH.shape[1], K, N // K, H).transpose(0, 2, 3, 1, 4)
    return _pad(x, 3, T)


def _from_heads(x_BKGTH: jax.Array, T: int) -> jax.Array:
    B, K, G, _, H = x_BKGTH.shape
    return x_BKGTH[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _segment_bounds(segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and last position of the segment each token lies in, int32 [B, T]."""
    B, T = segment_ids_BT.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    change = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    edge = jnp.ones((B, 1), bool)
    starts = jnp.concatenate([edge, change], axis=1)
    ends = jnp.concatenate([change, edge], axis=1)
    first = jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, positions, T), axis=1, reverse=True)
    return first, last


def _rows(x: jax.Array, i: jax.Array, C: int) -> jax.Array:
    """Block i along the next-to-last axis."""
    return jax.lax.dynamic_slice_in_dim(x, i * C, C, axis=x.ndim - 2)


def _mask(segments: jax.Array, i: jax.Array, j: jax.Array, C: int) -> jax.Array:
    """[B, 1, 1, C, C]: may query s of block i see key t of block j?"""
    seg_q = jax.lax.dynamic_slice_in_dim(segments, i * C, C, axis=1)
    seg_k = jax.lax.dynamic_slice_in_dim(segments, j * C, C, axis=1)
    pos = jnp.arange(C, dtype=jnp.int32)
    causal = (i * C + pos)[:, None] >= (j * C + pos)[None, :]
    return ((seg_q[:, :, None] == seg_k[:, None, :]) & causal[None])[:, None, None]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    s = jnp.einsum("BKGCH,BKSH->BKGCS", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask, s * scale, _MASKED)


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, scale):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    C, blocks = _blocks(T)
    Tp = C * blocks
    q = _to_heads(q_BTNH, K, Tp)
    k, v = _to_heads(k_BTKH, K, Tp)[:, :, 0], _to_heads(v_BTKH, K, Tp)[:, :, 0]
    segments = _pad(segment_ids_BT.astype(jnp.int32), 1, Tp, -1)
    first, _ = _segment_bounds(segments)
    lowest = jnp.min(first, axis=0)[::C] // C  # first key block that any row of query block i needs

    def query_block(_, i):
        qi = _rows(q, i, C)

        def key_block(j, carry):
            acc, top, total = carry
            s = _scores(qi, _rows(k, j, C), _mask(segments, i, j, C), scale)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1))
            p = jnp.exp(s - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            pv = jnp.einsum("BKGCS,BKSH->BKGCH", p.astype(v.dtype), _rows(v, j, C), preferred_element_type=jnp.float32)
            return acc * shrink[..., None] + pv, new_top, total * shrink + jnp.sum(p, axis=-1)

        rows = (B, K, N // K, C)
        start = (jnp.zeros((*rows, H), jnp.float32), jnp.full(rows, _MASKED), jnp.zeros(rows, jnp.float32))
        # A block that is masked throughout can come first for a row; its weight is wiped out by `shrink` = 0 at the row's
        # first real key, which always exists: a token sees itself.
        acc, top, total = jax.lax.fori_loop(lowest[i], i + 1, key_block, start)
        return None, ((acc / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, jnp.arange(blocks, dtype=jnp.int32))
    out = jnp.moveaxis(out, 0, 3).reshape(B, K, N // K, Tp, H)
    lse = jnp.moveaxis(lse, 0, 3).reshape(B, K, N // K, Tp)
    out, lse = checkpoint_name((out, lse), RESIDUALS)
    return _from_heads(out, T), (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out, lse)


def _backward(scale, saved, grad_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out, lse = saved
    B, T, _, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    C, blocks = _blocks(T)
    Tp = C * blocks
    q, grad = _to_heads(q_BTNH, K, Tp), _to_heads(grad_BTNH, K, Tp)
    k, v = _to_heads(k_BTKH, K, Tp)[:, :, 0], _to_heads(v_BTKH, K, Tp)[:, :, 0]
    segments = _pad(segment_ids_BT.astype(jnp.int32), 1, Tp, -1)
    _, last = _segment_bounds(segments)
    highest = jnp.max(last, axis=0)[C - 1 :: C] // C  # last query block that any row of key block j serves
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def key_block(dq, j):
        kj, vj = _rows(k, j, C), _rows(v, j, C)

        def query_block(i, carry):
            dq, dk, dv = carry
            qi, gi = _rows(q, i, C), _rows(grad, i, C)
            s = _scores(qi, kj, _mask(segments, i, j, C), scale)
            p = jnp.exp(s - _rows(lse[..., None], i, C))
            dv = dv + jnp.einsum("BKGCS,BKGCH->BKSH", p.astype(gi.dtype), gi, preferred_element_type=jnp.float32)
            dp = jnp.einsum("BKGCH,BKSH->BKGCS", gi, vj, preferred_element_type=jnp.float32)
            ds = (p * (dp - _rows(delta[..., None], i, C)) * scale).astype(qi.dtype)
            dk = dk + jnp.einsum("BKGCS,BKGCH->BKSH", ds, qi, preferred_element_type=jnp.float32)
            dqi = jnp.einsum("BKGCS,BKSH->BKGCH", ds, kj, preferred_element_type=jnp.float32)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, _rows(dq, i, C) + dqi, i * C, axis=3)
            return dq, dk, dv

        zero = jnp.zeros((B, K, C, H), jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(j, highest[j] + 1, query_block, (dq, zero, zero))
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks, dtype=jnp.int32))

    def back(x):  # [blocks, B, K, C, H] → [B, T, K, H]
        return jnp.moveaxis(x, 0, 2).reshape(B, K, Tp, H)[:, :, :T].transpose(0, 2, 1, 3)

    return (
        _from_heads(dq, T).astype(q_BTNH.dtype),
        back(dk).astype(k_BTKH.dtype),
        back(dv).astype(v_BTKH.dtype),
        None,
    )


blockwise_attention.defvjp(_forward, _backward)
