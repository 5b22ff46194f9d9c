"""The sampler's side of the device: the pool of pages, and the few programs that use it.

A row is known to a program by its table of pages alone, so rows join, leave and move at no cost.
"""

from __future__ import annotations

import collections
import itertools
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinker_jax import sharding
from tinker_jax.kernels.decode_attention import Pages, paged_attention_on
from tinker_jax.kernels.heads import Heads
from tinker_jax.lora import Adapter
from tinker_jax.models.config import DecoderConfig
from tinker_jax.programs import Program
from tinker_jax.sampling.adapter_slots import batch_name
from tinker_jax.sampling.drawing import Drawn, DrawOptions, Rows
from tinker_jax.sampling.layer_by_layer import LayerByLayer
from tinker_jax.sampling.page_pool import pages_for, table_widths
from tinker_jax.sampling.whole_model import WholeModel

STEPS = 16
"""Most tokens a row draws between two visits of Python."""

_COPIES = 16  # pages copied by one call
_WORTH = (
    2.0  # seconds that rows for nothing may cost before a size's programs are compiled, which takes about as long on two cores
)
_LARGER = 4  # a prefill may have so many times the rows that it needs, rather than wait for a compiler
_PATIENCE = 4  # prefills that programs of another size serve before those of the best one are compiled


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence whose keys and values are to be computed: those from `start` on, at most T of them."""

    tokens: np.ndarray
    start: int
    pages: Sequence[int]
    slot: tuple[int, int]


@dataclass(frozen=True)
class Decoding:
    """A chunk of decode steps that the device has been given.

    Attributes:
        adapter: under which it runs.
        rows: as they will stand after it.
        drawn: what they will have drawn.
        size: names its program.
        begun: on the clock, or None where the program had to be compiled.
    """

    adapter: Adapter | None
    rows: Rows
    drawn: Drawn
    size: str
    begun: float | None


class ModelRunner:
    """Keys and values of the running sequences, and the programs over them. The pool is donated to every program, never copied.

    Args:
        cfg: shape of the model.
        params: base weights, placed on the mesh. They are arguments of every program, never constants in one.
        mesh: its parts of the rows have pages of their own; heads are cut over the tensor axis where that divides them.
        dtype: of keys and values.
        pages: of each layer and part of the rows, page 0 among them.
        unstack: decode with a second copy of the layers' weights, see `tinker_jax.memory.plan`.
        one_width: tables always have room for the whole context; else as much as the longest row at work needs, rounded up to
            one of `tinker_jax.sampling.page_pool.table_widths`.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        params: Mapping[str, jax.Array],
        mesh: Mesh,
        dtype: Any,
        pages: int,
        unstack: bool,
        one_width: bool = False,
    ) -> None:
        self._cfg, self._pages_each, self._parts = cfg, pages, sharding.parts(mesh, "rows")
        most = pages_for(cfg.context_length)
        self.widths = [most] if one_width else table_widths(most)
        self._paged = paged_attention_on(mesh, Heads(cfg.N, cfg.K, cfg.H), dtype)
        self._by_layer = sharding.on_default_cpu(mesh)
        self._new_model = (
            partial(LayerByLayer, cfg, params, self._paged, STEPS)
            if self._by_layer
            else partial(WholeModel, cfg, params, self._paged, STEPS, unstack)
        )
        self._model = self._new_model()
        self._pool: Pages | None = None
        self._missed: collections.Counter[Hashable] = collections.Counter()
        self._seconds: dict[str, float] = {}  # that the last call of a size took
        self._read = 0.0  # when the last call was read
        self._lost: dict[Hashable, float] = collections.defaultdict(float)  # by larger sizes in place of one
        self._make = Program(self._empty, "cache", static=["pages"])
        self._copy = Program(_copy_pages, "cache copy", donate=[0])

    @property
    def runs_ahead(self) -> bool:
        """Does the device work through a chunk without the host, which can give it the next one meanwhile?"""
        return not self._by_layer

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._make.count + self._copy.count + self._model.programs

    @property
    def _pages(self) -> Pages:
        """Made at their first use."""
        pool = self._pool if self._pool is not None else self._make(shape="", pages=self._pages_each)
        self._pool = pool
        return pool

    def allocate(self) -> None:
        """Makes the pool, unless it is there."""
        jax.block_until_ready(self._pages)

    def release(self) -> None:
        """Gives the memory back."""
        self._pool = None

    def resize(self, pages: int) -> None:
        """So many pages from now on. What they held is gone, and programs are compiled for the new shape."""
        self.release()
        self._pages_each, self._model = pages, self._new_model()

    def forget_adapter(self) -> None:
        """Keeps no adapter alive, until one is used again."""
        self._model.forget_adapter()

    def close(self) -> None:
        """Gives pages and weights back; nothing can be run any more."""
        self.release()
        self._model.close()

    @property
    def most_rows_of_a_part(self) -> int:
        """Rows of each part whose narrowest tables one call holds, at least one."""
        entries = self._paged.backend.most_entries
        return sys.maxsize if entries is None else max(1, entries // self.widths[0])

    def most_rows(self, sizes: Sequence[int], pages: int) -> int:
        """Most rows that one call takes when the longest has so many pages.

        Args:
            sizes: numbers of rows, rising.
            pages: of the longest row.
        """
        return max((size for size in sizes if self._shapes([size], pages)), default=sizes[0])

    def _shapes(self, sizes: Sequence[int], pages: int) -> list[tuple[int, int]]:
        """Rows and pages of the tables that would do, best first."""
        most = self._paged.backend.most_entries
        shapes = itertools.product(sizes, [width for width in self.widths if width >= pages])
        return [(size, width) for size, width in shapes if most is None or size // self._parts * width <= most]

    def shape_to_use(self, sizes: Sequence[int], pages: int, adapter: Adapter | None, options: DrawOptions) -> tuple[int, int]:
        """How many rows to decode, with tables of how many pages.

        Args:
            sizes: numbers of rows that would do, rising.
            pages: of the longest row.
            adapter: as in `decode`.
            options: as in `decode`.

        Returns:
            The least of both; or while the programs of that are not there, the next shape whose are. Wider tables cost nothing
            worth a compilation. More rows do: when the time they took for nothing is that of a compilation, the programs of the
            first shape are compiled on another thread; where a single call would lose as much, it is the first at once.
        """
        shapes = self._shapes(sizes, pages)
        (size, width), lost = self._choice(shapes, adapter, options)
        if lost:
            best = batch_name(shapes[0][:1], adapter, shapes[0][1]), options
            self._lost[best] += lost
            if self._lost[best] >= _WORTH:
                self._prepare_decode(shapes[0], adapter, options)
        return size, width

    def _choice(
        self, shapes: Sequence[tuple[int, int]], adapter: Adapter | None, options: DrawOptions
    ) -> tuple[tuple[int, int], float]:
        """What `shape_to_use` returns, and the seconds that its rows for nothing will take, as far as is known."""
        best = shapes[0]
        shape = next((shape for shape in shapes if self._model.is_ready(*shape, adapter, options)), best)
        lost = (1 - best[0] / shape[0]) * self._seconds.get(batch_name(shape[:1], adapter), 0.0)
        return (shape, lost) if lost < _WORTH else (best, 0.0)

    def prefill_shape_to_use(
        self, sizes: Sequence[int], best: int, pages: int, T: int, adapter: Adapter | None
    ) -> tuple[int, int]:
        """How many rows of T tokens to prefill in one call, with tables of how many pages.

        Args:
            sizes: all numbers of rows, rising.
            best: the one that just takes everything that waits.
            pages: of the longest row.
            T: tokens of a row.
            adapter: as in `prefill`.

        Returns:
            The best and the narrowest tables, or wider ones whose programs are there; unless the programs of the best are not
            there and those of fewer rows are: then these serve, in more calls; or those of at most `_LARGER` times as many.
            When that has happened `_PATIENCE` times, the programs of the best are compiled on another thread.
        """
        others = [*reversed([size for size in sizes if size < best]), *[n for n in sizes if best < n <= _LARGER * best]]
        shapes = self._shapes([best, *others], pages)
        size, width = next((s for s in shapes if self._model.is_ready_to_prefill((s[0], T), s[1], adapter)), shapes[0])
        if size != best and self._is_worth_it(batch_name((best, T), adapter, width)):
            tokens, positions, tables, slots = (np.zeros((best, n), np.int32) for n in (T, T, width, 2))
            self._model.prepare_prefill(adapter, self._pages, tokens, positions, tables, slots)
        return size, width

    def _is_worth_it(self, programs: Hashable) -> bool:
        """Counts a call that went without these programs; have there been enough?"""
        self._missed[programs] += 1
        return self._missed[programs] >= _PATIENCE

    def _prepare_decode(self, shape: tuple[int, int], adapter: Adapter | None, options: DrawOptions) -> None:
        self._model.prepare_decode(adapter, self._pages, Rows.empty(*shape), options)

    def prefill(
        self,
        adapter: Adapter | None,
        chunks: Sequence[Chunk | None],
        T: int,
        width: int,
        then: tuple[Sequence[int], int, DrawOptions] | None = None,
    ) -> jax.Array:
        """Writes keys and values of each row's chunk; rows of the same sequence see each other's.

        Args:
            adapter: scaled adapters, side by side, or None.
            chunks: of each row; None is filler.
            T: tokens of a row.
            width: pages of the tables.
            then: `sizes`, `pages` and `options` of the decoding that will follow: what it lacks is compiled meanwhile.

        Returns:
            Hidden states [R, T, D]; what stands for None, or behind the end of a chunk, is filler.
        """
        R, W = len(chunks), width
        tokens, positions = np.zeros((R, T), np.int32), np.full((R, T), -1, np.int32)
        tables, slots = np.zeros((R, W), np.int32), np.zeros((R, 2), np.int32)
        for r, chunk in enumerate(chunks):
            if chunk:
                n = len(chunk.tokens)
                tokens[r, :n], positions[r, :n] = chunk.tokens, np.arange(chunk.start, chunk.start + n)
                tables[r, : len(chunk.pages)], slots[r] = chunk.pages, chunk.slot
        batch = tokens, positions, tables, slots
        self._model.prepare_prefill(adapter, self._pages, *batch)
        if then:
            sizes, longest, options = then
            shape, _ = self._choice(self._shapes(sizes, longest), adapter, options)
            if not self._model.is_ready(*shape, adapter, options):
                self._prepare_decode(shape, adapter, options)
        h_RTD, self._pool = self._model.prefill(adapter, self._pages, *batch)
        return h_RTD

    def decode(self, adapter: Adapter | None, rows: Rows, options: DrawOptions) -> Decoding:
        """Has up to `STEPS` tokens drawn for every live row.

        Args:
            adapter: scaled adapters, side by side, or None.
            rows: the rows; their tables have room for `STEPS` tokens more. Also those of an earlier `Decoding`, with tables.
            options: of the program.
        """
        S, W = rows.table.shape
        compiled, begun = self._model.is_ready(S, W, adapter, options), time.perf_counter()
        self._pool, after, drawn = self._model.decode(adapter, self._pages, rows, options)
        size = batch_name(rows.token.shape, adapter)
        return Decoding(adapter, after, drawn, size, begun if compiled else None)

    def read(self, decoding: Decoding) -> Drawn:
        """Waits for what was drawn; numpy arrays."""
        drawn, now = jax.device_get(decoding.drawn), time.perf_counter()
        if decoding.begun is not None:
            self._seconds[decoding.size] = now - max(decoding.begun, self._read)
        self._read = now
        return drawn

    def copy(self, pairs: Sequence[tuple[int, int, int]]) -> None:
        """Copies pages in every layer: (part of the rows, from, to), none of them both read and written."""
        layers = np.arange(self._cfg.L, dtype=np.int32)
        for first in range(0, len(pairs), _COPIES):
            ids = np.zeros((2, self._cfg.L, _COPIES), np.int32)
            for i, (part, *pages) in enumerate(pairs[first : first + _COPIES]):
                ids[:, :, i] = (part * self._cfg.L + layers) * self._pages_each + np.array(pages)[:, None]
            self._pool = self._copy(self._pages, ids.reshape(2, -1), shape="")

    def _empty(self, pages: int) -> Pages:
        pages *= self._cfg.L
        # Committed to no device, like everything else that these programs take: else each would be compiled twice.
        return self._paged.backend.empty(pages) if self._by_layer else self._paged.empty(pages)


def _copy_pages(pages: Pages, ids_2N: jax.Array) -> Pages:
    origin, to = ids_2N
    return jax.tree.map(lambda x: x.at[to].set(x[origin]), pages)
