"""The decode batch on the device: one cache, the rows in it, and the few programs that touch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax import sharding
from tinker_jax.engine.programs import Program
from tinker_jax.engine.sampling import Drawn, decode_chunk
from tinker_jax.engine.slots import CacheShape, Slots
from tinker_jax.kernels.attention import attention_on
from tinker_jax.lora import Adapter
from tinker_jax.models.config import DecoderConfig
from tinker_jax.models.dense import Cache, Decoder, empty_cache

STEPS = 16
"""Most tokens a row draws between two visits of Python."""


class DecodeBatch:
    """Keys and values of the rows being decoded, and the programs over them. Caches are donated, never copied in place.

    Args:
        cfg: shape of the model.
        params: base weights, placed on the mesh. They are arguments of every program, never constants in one.
        mesh: rows are cut over the axes that cut a batch, heads over the tensor axis, where the sizes divide.
        dtype: of the cache.
    """

    def __init__(self, cfg: DecoderConfig, params: Mapping[str, jax.Array], mesh: Mesh, dtype: Any) -> None:
        self._cfg, self._params, self._mesh, self._dtype = cfg, params, mesh, dtype
        self._attention = attention_on(mesh, (cfg.N, cfg.K, cfg.H), dtype)
        self._adapter: Adapter | None = None
        self._rank = "base"
        self._cache: Cache | None = None
        self.slots = Slots(CacheShape())
        self._make = Program(self._empty, "cache", static=["rows", "capacity"])
        self._copy = Program(self._copy_rows, "cache copy", donate=[0])
        self._fork = Program(self._fork_rows, "cache fork", donate=[0])
        self._prefill = Program(self._forward, "prefill")
        self._decode = Program(self._chunk, "decode", static=["top"], donate=[2])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return sum(p.count for p in (self._make, self._copy, self._fork, self._prefill, self._decode))

    @property
    def adapter(self) -> Adapter | None:
        """Scaled adapter of all rows, or None for the base model."""
        return self._adapter

    @property
    def rank(self) -> str:
        """Names the adapter's shape: adapters of equal names share programs."""
        return self._rank

    def use(self, adapter: Adapter | None) -> None:
        """Sets the adapter of the rows to come; no row may be live."""
        self._adapter, self._rank = adapter, _describe(adapter)

    def release(self) -> None:
        """Gives the memory back."""
        self.slots, self._cache, self._adapter = Slots(CacheShape()), None, None

    def move(self, shape: CacheShape) -> None:
        """Makes the cache one of `shape`; live rows move along, what ended ones held is lost."""
        if self.slots.shape == shape:
            return
        live = self.slots.live
        if not live:
            self._cache = None  # before the new one is there
        cache = self._make(rows=shape.rows, capacity=shape.capacity, shape=_name(shape))
        if live:
            old = _name(self.slots.shape)
            self.slots, source = self.slots.moved(shape)
            cache = self._copy(cache, self._cache, *_pairs(enumerate(source), shape), shape=f"{old} to {_name(shape)}")
        else:
            self.slots = Slots(shape)
        self._cache = cache

    def prefill(self, prompts: Sequence[np.ndarray], B: int, T: int) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] and keys and values [L, B, K, T, H] of prompts of at most T tokens, at most B of them."""
        tokens, lengths = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        for b, prompt in enumerate(prompts):
            tokens[b, : len(prompt)], lengths[b] = prompt, len(prompt)
        return self._prefill(self._params, self._adapter, tokens, lengths, shape=f"{B}x{T} {self._rank}")

    def insert(self, prefilled: Cache, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies prefilled rows into slots: (slot, row) pairs."""
        _, B, _, T, _ = prefilled.k.shape
        shape = f"{B}x{T} to {_name(self.slots.shape)}"
        self._cache = self._copy(self._cache, prefilled, *_pairs(pairs, self.slots.shape), shape=shape)

    def fork(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies slots onto others: (to, from) pairs, no slot in both roles."""
        shape = self.slots.shape
        self._cache = self._fork(self._cache, *_pairs(pairs, shape), shape=_name(shape))

    def draw(self, top: int) -> Drawn:
        """Draws up to `STEPS` tokens for every live row; numpy arrays. The host's rows are left as they were.

        Args:
            top: how many of the likeliest tokens to report with each.
        """
        shape = f"{_name(self.slots.shape)} {self._rank}"
        rows = self.slots.rows
        self._cache, drawn = self._decode(self._params, self._adapter, self._cache, rows, top=top, shape=shape)
        return jax.device_get(drawn)

    def _place(self, cache: Cache) -> Cache:
        _, S, K, _, _ = cache.k.shape
        cut = {"rows": S, "kv_heads": K}
        parts = {axis: sharding.parts(self._mesh, axis) for axis in cut}
        axes = [axis if cut[axis] % parts[axis] == 0 else None for axis in cut]
        where = sharding.named(self._mesh, (None, axes[0], axes[1], None, None))
        return Cache(*(jax.lax.with_sharding_constraint(x, where) for x in cache))

    def _empty(self, *, rows: int, capacity: int) -> Cache:
        return self._place(empty_cache(self._cfg, rows, capacity, self._dtype))

    def _copy_rows(self, cache: Cache, source: Cache, to: jax.Array, origin: jax.Array, count: jax.Array) -> Cache:
        width = min(cache.k.shape[3], source.k.shape[3])

        def one(i, cache):
            def put(x, y):
                row = jax.lax.dynamic_slice_in_dim(y, origin[i], 1, axis=1)[:, :, :, :width]
                return jax.lax.dynamic_update_slice_in_dim(x, row.astype(x.dtype), to[i], axis=1)

            return Cache(put(cache.k, source.k), put(cache.v, source.v))

        return self._place(jax.lax.fori_loop(0, count, one, cache))

    def _fork_rows(self, cache: Cache, to: jax.Array, origin: jax.Array, count: jax.Array) -> Cache:
        def one(i, cache):
            def put(x):
                row = jax.lax.dynamic_slice_in_dim(x, origin[i], 1, axis=1)
                return jax.lax.dynamic_update_slice_in_dim(x, row, to[i], axis=1)

            return Cache(put(cache.k), put(cache.v))

        return self._place(jax.lax.fori_loop(0, count, one, cache))

    def _forward(self, params, adapter, tokens_BT, lengths_B):
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        padding_BT = (positions_BT >= lengths_B[:, None]).astype(jnp.int32)  # a segment of its own
        decoder = Decoder(self._cfg, params, self._attention)
        h_MD, cache = decoder.forward(tokens_BT, positions_BT, padding_BT, adapter, keep_cache=True)
        assert cache is not None
        return h_MD.reshape(B, T, -1), self._place(cache)

    def _chunk(self, params, adapter, cache, rows, *, top):
        cache, drawn = decode_chunk(self._cfg, params, adapter, cache, rows, steps=STEPS, top=top)
        return self._place(cache), drawn


def _name(shape: CacheShape) -> str:
    return f"{shape.rows}x{shape.capacity}"


def _pairs(pairs, shape: CacheShape) -> tuple[np.ndarray, np.ndarray, np.int32]:
    """(to, from) pairs as two arrays of S entries and their number."""
    to, origin = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.int32)
    count = 0
    for count, (a, b) in enumerate(pairs, start=1):
        to[count - 1], origin[count - 1] = a, b
    return to, origin, np.int32(count)


def _describe(adapter: Adapter | None) -> str:
    if not adapter:
        return "base"
    modules = {**adapter.get("layers", {}), **({"lm_head": adapter["lm_head"]} if "lm_head" in adapter else {})}
    rank = next(iter(modules.values()))["a"].shape[-1]
    return f"rank {rank} on {'+'.join(sorted(modules))}"
