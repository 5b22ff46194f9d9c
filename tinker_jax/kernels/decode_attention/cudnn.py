"""cuDNN's paged attention for NVIDIA GPUs, one query a row; prefills and windows go through plain XLA.

JAX's private function reads pages where they lie, but wants as many of them as tables have entries; the one below it does not.
This file is the only one that touches it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.kernels.cudnn import private
from tinker_jax.kernels.decode_attention.pages import PAGE, Pages, empty_pages, finite, places, write_pages
from tinker_jax.kernels.decode_attention.reference import reference_attend
from tinker_jax.kernels.decode_attention.xla import xla_attend

_PARAMETERS = (
    *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "page_table_k", "page_table_v"),
    *("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length", "cudnn_version"),
    "return_residual",
)
_NEWER = {"score_mod_args": (), "score_mod": None}  # parameters since jax 0.12.0.1
_MOST_ERROR = 0.05  # relative; bfloat16 stays below 0.01, a wrong key or mask is far above


def check(heads: tuple[int, int, int], dtype: Any, *, sinks: bool, on_this_device: bool) -> None:
    """Looks at whether cuDNN can do the case, and on a GPU that is there whether it is right.

    Args:
        heads: N, K and H of the model.
        dtype: of queries, keys and values.
        sinks: will `attend` be given attention sinks?
        on_this_device: programs will run on this process's first device.

    Raises:
        NotImplementedError: it cannot, or is not; the text says why.
    """
    name, H = jnp.dtype(dtype).name, heads[2]
    if name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 and float16, not {name}")
    if H > 256 or H % 8:
        raise NotImplementedError(f"cuDNN attention takes head widths up to 256 that 8 divides, not {H}")
    if sinks:
        raise NotImplementedError("cuDNN attention has no attention sinks")
    _private()
    if on_this_device and (fault := _fault(heads, name)):
        raise NotImplementedError(f"cuDNN failed its self-check: {fault}")


def empty_rows(pages: int, K: int, H: int, dtype: jnp.dtype) -> Pages:
    """Zeroed pool whose keys lie as values do, [P, K, PAGE, H]."""
    return Pages(*(jnp.zeros((pages, K, PAGE, H), dtype) for _ in range(2)))


def write_rows(pages: Pages, k_RTKH: jax.Array, v_RTKH: jax.Array, tables_RW: jax.Array, positions_RT: jax.Array) -> Pages:
    """See `PagedAttention.write`."""
    page_RT, place_RT = places(tables_RW, positions_RT)
    return Pages(*(x.at[page_RT, :, place_RT].set(finite(new)) for x, new in zip(pages, (k_RTKH, v_RTKH), strict=True)))


def cudnn_attend(
    pages: Pages,
    q_RTNH: jax.Array,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    sinks_N: jax.Array | None,
    *,
    scale: float,
    window: int | None,
) -> jax.Array:
    """See `PagedAttention.attend`."""
    R, T, N, H = q_RTNH.shape
    if T > 1 or window is not None:
        return xla_attend(pages, q_RTNH, tables_RW, positions_RT, sinks_N, scale=scale, window=window, keys_as_rows=True)
    K = pages.k.shape[1]
    # Query heads of a key head go as queries of one head: all of them see the same keys, which are then read once.
    q_RKGH = q_RTNH.reshape(R, K, N // K, H)
    lengths_R = jnp.maximum(positions_RT[:, 0] + 1, 1)
    out_RKGH = _paged(q_RKGH, *pages, jnp.full_like(lengths_R, N // K), lengths_R, tables_RW, scale)
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


@functools.cache
def _fault(heads: tuple[int, int, int], dtype: str) -> str | None:
    """Why paged attention must not be used on this process's first device; None: it agrees with the plain formula."""
    (N, K, H), R, W = heads, 4, 3
    rng, last = np.random.default_rng(0), np.array([[0], [PAGE - 1], [PAGE + 5], [W * PAGE - 1]], np.int32)
    q, k, v = (jnp.asarray(rng.standard_normal((R, T, n, H)), dtype) for T, n in ((1, N), (W * PAGE, K), (W * PAGE, K)))
    tables = jnp.asarray(1 + rng.permutation(2 * R * W)[: R * W].reshape(R, W), jnp.int32)
    everywhere = jnp.broadcast_to(jnp.arange(W * PAGE, dtype=jnp.int32)[None], (R, W * PAGE))

    def run(write: Callable[..., Pages], attend: Callable[..., jax.Array], pool: Pages) -> np.ndarray:
        pool = write(pool, k, v, tables, everywhere)
        return np.asarray(
            jax.jit(functools.partial(attend, scale=H**-0.5, window=None))(pool, q, tables, last, None), np.float32
        )

    size = 2 * R * W + 1, K, H, jnp.dtype(dtype)
    try:
        ours = run(write_rows, cudnn_attend, empty_rows(*size))
    except jax.errors.JaxRuntimeError as error:  # cuDNN refuses what JAX lets through
        return str(error).splitlines()[0]
    formula = run(write_pages, reference_attend, empty_pages(*size))
    error = float(np.linalg.norm(ours - formula) / np.linalg.norm(formula))
    return None if error < _MOST_ERROR else f"it differs from the plain formula by {error:.3g} of its norm"
