"""Products of rows with the weight of their group: one signature, several implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from tinker_jax.kernels.grouped_matmul import blocks, xla
from tinker_jax.kernels.grouped_matmul.reference import reference_grouped_matmul

logger = logging.getLogger("tinker_jax")

Implementation = Literal["mosaic", "blocks", "xla", "reference"]

#: What is tried on a platform, best first. The last one takes every case. `"mosaic"` is not among them: on an H200
#: with jax 0.11.2 it agreed with the formula at some sizes, and hung or faulted at others.
PREFERENCE: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("xla",),
    "gpu": ("blocks",),
    "cpu": ("blocks",),
}


def grouped_matmul(
    x_SD: jax.Array,
    w: jax.Array,
    sizes_E: jax.Array,
    *,
    transposed: bool,
    frozen: bool,
    mesh: Mesh | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y[s] = x[s] w[e] for the rows s of group e, or x[s] w[e]ᵀ.

    Args:
        x_SD: rows sorted by group: the first `sizes_E[0]` belong to group 0, and so on. float32 or bfloat16.
        w: one weight a group, in x's dtype: [E, N, D] when transposed, as base weights lie, else [E, D, N], as the factors of
            LoRA do.
        sizes_E: int32, rows of each group; their sum is at most S.
        transposed: how w lies.
        frozen: w gets no gradient, and none is computed.
        mesh: whose platform and card choose the implementation; None: JAX's default device. On a mesh of several devices
            the call stands inside `shard_map`.
        implementation: None takes the first of `PREFERENCE` for the platform that can do the case, and logs once why another
            was passed over.
            `"reference"` is the plain formula.
            `"blocks"` is a batched product over blocks of rows, a few experts at a time: for GPUs.
            `"mosaic"` is JAX's Pallas kernel for Hopper; on a GPU that is there it first has to agree with the plain formula.
            `"xla"` is `jax.lax.ragged_dot`: for TPUs.

    Returns:
        [S, N] in x's dtype, sums in float32. Rows behind the last group are zero and get no gradient.

    Raises:
        ValueError: dtypes or shapes do not fit.
        NotImplementedError: the named implementation cannot do the case; the text says why.
    """
    inner = w.shape[2 if transposed else 1]
    if x_SD.dtype != w.dtype:
        raise ValueError(f"grouped_matmul: x is {x_SD.dtype.name} and w is {w.dtype.name}; cast one to the dtype of the other")
    if x_SD.shape[1] != inner or sizes_E.shape != w.shape[:1]:
        raise ValueError(
            f"grouped_matmul: x {x_SD.shape}, w {w.shape} and sizes {sizes_E.shape} do not fit together with {transposed=}"
        )
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    N = w.shape[1 if transposed else 2]
    *others, last = PREFERENCE[device.platform] if implementation is None else (implementation,)
    for name in others:
        try:
            run = _backend(name, device, inner, N, x_SD.dtype)
            break
        except NotImplementedError as reason:
            _log_fallback(name, str(reason))
    else:
        run = _backend(last, device, inner, N, x_SD.dtype)
    return _product(run, transposed, frozen, x_SD, w, sizes_E)


def goes_over_experts(mesh: Mesh | None) -> bool:
    """Do the mesh's devices (None: JAX's default device) take one expert after the other, with `over_experts`?"""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform == "cpu"


@functools.cache  # once for each reason
def _log_fallback(name: str, reason: str) -> None:
    logger.warning("grouped matmul: %s is not used: %s", name, reason)


class Backend(NamedTuple):
    """An implementation: pure functions, `transposed` by keyword."""

    product: Callable[..., jax.Array]
    """(x, w, sizes) → y"""
    weight_gradient: Callable[..., jax.Array]
    """(x, gradient of y, sizes) → gradient of w, float32"""


def _backend(name: Implementation, device: Any, D: int, N: int, dtype: Any) -> Backend:
    if name == "mosaic":
        if device.platform != "gpu":
            raise NotImplementedError(f"the Mosaic kernel runs on NVIDIA GPUs, not on {device.platform!r}")
        from tinker_jax.kernels.grouped_matmul import mosaic  # Pallas is slow to import

        here = device in jax.devices()
        mosaic.check(D, N, dtype, getattr(device, "compute_capability", None), on_this_device=here)
        return Backend(mosaic.product, mosaic.weight_gradient)
    if name == "reference":
        return Backend(reference_grouped_matmul, xla.weight_gradient)
    module = {"blocks": blocks, "xla": xla}[name]
    return Backend(module.product, module.weight_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(run: Backend, transposed: bool, frozen: bool, x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return run.product(x_SD, w, sizes_E, transposed=transposed)


def _forward(run: Backend, transposed: bool, frozen: bool, x_SD: jax.Array, w: jax.Array, sizes_E: jax.Array):
    return _product(run, transposed, frozen, x_SD, w, sizes_E), (None if frozen else x_SD, w, sizes_E)


def _backward(run: Backend, transposed: bool, frozen: bool, saved, g_SN: jax.Array):
    x_SD, w, sizes_E = saved
    dw = None if frozen else run.weight_gradient(x_SD, g_SN, sizes_E, transposed=transposed).astype(w.dtype)
    return run.product(g_SN, w, sizes_E, transposed=not transposed), dw, None


_product.defvjp(_forward, _backward)
