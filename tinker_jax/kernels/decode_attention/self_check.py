"""Has a GPU's attention over pages agree with the plain formula, on the GPU itself, before a model uses it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.kernels.decode_attention.pages import PAGE, Pages, empty_pages, empty_rows, write_pages, write_rows
from tinker_jax.kernels.decode_attention.reference import reference_attend
from tinker_jax.kernels.heads import Heads

_MOST_ERROR = 0.05  # relative; bfloat16 stays below 0.01, a wrong key or mask is far above


@functools.cache
def fault(
    attend: Callable[..., jax.Array], heads: Heads, dtype: str, window: int | None = None, sinks: bool = False
) -> str | None:
    """Why `attend` must not decode on this process's first device; None: it agrees with the plain formula.

    Args:
        attend: as `PagedAttention.attend`, over pages that `write_rows` fills.
        heads: values as wide as keys.
        dtype: of queries, keys and values.
        window: of the check.
        sinks: check with attention sinks.
    """
    N, K, H, R, W = heads.N, heads.K, heads.H, 4, 7
    rng, last = np.random.default_rng(0), np.array([[0], [PAGE - 1], [PAGE + 5], [W * PAGE - 1]], np.int32)
    q, k, v = (jnp.asarray(rng.standard_normal((R, T, n, H)), dtype) for T, n in ((1, N), (W * PAGE, K), (W * PAGE, K)))
    tables = jnp.asarray(1 + rng.permutation(2 * R * W)[: R * W].reshape(R, W), jnp.int32)
    everywhere = jnp.broadcast_to(jnp.arange(W * PAGE, dtype=jnp.int32)[None], (R, W * PAGE))
    logits = jnp.asarray(rng.standard_normal(N), jnp.float32) if sinks else None

    def run(write: Callable[..., Pages], attend: Callable[..., jax.Array], pool: Pages) -> np.ndarray:
        pool, program = write(pool, k, v, tables, everywhere), functools.partial(attend, scale=H**-0.5, window=window)
        return np.asarray(jax.jit(program)(pool, q, tables, last, logits), np.float32)

    size = 2 * R * W + 1, heads, jnp.dtype(dtype)
    try:
        ours = run(write_rows, attend, empty_rows(*size))
    except jax.errors.JaxRuntimeError as error:  # a compiler refuses what JAX lets through
        return str(error).splitlines()[0]
    formula = run(write_pages, reference_attend, empty_pages(*size))
    error = float(np.linalg.norm(ours - formula) / np.linalg.norm(formula))
    return None if error < _MOST_ERROR else f"it differs from the plain formula by {error:.3g} of its norm"
