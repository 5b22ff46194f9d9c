"""The sampler's programs on a CPU: one for a few layers, called for all of them in turn.

Weights are read where they lie. A program over the whole model either copies a layer's weights out of their stack at every step
or holds a second copy of all, and takes longer to compile the deeper the model is; here a program is the same at any depth, and
its weights are views of the stack. Between two programs about 0.1 ms pass, so each has several layers: up to four compile in
hardly more time than one (docs/performance.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.kernels.decode_attention import PagedAttention, Pages
from tinker_jax.kernels.linear_cross_entropy import head_logits
from tinker_jax.lora import Adapter, joined
from tinker_jax.models.config import DecoderConfig
from tinker_jax.models.dense import SAME_INPUT, Block, Params, unembedding
from tinker_jax.models.layers import RMSNorm, rope_table
from tinker_jax.programs import Program
from tinker_jax.sampling.adapter_slots import adapter_rank, batch_name
from tinker_jax.sampling.drawing import Drawn, DrawOptions, Rows, advance, nothing_drawn, own_slots
from tinker_jax.sharding import host_view, views_of_layers, views_of_weights

_MOST_LAYERS = 4
"""Of a program. From one to three a decode step gets 5 to 10 % faster, from there to ten hardly."""

_ROWS_AT_ONCE = 8
"""Whose tokens are drawn together from a large vocabulary."""


class Batch(NamedTuple):
    """What every layer needs to know of the tokens at work, M = R·T of them.

    Attributes:
        positions: int32 [R, T], -1 for padding.
        rope: cos and sin [M, H/2].
        slots: bool [M, rank] or None, see `tinker_jax.lora.updates`.
    """

    positions: Any
    rope: Any
    slots: Any


class LayerByLayer:
    """Programs of one device whose memory the host can read.

    Args:
        cfg: shape of the model.
        params: base weights, on JAX's default device.
        paged: the attention over pages of the mesh.
        steps: most tokens a row draws in a chunk.
    """

    def __init__(self, cfg: DecoderConfig, params: Params, paged: PagedAttention, steps: int) -> None:
        self._cfg, self._paged, self._steps = cfg, paged, steps
        layers, self._ends = views_of_weights(params, cfg.L)
        self._size = max(n for n in range(1, _MOST_LAYERS + 1) if cfg.L % n == 0)
        self._weights = self._groups(layers)
        self._numbers = [jax.device_put(np.int32(at)) for at in range(max(cfg.L, steps))]
        self._adapter: Adapter | None = None
        self._no_factors = self._factors = self._groups([{} for _ in range(cfg.L)])
        self._head: Any = None
        self._embed = Program(self._embed_tokens, "embedding", static=["rank"])
        self._layers = Program(self._run_layers, "layers", donate=[3, 4])
        self._norm = Program(self._normed, "final norm")
        self._draw = Program(self._draw_tokens, "draw", static=["filters"], donate=[3, 4, 5])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return sum(p.count for p in (self._embed, self._layers, self._norm, self._draw))

    def prefill(
        self, adapter: Adapter | None, pages: Pages, tokens_RT: Any, positions_RT: Any, tables_RW: Any, slots_R2: Any
    ) -> tuple[jax.Array, Pages]:
        """Hidden states [R, T, D], and the pool, which is donated."""
        self.prepare_prefill(adapter, pages, tokens_RT, positions_RT, tables_RW, slots_R2)
        name, rank = batch_name(tokens_RT.shape, adapter), adapter_rank(adapter)
        h_MD, batch = self._embed(self._ends, tokens_RT, positions_RT, slots_R2, rank=rank, shape=name)
        h_MD, pages = self._all_layers(h_MD, pages, jax.device_put(tables_RW), batch, adapter)
        return self._norm(self._ends, h_MD, batch.positions, shape=name), pages

    def decode(self, adapter: Adapter | None, pages: Pages, rows: Rows, options: DrawOptions) -> tuple[Pages, Rows, Drawn]:
        """Up to `steps` tokens for every live row; the pool is donated. Ends early when no row is live.

        Returns:
            The pool, the rows as they stand after it, without tables, and what they drew.
        """
        self.prepare_decode(adapter, pages, rows, options)
        name = batch_name((rows.token.size, 1), adapter)
        longest, before = int(np.max(rows.remaining, where=rows.live, initial=1)), None
        h_SD, batch = self._embed(self._ends, *_newest(rows), rank=adapter_rank(adapter), shape=name)
        tables_SW, rows = jax.device_put(rows.table), rows._replace(table=None)
        # The draw writes to these: they must not lie in memory of NumPy.
        rows, drawn = jax.device_put((rows, nothing_drawn(rows.token.size, self._steps, options.top)), may_alias=False)
        for step in self._numbers[: min(longest, self._steps)]:
            h_SD, pages = self._all_layers(h_SD, pages, tables_SW, batch, adapter)
            args = self._ends, self._head, h_SD, batch, rows, drawn, step
            live, h_SD, batch, rows, drawn = self._draw(*args, **_draw_key(name, options))
            if before is not None and not before:  # of the step before, so that the device always has the next one to do
                break
            before = live
        return pages, rows, drawn

    def prepare_prefill(
        self, adapter: Adapter | None, pages: Pages, tokens_RT: Any, positions_RT: Any, tables_RW: Any, slots_R2: Any
    ) -> None:
        """Has what a prefill of this shape needs compiled on other threads."""
        self._use(adapter)
        if self.is_ready_to_prefill(tokens_RT.shape, tables_RW.shape[1], adapter):
            return
        name, args = batch_name(tokens_RT.shape, adapter), (self._ends, tokens_RT, positions_RT, slots_R2)
        rank = adapter_rank(adapter)
        h_MD, batch = jax.eval_shape(functools.partial(self._embed_tokens, rank=rank), *args)
        self._prepare_layers(h_MD, pages, tables_RW, batch, adapter)
        self._embed.prepare(*args, rank=rank, shape=name)
        self._norm.prepare(self._ends, h_MD, batch.positions, shape=name)

    def prepare_decode(self, adapter: Adapter | None, pages: Pages, rows: Any, options: DrawOptions) -> None:
        """Has what decoding such rows needs compiled on other threads."""
        self._use(adapter)
        S, W = rows.table.shape
        if self.is_ready(S, W, adapter, options):
            return
        name, rank = batch_name((S, 1), adapter), adapter_rank(adapter)
        h_SD, batch = jax.eval_shape(functools.partial(self._embed_tokens, rank=rank), self._ends, *_newest(rows))
        drawn = nothing_drawn(S, self._steps, options.top)
        args = self._ends, self._head, h_SD, batch, rows._replace(table=None), drawn, self._numbers[0]
        self._draw.prepare(*args, **_draw_key(name, options))
        self._prepare_layers(h_SD, pages, rows.table, batch, adapter)
        self._embed.prepare(self._ends, *_newest(rows), rank=rank, shape=name)

    def is_ready(self, S: int, W: int, adapter: Adapter | None, options: DrawOptions) -> bool:
        """Are the programs compiled that decode S rows of up to W pages?"""
        draw = _draw_key(batch_name((S, 1), adapter), options)
        return self._layers.is_ready(batch_name((S, 1), adapter, W)) and self._draw.is_ready(**draw)

    def is_ready_to_prefill(self, shape: tuple[int, int], W: int, adapter: Adapter | None) -> bool:
        """Are the programs compiled that prefill a batch of this shape, its rows of up to W pages?"""
        return self._layers.is_ready(batch_name(shape, adapter, W))

    def forget_adapter(self) -> None:
        """Keeps no adapter alive."""
        self._use(None)

    def close(self) -> None:
        """Gives the weights back; nothing can be run any more."""
        self._use(None)
        self._weights, self._ends = [], {}
        jax.device_put(np.int32(0))  # JAX lets go of memory that it borrowed from NumPy at its next call alone

    # -- weights ---------------------------------------------------------------------------------------------------------

    def _groups(self, layers: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What belongs to each layer, as the programs get it."""
        return [tuple(layers[at : at + self._size]) for at in range(0, self._cfg.L, self._size)]

    def _use(self, adapter: Adapter | None) -> None:
        if adapter is self._adapter:
            return
        layers, head = (adapter or {}).get("layers"), (adapter or {}).get("lm_head")
        host = joined(jax.tree.map(host_view, layers), SAME_INPUT) if layers else {}
        self._factors = self._groups(views_of_layers(host, self._cfg.L)) if layers else self._no_factors
        self._head = head and jax.device_put(jax.tree.map(host_view, head))
        self._adapter = adapter

    # -- programs --------------------------------------------------------------------------------------------------------

    def _all_layers(
        self, h_MD: jax.Array, pages: Pages, tables_RW: jax.Array, batch: Batch, adapter: Adapter | None
    ) -> tuple[jax.Array, Pages]:
        name = batch_name(batch.positions.shape, adapter, tables_RW.shape[1])
        for params, factors, at in zip(self._weights, self._factors, self._numbers[:: self._size], strict=False):
            h_MD, pages = self._layers(params, factors, at, h_MD, pages, tables_RW, batch, shape=name)
        return h_MD, pages

    def _prepare_layers(self, h_MD: Any, pages: Pages, tables_RW: Any, batch: Any, adapter: Adapter | None) -> None:
        args = self._weights[0], self._factors[0], self._numbers[0], h_MD, pages, tables_RW, batch
        self._layers.prepare(*args, shape=batch_name(batch.positions.shape, adapter, tables_RW.shape[1]))

    def _embed_tokens(self, ends, tokens_RT, positions_RT, slots_R2, *, rank):
        T = tokens_RT.shape[1]
        slots = own_slots(slots_R2, rank)
        slots_MR = None if slots is None else jnp.repeat(slots, T, axis=0)
        positions_RT = jnp.asarray(positions_RT)
        h_MD = ends["embed.embedding"][tokens_RT.reshape(-1)]
        return h_MD, Batch(positions_RT, self._rope(positions_RT), slots_MR)

    def _rope(self, positions_RT):
        return rope_table(self._cfg.rope, self._cfg.H, positions_RT.reshape(-1))

    def _run_layers(self, params, factors, first, h_MD, pages, tables_RW, batch):
        """Layers first, first + 1, …"""
        each = self._paged.pages(pages) // self._cfg.L
        for at, (own_params, own_factors) in enumerate(zip(params, factors, strict=True)):
            tables = tables_RW + (first + at) * each  # pages are numbered as in the first layer
            block = Block(self._cfg, own_params)
            h_MD, pages = block.extend(h_MD, pages, batch.positions, tables, batch.rope, own_factors, batch.slots, self._paged)
        return h_MD, pages

    def _final_norm(self, ends, h_MD):
        return RMSNorm(ends["final_norm.scale"], self._cfg.norm_eps)(h_MD)

    def _normed(self, ends, h_MD, positions_RT):
        return self._final_norm(ends, h_MD).reshape(*positions_RT.shape, -1)

    def _draw_tokens(self, ends, head, h_SD, batch, rows, drawn, step, *, filters):
        """One token for every live row; (is any row still live, the new tokens' embeddings, what layers need of them, …)."""
        logits_SV = head_logits(self._final_norm(ends, h_SD), unembedding(self._cfg, ends), head, batch.slots)
        rows, drawn = advance(logits_SV, rows, drawn, step, filters, _ROWS_AT_ONCE)
        position_S1 = jnp.where(rows.live, rows.position, -1)[:, None]
        batch = batch._replace(positions=position_S1, rope=self._rope(position_S1))
        return jnp.any(rows.live), ends["embed.embedding"][rows.token], batch, rows, drawn


def _draw_key(name: str, options: DrawOptions) -> dict[str, Any]:
    return {"shape": f"{name} top {options.top}{' filters' * options.filters}", "filters": options.filters}


def _newest(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's newest token as a batch: tokens and positions [S, 1], adapter slots."""
    return rows.token[:, None], np.where(rows.live, rows.position, -1)[:, None], rows.slots
