"""Causal grouped-query attention over packed rows: one signature, several implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tinker_jax import sharding
from tinker_jax.kernels.attention.blockwise import blockwise_attention
from tinker_jax.kernels.attention.cudnn import MAX_SEGMENTS, cudnn_attention
from tinker_jax.kernels.attention.reference import reference_attention

logger = logging.getLogger("tinker_jax")

Implementation = Literal["splash", "cudnn", "blockwise", "reference"]

#: What is tried on a platform, best first. The last one takes every case.
PREFERENCE: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("splash", "blockwise"),
    "gpu": ("cudnn", "blockwise"),
    "cpu": ("blockwise",),
}


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKV: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    implementation: Implementation | None = None,
    mesh: Mesh | None = None,
    most_segments: int = MAX_SEGMENTS,
) -> jax.Array:
    """softmax(scale · q kᵀ) v, where a token sees itself and what came before it in its own segment.

    Args:
        q_BTNH: queries.
        k_BTKH: keys; N is a multiple of K, and query head n reads key head n // (N / K).
        v_BTKV: values, of any width.
        segment_ids_BT: int32, not negative. Tokens of one sequence share an id and are contiguous; neighbouring sequences
            differ in it. Padding is a sequence like any other.
        scale: factor of the scores, usually H ** -0.5.
        window: a token at position p sees positions p - window + 1 to p alone (itself and the `window - 1` tokens before
            it), as in Hugging Face's `sliding_window`; None: everything before it.
        sinks_N: one logit a query head, which takes its share of the softmax and has no value (gpt-oss). It is not
            multiplied by `scale`.
        implementation: None takes the first of `PREFERENCE` for the platform that can do the case, and logs once why another
            was passed over.
            `"reference"` is the plain formula.
            `"blockwise"` never holds a T × T array and skips blocks that no segment touches.
            `"splash"` is Pallas' kernel for TPUs; interpreted, slowly, on CPU.
            `"cudnn"` is NVIDIA's, for Hopper or newer; a row of more than `most_segments` becomes NaN.
        mesh: where the arrays live, for programs of several devices and for devices that are not JAX's default. Rows are cut
            over `data` and `fsdp`, heads over `tensor`, where they divide.
        most_segments: of a row, padding counted as one, at most `MAX_SEGMENTS`. What `"cudnn"` costs beside its products grows
            with it; the others do not mind.

    Returns:
        [B, T, N, V] in q's dtype; scores and softmax are computed in float32.

    Raises:
        NotImplementedError: the named implementation cannot do the case; the text says why.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    *others, last = PREFERENCE[platform] if implementation is None else (implementation,)
    arrays = (q_BTNH, k_BTKH, v_BTKV, segment_ids_BT, sinks_N)
    for name in others:
        try:
            return _run(name, platform, mesh, arrays, scale, window, most_segments)
        except NotImplementedError as reason:
            _log_fallback(name, str(reason))
    return _run(last, platform, mesh, arrays, scale, window, most_segments)


@functools.cache  # once for each reason
def _log_fallback(name: str, reason: str) -> None:
    logger.warning("attention: %s is not used: %s", name, reason)


def _run(
    name: Implementation, platform: str, mesh: Mesh | None, arrays, scale: float, window: int | None, most_segments: int
) -> jax.Array:
    run = functools.partial(_backend(name, platform, most_segments), scale=scale, window=window)
    if name != "reference" and mesh is not None and mesh.size > 1:
        run = _on_each_device(run, mesh, arrays)
    return run(*arrays)


def _backend(name: Implementation, platform: str, most_segments: int) -> Callable[..., jax.Array]:
    if name == "splash":
        if platform not in ("tpu", "cpu"):
            raise NotImplementedError(f"splash attention runs on TPUs, not on {platform!r}")
        from tinker_jax.kernels.attention.splash import splash_attention  # Pallas is slow to import

        return functools.partial(splash_attention, interpret=platform == "cpu")
    if name == "cudnn":
        if platform != "gpu":
            raise NotImplementedError(f"cuDNN attention runs on NVIDIA GPUs, not on {platform!r}")
        return functools.partial(cudnn_attention, most_segments=most_segments)
    if name == "blockwise":
        return functools.partial(blockwise_attention, rows_at_once=1 if platform == "cpu" else None)
    return reference_attention


def _on_each_device(run: Callable[..., jax.Array], mesh: Mesh, arrays) -> Callable[..., jax.Array]:
    """Every device works on its own rows and heads: GSPMD cannot cut a custom call, nor a loop over rows."""
    _, k_BTKH, *_ = arrays
    rows = sharding.RULES["rows"] if k_BTKH.shape[0] % sharding.parts(mesh, "rows") == 0 else None
    heads = sharding.RULES["kv_heads"] if k_BTKH.shape[2] % sharding.parts(mesh, "kv_heads") == 0 else None
    cut = P(rows, None, heads, None)
    in_specs = (cut, cut, cut, P(rows, None), P(heads))
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=cut, check_vma=False)
