"""A loop over experts that takes each one's tokens through its whole feed-forward layer: for CPUs.

A block of tokens is gathered, passed through, and added to what its tokens have, all of it in the CPU's caches: no array holds
all choices at the model's width. The backward pass needs what the first half made, and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinker_jax.kernels.grouped_matmul.dispatch import Dispatch

_ONE_SIZE = ((256, 64), (64, 32), (16, 16), (1, 4))  # mean rows of an expert from which on a block has so many
_SIZES = (48, 96, 144, 192)  # of blocks, where experts have at least the first number on average

Hidden = Callable[[dict[str, Any], Any], Any]
"""(an expert's arrays, its tokens [C, ..]) → arrays [C, F], kept for the backward pass"""
Down = Callable[[dict[str, Any], Any, jax.Array], Any]
"""(an expert's arrays, what `Hidden` gave, weights of the choices [C, 1]) → arrays [C, ..]"""


def over_experts(
    hidden: Hidden,
    down: Down,
    trained: dict[str, Any],
    frozen: dict[str, Any],
    tokens: Any,
    weights_S: jax.Array,
    dispatch: Dispatch,
    *,
    one_size: bool,
    keep_as: str,
) -> Any:
    """Σ over the experts that a token chose of down(hidden(token)), summed in float32.

    Args:
        hidden: the first half of an expert.
        down: the second half.
        trained: arrays of all experts, [E, ..].
        frozen: the same, without a gradient.
        tokens: arrays [M, ..].
        weights_S: float32, of the choices in the order of `dispatch`.
        dispatch: who chose whom.
        one_size: blocks have one size, which follows from static shapes: what a token gets then depends bit for bit on nothing
            but itself. Otherwise an expert's blocks have the size that wastes least for its number of tokens.
        keep_as: name under which `jax.checkpoint` knows what it may keep.

    Returns:
        Arrays [M, ..] in the dtypes of `down`'s.
    """
    S, E = weights_S.size, dispatch.sizes_E.size
    if one_size or S < _SIZES[0] * E:
        sizes = (min(S, next((size for mean, size in _ONE_SIZE if S >= mean * E), 1)),)
    else:
        sizes = tuple(size for size in _SIZES if size <= S)
    return _over_experts((hidden, down, sizes, keep_as), trained, frozen, tokens, weights_S, dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_experts(how, trained, frozen, tokens, weights_S, dispatch):
    return _forward(how, trained, frozen, tokens, weights_S, dispatch)[0]


def _forward(how, trained, frozen, tokens, weights_S, dispatch):
    hidden, down, sizes, name = how
    arrays, S, M = {**frozen, **trained}, weights_S.size, jax.tree.leaves(tokens)[0].shape[0]

    def one(own, rows_C, w_C1):
        kept_C = hidden(own, _rows(tokens, rows_C))
        return kept_C, down(own, kept_C, w_C1)

    shapes = jax.eval_shape(one, _of_expert(arrays, 0), dispatch.rows_S[:1], weights_S[:1, None])
    kept_S, out_M = (_zeros(tree, n, dtype) for tree, n, dtype in zip(shapes, (S, M), (None, jnp.float32), strict=True))

    def block(e, at, own_C1, carry):
        kept_S, out_M = carry
        rows_C = _slice(dispatch.rows_S, at, own_C1)
        kept_C, out_C = one(_of_expert(arrays, e), rows_C, _slice(weights_S, at, own_C1)[:, None])
        return _put(kept_S, kept_C, at, own_C1), _add(out_M, out_C, rows_C, own_C1)

    kept_S, out_M = checkpoint_name(_each_block(dispatch.sizes_E, sizes, S, block, (kept_S, out_M)), name)
    out_M = jax.tree.map(lambda x, like: x.astype(like.dtype), out_M, shapes[1])
    return out_M, (trained, frozen, tokens, weights_S, dispatch, kept_S)


def _backward(how, saved, g_M):
    hidden, down, sizes, _ = how
    trained, frozen, tokens, weights_S, dispatch, kept_S = saved
    S, M = weights_S.size, jax.tree.leaves(tokens)[0].shape[0]

    def block(e, at, own_C1, carry):
        d_trained, d_tokens, dw_S = carry
        own, fixed, rows_C = _of_expert(trained, e), _of_expert(frozen, e), _slice(dispatch.rows_S, at, own_C1)
        kept_C, w_C1 = _slice(kept_S, at, own_C1), _slice(weights_S, at, own_C1)[:, None]
        g_C = jax.tree.map(lambda g: jnp.where(own_C1, g, 0), _rows(g_M, rows_C))
        _, pull = jax.vjp(lambda own, kept_C, w_C1: down({**fixed, **own}, kept_C, w_C1), own, kept_C, w_C1)
        d_down, d_kept_C, dw_C1 = pull(g_C)
        _, pull = jax.vjp(lambda own, x_C: hidden({**fixed, **own}, x_C), own, _rows(tokens, rows_C))
        d_hidden, d_tokens_C = pull(d_kept_C)
        d_trained = jax.tree.map(lambda all_E, a, b: all_E.at[e].add((a + b).astype(all_E.dtype)), d_trained, d_down, d_hidden)
        return d_trained, _add(d_tokens, d_tokens_C, rows_C, own_C1), _put(dw_S, dw_C1[:, 0], at, own_C1)

    start = jax.tree.map(jnp.zeros_like, trained), _zeros(tokens, M, jnp.float32), jnp.zeros_like(weights_S)
    d_trained, d_tokens, dw_S = _each_block(dispatch.sizes_E, sizes, S, block, start)
    return d_trained, None, jax.tree.map(lambda d, x: d.astype(x.dtype), d_tokens, tokens), dw_S, None


_over_experts.defvjp(_forward, _backward)


def _each_block(sizes_E: jax.Array, sizes: tuple[int, ...], S: int, block: Callable[..., Any], carry: Any) -> Any:
    """Calls block(expert, first row, which of its rows are the block's [C, 1], carry) for the rows of all groups, and returns
    the last carry. Blocks of one size come after one another, those of a size in the order of experts."""
    largest, E = sizes[-1], sizes_E.size
    count_E, ends_E = -(-sizes_E // largest), jnp.cumsum(sizes_E)
    last_E = jnp.cumsum(count_E)
    P = min(S, E + S // largest)
    number_P = jnp.arange(P, dtype=jnp.int32)
    e_P = jnp.minimum(jnp.searchsorted(last_E, number_P, side="right"), E - 1).astype(jnp.int32)
    several = len(sizes) > 1
    each_E = -(-sizes_E // jnp.maximum(count_E, 1)) if several else jnp.full_like(sizes_E, largest)
    start_P = (ends_E - sizes_E)[e_P] + (number_P - (last_E - count_E)[e_P]) * each_E[e_P]
    end_P = jnp.minimum(start_P + each_E[e_P], ends_E[e_P])
    kind_P = jnp.where(number_P < last_E[-1], jnp.searchsorted(jnp.asarray(sizes), end_P - start_P), len(sizes))
    if several:
        order_P = jnp.argsort(kind_P)
        kind_P, e_P, start_P, end_P = (x[order_P] for x in (kind_P, e_P, start_P, end_P))
    first = jnp.searchsorted(kind_P, jnp.arange(len(sizes) + 1))

    for kind, C in enumerate(sizes):

        def one(p, carry, C=C):
            at = jnp.minimum(start_P[p], S - C)
            row_C1 = at + jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)
            return block(e_P[p], at, (row_C1 >= start_P[p]) & (row_C1 < end_P[p]), carry)

        carry = jax.lax.fori_loop(first[kind], first[kind + 1], one, carry)
    return carry


def _of_expert(arrays: Any, e: jax.Array | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, e, keepdims=False), arrays)


def _rows(tree: Any, rows_C: jax.Array) -> Any:
    return jax.tree.map(lambda x: x.at[rows_C].get(mode="promise_in_bounds"), tree)


def _slice(tree: Any, at: jax.Array, own_C1: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, own_C1.shape[0]), tree)


def _put(tree: Any, block: Any, at: jax.Array, own_C1: jax.Array) -> Any:
    """Writes a block's own rows."""

    def put(x, new):
        own = own_C1.reshape(own_C1.shape[:1] + (1,) * (new.ndim - 1))
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(own, new, _slice(x, at, own_C1)), at, 0)

    return jax.tree.map(put, tree, block)


def _add(tree: Any, block: Any, rows_C: jax.Array, own_C1: jax.Array) -> Any:
    """Adds a block's own rows to their tokens."""
    return jax.tree.map(lambda x, y: x.at[rows_C].add(jnp.where(own_C1, y, 0), mode="promise_in_bounds"), tree, block)


def _zeros(tree: Any, rows: int, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), dtype or x.dtype), tree)
