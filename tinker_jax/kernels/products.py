"""The product of tokens with a weight that lies [out, in]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_FEW_ROWS = 64
_PARTS = 8


def times_transposed(x_MD: jax.Array, w_ND: jax.Array, dtype: Any = None) -> jax.Array:
    """x wᵀ, [M, N].

    For few rows a CPU computes w xᵀ and transposes the small result: XLA reads the weight where it lies, where the plain form
    packs it first. From 2 to 32 rows that is 1.4 to 2 times as fast. For one row the weight is taken as eight, whose products
    with x are a batch: a tenth faster (docs/performance.md).

    Args:
        x_MD: tokens.
        w_ND: weight.
        dtype: in which products are summed and returned; None: that of x.
    """

    def plain(x_MD, w_ND):
        return jax.lax.dot_general(x_MD, w_ND, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def transposed(x_MD, w_ND):
        y_NM = jax.lax.dot_general(w_ND, x_MD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
        return jax.lax.optimization_barrier(y_NM).T  # without the barrier XLA makes the plain form of it

    def in_parts(x_MD, w_ND):
        w_PND, x_PD = w_ND.reshape(_PARTS, -1, w_ND.shape[1]), jnp.broadcast_to(x_MD, (_PARTS, x_MD.shape[1]))
        y_PN = jax.lax.dot_general(w_PND, x_PD, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
        return y_PN.reshape(1, -1)

    if x_MD.shape[0] == 1 and w_ND.shape[0] % _PARTS == 0:
        return jax.lax.platform_dependent(x_MD, w_ND, cpu=in_parts, default=plain)
    if 1 < x_MD.shape[0] <= _FEW_ROWS:
        return jax.lax.platform_dependent(x_MD, w_ND, cpu=transposed, default=plain)
    return plain(x_MD, w_ND)
