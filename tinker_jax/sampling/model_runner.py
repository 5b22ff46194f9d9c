"""The sampler's side of the device: the pool of pages, and the few programs that use it.

A row is known to a program by its table of pages alone, so rows join, leave and move at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinker_jax.kernels.decode_attention import Pages, paged_attention_on
from tinker_jax.lora import Adapter
from tinker_jax.models.config import DecoderConfig
from tinker_jax.programs import Program
from tinker_jax.sampling.drawing import Drawn, Rows
from tinker_jax.sampling.layer_by_layer import LayerByLayer
from tinker_jax.sampling.whole_model import WholeModel

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
        self._cfg, self._pages_each = cfg, pages
        self._paged = paged_attention_on(mesh, (cfg.N, cfg.K, cfg.H), dtype)
        device = mesh.devices.flat[0]
        self._by_layer = mesh.size == 1 and device.platform == "cpu" and device == jax.local_devices()[0]
        self._model = (
            LayerByLayer(cfg, params, self._paged, STEPS)
            if self._by_layer
            else WholeModel(cfg, params, self._paged, STEPS, unstack)
        )
        self._pool: Pages | None = None
        self._make = Program(self._empty, "cache")
        self._copy = Program(_copy_pages, "cache copy", donate=[0])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._make.count + self._copy.count + self._model.programs

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
        h_RTD, self._pool = self._model.prefill(adapter, self._pages, tokens, positions, tables, slots)
        return h_RTD

    def decode(self, adapter: Adapter | None, rows: Rows, top: int) -> Drawn:
        """Draws up to `STEPS` tokens for every live row; numpy arrays.

        Args:
            adapter: scaled adapters, side by side, or None.
            rows: the rows; their tables have room for `STEPS` tokens more.
            top: how many of the likeliest tokens to report with each.
        """
        self._pool, drawn = self._model.decode(adapter, self._pages, rows, top)
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
        pages = self._pages_each * self._cfg.L
        # Committed to no device, like everything else that these programs take: else each would be compiled twice.
        return self._paged.backend.empty(pages, self._cfg.K) if self._by_layer else self._paged.empty(pages)


def _copy_pages(pages: Pages, ids_2N: jax.Array) -> Pages:
    origin, to = ids_2N
    return jax.tree.map(lambda x: x.at[to].set(x[origin]), pages)
