"""The attention of an engine: the best its mesh offers, after a look at whether that is right on the device itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax.kernels.attention.api import Implementation, attention
from tinker_jax.kernels.heads import Heads

logger = logging.getLogger("tinker_jax")

_MOST_ERROR = 0.05  # relative; bfloat16 stays below 0.01, a wrong key or mask is far above


def attention_on(
    mesh: Mesh, heads: Heads, dtype: jnp.dtype, *, sinks: bool = False, windows: bool = False
) -> Callable[..., jax.Array]:
    """`attention` for programs of a mesh.

    cuDNN's packed attention stands on a private function of JAX and has been wrong in released versions, so on a GPU that is
    there it first has to agree with the plain formula on small cases; if not, a warning says so and blockwise takes over.

    Args:
        mesh: devices, there or only compiled for.
        heads: of the model.
        dtype: of queries, keys and values.
        sinks: will it be given attention sinks?
        windows: will it be given windows, in some layers or in all?
    """
    implementation: Implementation | None = None
    if mesh.devices.flat[0].platform == "gpu" and mesh.devices.flat[0] in jax.devices():
        fault = cudnn_fault(heads, jnp.dtype(dtype).name, sinks=sinks, windows=windows)
        if fault:
            logger.warning("attention: cuDNN failed its self-check, blockwise attention is used instead: %s", fault)
            implementation = "blockwise"
    return functools.partial(attention, mesh=mesh, implementation=implementation)


@functools.cache
def cudnn_fault(heads: Heads, dtype: str, *, sinks: bool = False, windows: bool = False) -> str | None:
    """Why cuDNN's packed attention must not be used on this process's first device; None: it agrees, or refuses the case.

    Args:
        heads: as for `attention_on`; the rest, too.
        dtype: by name.
        sinks: check with attention sinks.
        windows: check with a window, and without.
    """
    faults = (_fault(heads, dtype, sinks, window) for window in ((None, 50) if windows else (None,)))
    return next((fault for fault in faults if fault), None)


def _fault(heads: Heads, dtype: str, sinks: bool, window: int | None) -> str | None:
    (N, K, H, V), B, T = (heads.N, heads.K, heads.H, heads.V), 2, 192
    rng = np.random.default_rng(0)
    shapes = (N, H), (K, H), (K, V), (N, V)
    q, k, v, g = (jnp.asarray(rng.standard_normal((B, T, *shape)), dtype) for shape in shapes)
    sinks_N = jnp.linspace(-2, 3, N) if sinks else None
    segment_ids_BT = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], [70, 1, 90, 31]), np.repeat([1, 2], [128, 64])]), jnp.int32)

    def run(implementation: Implementation) -> list[np.ndarray]:
        def f(q, k, v, sinks_N):
            attend = functools.partial(attention, scale=H**-0.5, window=window, implementation=implementation)
            return attend(q, k, v, segment_ids_BT, sinks_N=sinks_N)

        out, vjp = jax.vjp(f, q, k, v, sinks_N)
        return [np.asarray(x, np.float32) for x in (out, *vjp(g)) if x is not None]

    try:
        ours = run("cudnn")
    except NotImplementedError:
        return None  # the dispatcher says so where it matters
    except jax.errors.JaxRuntimeError as error:  # cuDNN refuses what JAX lets through
        return str(error).splitlines()[0]
    names = ("output", "dq", "dk", "dv", "dsinks")
    for name, x, y in zip(names, ours, run("reference"), strict=False):
        error = float(np.linalg.norm(x - y) / np.linalg.norm(y))
        if not error < _MOST_ERROR:
            return f"{name} differs from the plain formula by {error:.3g} of its norm"
    return None
