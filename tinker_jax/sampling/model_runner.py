"""The sampler's side of the device: the pool of pages, and the few programs that use it.

A row is known to a program by its table of pages alone, so rows join, leave and move at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinker_jax.kernels.decode_attention import Pages, paged_attention_on
from tinker_jax.lora import Adapter
from tinker_jax.models.config import DecoderConfig
from tinker_jax.models.dense import Decoder
from tinker_jax.programs import Program
from tinker_jax.sampling.adapter_slots import describe
from tinker_jax.sampling.drawing import Drawn, Rows, decode_chunk, own_slots

STEPS = 16
"""Most tokens a row draws between two visits of Python."""

_COPIES = 16  # pages copied by one call


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence whose keys and values are to be computed: those from `start` on, at most T of them."""

    tokens: np.ndarray
    start: int
    table: np.ndarray
    slot: tuple[int, int]


class ModelRunner:
    """Keys and values of the running sequences, and the programs over them. The pool is donated to every program, never copied.

    Args:
        cfg: shape of the model.
        params: base weights, placed on the mesh. They are arguments of every program, never constants in one.
        mesh: its parts of the rows have pages of their own; heads are cut over the tensor axis where that divides them.
        dtype: of keys and values.
        pages: of each layer and part of the rows, page 0 among them.
        unstack: decode with a second copy of the layers' weights, see `tinker_jax.memory.plan`.
    """

    def __init__(
        self, cfg: DecoderConfig, params: Mapping[str, jax.Array], mesh: Mesh, dtype: Any, pages: int, unstack: bool
    ) -> None:
        self._cfg, self._params, self._pages_each = cfg, params, pages
        self._paged = paged_attention_on(mesh, (cfg.N, cfg.K, cfg.H), dtype)
        self._unstack = unstack
        self._pool: Pages | None = None
        self._make = Program(self._empty, "cache")
        self._copy = Program(_copy_pages, "cache copy", donate=[0])
        self._prefill = Program(self._forward, "prefill", donate=[2])
        self._decode = Program(self._chunk, "decode", static=["top"], donate=[2])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return sum(p.count for p in (self._make, self._copy, self._prefill, self._decode))

    @property
    def _pages(self) -> Pages:
        """Made at their first use."""
        pool = self._pool if self._pool is not None else self._make(shape=f"{self._pages_each} pages")
        self._pool = pool
        return pool

    def release(self) -> None:
        """Gives the memory back."""
        self._pool = None

    def prefill(self, adapter: Adapter | None, chunks: Sequence[Chunk | None], T: int) -> jax.Array:
        """Writes keys and values of each row's chunk; rows of the same sequence see each other's.

        Returns:
            Hidden states [R, T, D]; what stands for None, or behind the end of a chunk, is filler.
        """
        R, W = len(chunks), next(chunk.table.size for chunk in chunks if chunk)
        tokens, positions = np.zeros((R, T), np.int32), np.full((R, T), -1, np.int32)
        tables, slots = np.zeros((R, W), np.int32), np.zeros((R, 2), np.int32)
        for r, chunk in enumerate(chunks):
            if chunk:
                n = len(chunk.tokens)
                tokens[r, :n], positions[r, :n] = chunk.tokens, np.arange(chunk.start, chunk.start + n)
                tables[r], slots[r] = chunk.table, chunk.slot
        shape = f"{R}x{T} {describe(adapter)}"
        h_RTD, self._pool = self._prefill(self._params, adapter, self._pages, tokens, positions, tables, slots, shape=shape)
        return h_RTD

    def decode(self, adapter: Adapter | None, rows: Rows, top: int) -> Drawn:
        """Draws up to `STEPS` tokens for every live row; numpy arrays.

        Args:
            adapter: scaled adapters, side by side, or None.
            rows: the rows; their tables have room for `STEPS` tokens more.
            top: how many of the likeliest tokens to report with each.
        """
        shape = f"{rows.token.size} {describe(adapter)}"
        self._pool, drawn = self._decode(self._params, adapter, self._pages, rows, top=top, shape=shape)
        return jax.device_get(drawn)

    def copy(self, pairs: Sequence[tuple[int, int, int]]) -> None:
        """Copies pages in every layer: (part of the rows, from, to), none of them both read and written."""
        layers = np.arange(self._cfg.L, dtype=np.int32)
        for first in range(0, len(pairs), _COPIES):
            ids = np.zeros((2, self._cfg.L, _COPIES), np.int32)
            for i, (part, *pages) in enumerate(pairs[first : first + _COPIES]):
                ids[:, :, i] = (part * self._cfg.L + layers) * self._pages_each + np.array(pages)[:, None]
            self._pool = self._copy(self._pages, ids.reshape(2, -1), shape="")

    def _empty(self) -> Pages:
        return self._paged.empty(self._pages_each * self._cfg.L)

    def _forward(self, params, adapter, pages, tokens_RT, positions_RT, tables_RW, slots_R2):
        R, T = tokens_RT.shape
        decoder, slots = Decoder(self._cfg, params), own_slots(slots_R2, adapter)
        slots_MR = None if slots is None else jnp.repeat(slots, T, axis=0)
        h_MD, pages = decoder.extend(tokens_RT, positions_RT, tables_RW, pages, adapter, slots_MR, paged=self._paged)
        return h_MD.reshape(R, T, -1), pages

    def _chunk(self, params, adapter, pages, rows, *, top):
        return decode_chunk(
            self._cfg, params, adapter, pages, rows, paged=self._paged, unstack=self._unstack, steps=STEPS, top=top
        )


def _copy_pages(pages: Pages, ids_2N: jax.Array) -> Pages:
    origin, to = ids_2N
    return jax.tree.map(lambda x: x.at[to].set(x[origin]), pages)
