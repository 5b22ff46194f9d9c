"""Attention over keys and values kept in pages: one interface, several implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tinker_jax import sharding
from tinker_jax.kernels.decode_attention import cudnn
from tinker_jax.kernels.decode_attention.pages import empty_pages, empty_rows, write_pages, write_rows
from tinker_jax.kernels.decode_attention.reference import reference_attend
from tinker_jax.kernels.decode_attention.worklist import worklist_attend
from tinker_jax.kernels.decode_attention.xla import rows_attend, xla_attend
from tinker_jax.kernels.heads import Heads

logger = logging.getLogger("tinker_jax")

Implementation = Literal["ragged", "cudnn", "mosaic", "worklist", "xla", "reference"]

#: What is tried on a platform, best first. The last one takes every case.
PREFERENCE: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("ragged", "xla"),
    "gpu": ("cudnn", "mosaic", "xla"),
    "cpu": ("worklist",),
}


@dataclass(frozen=True)
class Backend:
    """An implementation as one device runs it: pure functions with the arguments of the methods of `PagedAttention`."""

    empty: Callable[[int], Any]
    """pages → zeroed pool, of all key heads of the model"""
    write: Callable[..., Any]
    attend: Callable[..., jax.Array]
    """sinks_N is its fifth positional argument."""
    heads_axis: int
    """Axis of every array of the pool that holds the key heads."""
    most_entries: int | None = None
    """Of the tables of one call on one device; None: any number."""


@dataclass(frozen=True)
class PagedAttention:
    """Attention over pages for programs of one mesh.

    A pool holds keys and values in pages of `PAGE` tokens: a pytree whose arrays have the page as their first
    axis and are otherwise the implementation's own business. A row's table names its pages in the order of their positions.
    Page 0 belongs to no row: padding is written there, and what it holds is never seen.

    On a mesh of several devices rows are cut over `data` and `fsdp`, and heads over `tensor` as `Heads.of_device` says. Every
    part of the rows has a pool of its own, and tables name pages of the part that owns the row.

    Get one from `paged_attention_on`.
    """

    mesh: Mesh
    backend: Backend
    heads: Heads

    def empty(self, pages: int) -> Any:
        """Zeroed pool.

        Args:
            pages: of each part of the rows, page 0 among them; arrays hold `pages · parts(mesh, "rows")` of them.
        """
        where = sharding.named(self.mesh, ("rows", *[None] * (self.backend.heads_axis - 1), self._cut()[1]))
        count = pages * sharding.parts(self.mesh, "rows")
        return jax.jit(lambda: self.backend.empty(count), out_shardings=where)()

    def pages(self, pool: Any) -> int:
        """Pages of a pool, of each part of the rows."""
        return jax.tree.leaves(pool)[0].shape[0] // sharding.parts(self.mesh, "rows")

    def write(
        self, pages: Any, k_RTKH: jax.Array, v_RTKV: jax.Array | None, tables_RW: jax.Array, positions_RT: jax.Array
    ) -> Any:
        """The pool with the keys and values of new tokens in it; updated in place where it is donated.

        Args:
            pages: pool.
            k_RTKH: keys of T tokens of each row, in the pool's dtype; the latents where heads are latent.
            v_RTKV: values; None where heads are latent.
            tables_RW: int32, the pages of each row; what stands beyond its last position is not looked at.
            positions_RT: int32 position of each token in its row. A row's tokens stand first, at consecutive positions; padding
                follows and is negative.
        """
        rows = P(sharding.RULES["rows"])
        new = self._spec(2, self._cut()[1])
        write = self._on_each_device(self.backend.write, (self._pool_spec(), new, new, rows, rows), self._pool_spec())
        return write(pages, k_RTKH, v_RTKV, tables_RW, positions_RT)

    def attend(
        self,
        pages: Any,
        q_RTNH: jax.Array,
        tables_RW: jax.Array,
        positions_RT: jax.Array,
        *,
        scale: float,
        window: int | None = None,
        sinks_N: jax.Array | None = None,
    ) -> jax.Array:
        """softmax(scale · q kᵀ) v, where a query at position p sees its row's keys at positions up to p, its own among them.

        Args:
            pages: pool into which the tokens of the queries are already written.
            q_RTNH: queries; query head n reads key head n // (N / K).
            tables_RW: as in `write`.
            positions_RT: as in `write`.
            scale: factor of the scores, usually H ** -0.5.
            window: a query at position p sees positions p - window + 1 to p alone; None: everything before it.
            sinks_N: one logit a query head, which takes its share of the softmax and has no value (gpt-oss). It is not
                multiplied by `scale`.

        Returns:
            [R, T, N, V] in q's dtype, zero for padding; scores and softmax are computed in float32.

        Raises:
            NotImplementedError: an implementation that was asked for by name cannot do the case; the text says why.
        """
        attend = functools.partial(self.backend.attend, scale=scale, window=window)
        rows, heads = P(sharding.RULES["rows"]), self._cut()[0]
        cut = self._spec(2, heads)
        sinks = P(sharding.RULES[heads] if heads else None)
        attend = self._on_each_device(attend, (self._pool_spec(), cut, rows, rows, sinks), cut)
        return attend(pages, q_RTNH, tables_RW, positions_RT, sinks_N)

    def _cut(self) -> tuple[str | None, str | None]:
        """Logical axes of the query heads and of the key heads, where the mesh cuts them."""
        own = self.heads.of_device(sharding.parts(self.mesh, "heads"))
        return "heads" if own.N < self.heads.N else None, "kv_heads" if own.K < self.heads.K else None

    def _spec(self, axis: int, heads: str | None) -> P:
        """Of an array whose first axis are rows, or their pages, and another one heads."""
        return P(sharding.RULES["rows"], *[None] * (axis - 1), sharding.RULES[heads] if heads else None)

    def _pool_spec(self) -> P:
        return self._spec(self.backend.heads_axis, self._cut()[1])

    def _on_each_device(self, run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Tables name pages of a device's own part of the pool, which GSPMD cannot know."""
        if self.mesh.size == 1:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def paged_attention_on(
    mesh: Mesh,
    heads: Heads,
    dtype: jnp.dtype,
    implementation: Implementation | None = None,
    *,
    sinks: bool = False,
    windows: bool = False,
) -> PagedAttention:
    """Attention over pages for programs of a mesh.

    Args:
        mesh: devices, there or only compiled for.
        heads: of the model.
        dtype: of queries, keys and values.
        implementation: None takes the first of `PREFERENCE` for the platform that can do the case, and logs once why another
            was passed over.
            `"reference"` is the plain formula.
            `"xla"` loops over blocks of positions as far as the longest row reaches.
            `"worklist"` loops over the pages that rows see, a few at a time: for CPUs.
            `"ragged"` is the Pallas kernel that ships with JAX, for TPUs.
            `"cudnn"` is NVIDIA's, for decoding; on a GPU that is there it first has to agree with the plain formula.
            `"mosaic"` is a Pallas kernel of ours for decoding on NVIDIA GPUs, with windows and sinks; it has to agree, too.
        sinks: will `attend` be given attention sinks?
        windows: will it be given windows, in some layers or in all? cuDNN, which has none, leaves those layers to `"mosaic"`.

    Raises:
        NotImplementedError: the named implementation cannot do the case; the text says why.
    """
    platform = mesh.devices.flat[0].platform
    *others, last = PREFERENCE[platform] if implementation is None else (implementation,)
    for name in others:
        try:
            return PagedAttention(mesh, _backend(name, mesh, heads, dtype, sinks=sinks, windows=windows), heads)
        except NotImplementedError as reason:
            _log_fallback(name, str(reason))
    return PagedAttention(mesh, _backend(last, mesh, heads, dtype, sinks=sinks, windows=windows), heads)


@functools.cache  # once for each reason
def _log_fallback(name: str, reason: str) -> None:
    logger.warning("attention over pages: %s is not used: %s", name, reason)


def _backend(name: Implementation, mesh: Mesh, heads: Heads, dtype: jnp.dtype, *, sinks: bool, windows: bool) -> Backend:
    device, own = mesh.devices.flat[0], heads.of_device(sharding.parts(mesh, "heads"))
    if name in ("ragged", "cudnn", "mosaic") and (heads.latent or heads.V != heads.H):
        what = "latents" if heads.latent else f"keys of {heads.H} and values of {heads.V} numbers"
        raise NotImplementedError(f"{name} attention over pages does not take {what}")
    if name == "ragged":
        if device.platform != "tpu":
            raise NotImplementedError(f"ragged paged attention runs on TPUs, not on {device.platform!r}")
        if sinks:
            raise NotImplementedError("ragged paged attention has no attention sinks")
        from tinker_jax.kernels.decode_attention import ragged  # Pallas is slow to import

        ragged.check_heads(own, dtype)
        empty = functools.partial(ragged.empty_combined, heads=heads, dtype=dtype)
        return Backend(empty, ragged.write_combined, ragged.ragged_attend, heads_axis=2, most_entries=ragged.MOST_ENTRIES)
    if name in ("cudnn", "mosaic"):
        if device.platform != "gpu":
            raise NotImplementedError(f"{name} attention runs on NVIDIA GPUs, not on {device.platform!r}")
        here = device in jax.devices()
        if name == "cudnn":
            cudnn.check(own, dtype, sinks=sinks, on_this_device=here)
            attend = cudnn.cudnn_attend
            if windows:
                attend = functools.partial(attend, otherwise=_windowed(mesh, heads, dtype))
        else:
            from tinker_jax.kernels.decode_attention import mosaic  # Pallas is slow to import

            mosaic.check(own, dtype, getattr(device, "compute_capability", None), on_this_device=here)
            attend = mosaic.mosaic_attend
        return Backend(functools.partial(empty_rows, heads=heads, dtype=dtype), write_rows, attend, heads_axis=1)
    attend = {"worklist": worklist_attend, "xla": xla_attend, "reference": reference_attend}[name]
    if heads.latent:
        attend = functools.partial(attend, values=heads.V)
    return Backend(functools.partial(empty_pages, heads=heads, dtype=dtype), write_pages, attend, heads_axis=1)


def _windowed(mesh: Mesh, heads: Heads, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """What takes the layers with windows, which cuDNN has not, from cuDNN's pool."""
    try:
        return _backend("mosaic", mesh, heads, dtype, sinks=False, windows=True).attend
    except NotImplementedError as reason:
        _log_fallback("mosaic", str(reason))
        return rows_attend
