"""cuDNN's paged attention for NVIDIA GPUs, one query a row; prefills and windows go another way.

JAX's private function reads pages where they lie, but wants as many of them as tables have entries; the one below it does not.
This file is the only one that touches it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tinker_jax.kernels.cudnn import private
from tinker_jax.kernels.decode_attention import self_check
from tinker_jax.kernels.decode_attention.pages import Pages
from tinker_jax.kernels.decode_attention.xla import rows_attend
from tinker_jax.kernels.heads import Heads

_PARAMETERS = (
    *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v"),
    *("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length", "cudnn_version"),
    "return_residual",
)
_NEWER = {"score_mod_args": (), "score_mod": None}  # parameters since jax 0.12.0.1


def check(heads: Heads, dtype: Any, *, sinks: bool, on_this_device: bool) -> None:
    """Looks at whether cuDNN can do the case, and on a GPU that is there whether it is right.

    Args:
        heads: of one device.
        dtype: of queries, keys and values.
        sinks: will `attend` be given attention sinks?
        on_this_device: programs will run on this process's first device.

    Raises:
        NotImplementedError: it cannot, or is not; the text says why.
    """
    name, H = jnp.dtype(dtype).name, heads.H
    if name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 and float16, not {name}")
    if H > 256 or H % 8:
        raise NotImplementedError(f"cuDNN attention takes head widths up to 256 that 8 divides, not {H}")
    if sinks:
        raise NotImplementedError("cuDNN attention has no attention sinks")
    _private()
    if on_this_device and (fault := self_check.fault(cudnn_attend, heads, name)):
        raise NotImplementedError(f"cuDNN failed its self-check: {fault}")


def cudnn_attend(
    pages: Pages,
    q_RTNH: jax.Array,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    otherwise: Callable[..., jax.Array] = rows_attend,
) -> jax.Array:
    """See `PagedAttention.attend`. `otherwise` takes prefills and windows, from the same pool."""
    R, T, N, H = q_RTNH.shape
    if T > 1 or window is not None:
        return otherwise(pages, q_RTNH, tables_RW, positions_RT, sinks_N, scale=scale, window=window)
    (k_PKSH, v_PKSH), K = jax.tree.leaves(pages), pages.k.shape[1]
    # Query heads of a key head go as queries of one head: all of them see the same keys, which are then read once.
    q_RKGH = q_RTNH.reshape(R, K, N // K, H)
    lengths_R = jnp.maximum(positions_RT[:, 0] + 1, 1)
    out_RKGH = _paged(q_RKGH, k_PKSH, v_PKSH, jnp.full_like(lengths_R, N // K), lengths_R, tables_RW, scale)
    return jnp.where(positions_RT[..., None, None] < 0, 0, out_RKGH.reshape(R, T, N, H))


def _paged(
    q_RNTH: jax.Array,
    k_PNSH: jax.Array,
    v_PNSH: jax.Array,
    queries_R: jax.Array,
    keys_R: jax.Array,
    tables_RW: jax.Array,
    scale: float,
) -> jax.Array:
    """cuDNN's operation: the first `queries_R` queries of each row see its first `keys_R` keys. [R, N, T, H]."""
    module, none, tables_R1W1 = _private(), jnp.zeros(0, q_RNTH.dtype), tables_RW[:, None, :, None]
    arrays = q_RNTH, k_PNSH, v_PNSH, none, queries_R, keys_R, none, none, tables_R1W1, tables_R1W1
    seed, dropout, bias, layout = 0, 0.0, (False, False), module.AttentionLayout.BNTH.value
    options = scale, seed, dropout, bias, module.MaskType.PADDING, layout, None, module.check_cudnn_version(), False
    given = dict(zip(_PARAMETERS, (*arrays, *options), strict=True))
    known = inspect.signature(module._dot_product_attention).parameters
    out = module._dot_product_attention(**given, **{name: value for name, value in _NEWER.items() if name in known})
    return out[0] if isinstance(out, (tuple, list)) else out


def _private() -> Any:
    return private("_dot_product_attention", _PARAMETERS, 90500, optional=_NEWER)
