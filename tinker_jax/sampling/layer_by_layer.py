"""The sampler's programs on a CPU: one for a few layers, called for all of them in turn.

Weights are read where they lie. A program over the whole model either copies a layer's weights out of their stack at every step
or holds a second copy of all, and takes longer to compile the deeper the model is; here a program is the same at any depth, and
its weights are views of the stack. Between two programs about 0.1 ms pass, so each has several layers: up to four compile in
hardly more time than one (docs/performance.md).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.kernels.linear_cross_entropy import head_logits
from tinker_jax.lora import Adapter, joined
from tinker_jax.models.block import Params
from tinker_jax.models.caches import Caches, Pools
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.decoder import embed, extend_layer, final_norm, outside, rope_tables, ropes, stacks, unembedding
from tinker_jax.programs import Program
from tinker_jax.sampling.adapter_slots import adapter_rank, batch_name
from tinker_jax.sampling.drawing import Drawn, DrawOptions, Rows, advance, nothing_drawn, own_slots
from tinker_jax.sharding import host_view, views, views_of_layers

_MOST_LAYERS = 4
"""Of a program. From one to three a decode step gets 5 to 10 % faster, from there to ten hardly."""

_ROWS_AT_ONCE = 8
"""Whose tokens are drawn together from a large vocabulary."""


class Batch(NamedTuple):
    """What every layer needs to know of the tokens at work, M = R·T of them.

    Attributes:
        positions: int32 [R, T], -1 for padding.
        tables: cos and sin [M, H/2] of each rotary embedding of the model.
        slots: bool [M, rank] or None, see `tinker_jax.lora.updates`.
    """

    positions: Any
    tables: Any
    slots: Any


class LayerByLayer:
    """Programs of one device whose memory the host can read.

    Args:
        cfg: shape of the model.
        params: base weights, on JAX's default device.
        caches: of the model and its mesh.
        steps: most tokens a row draws in a chunk.
    """

    def __init__(self, cfg: ModelConfig, params: Params, caches: Caches, steps: int) -> None:
        self._cfg, self._caches, self._steps, self._ends = cfg, caches, steps, views(outside(cfg, params))
        weights = {stack.name: views_of_layers(stack.params(params), len(stack.layers)) for stack in stacks(cfg)}
        self._weights = self._by_program(weights)
        self._numbers = [jax.device_put(np.int32(at)) for at in range(max(cfg.L, steps))]
        self._adapter: Adapter | None = None
        self._no_factors = self._factors = self._by_program({name: [{}] * len(own) for name, own in weights.items()})
        self._head: Any = None
        self._embed = Program(self._embed_tokens, "embedding", static=["rank"])
        self._layers = Program(self._run_layers, "layers", static=["group"], donate=[3, 4])
        self._norm = Program(self._normed, "final norm")
        self._draw = Program(self._draw_tokens, "draw", static=["filters"], donate=[3, 4, 5])

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return sum(p.count for p in (self._embed, self._layers, self._norm, self._draw))

    def prefill(
        self, adapter: Adapter | None, pools: Pools, tokens_RT: Any, positions_RT: Any, tables_RW: Any, slots_R2: Any
    ) -> tuple[jax.Array, Pools]:
        """Hidden states [R, T, D], and the pools, which are donated."""
        self.prepare_prefill(adapter, pools, tokens_RT, positions_RT, tables_RW, slots_R2)
        name, rank = batch_name(tokens_RT.shape, adapter), adapter_rank(adapter)
        h_MD, batch = self._embed(self._ends, tokens_RT, positions_RT, slots_R2, rank=rank, shape=name)
        h_MD, pools = self._all_layers(h_MD, pools, jax.device_put(tables_RW), batch, adapter)
        return self._norm(self._ends, h_MD, batch.positions, shape=name), pools

    def decode(self, adapter: Adapter | None, pools: Pools, rows: Rows, options: DrawOptions) -> tuple[Pools, Rows, Drawn]:
        """Up to `steps` tokens for every live row; the pools are donated. Ends early when no row is live.

        Returns:
            The pools, the rows as they stand after it, without tables, and what they drew.
        """
        self.prepare_decode(adapter, pools, rows, options)
        name = batch_name((rows.token.size, 1), adapter)
        longest, before = int(np.max(rows.remaining, where=rows.live, initial=1)), None
        h_SD, batch = self._embed(self._ends, *_newest(rows), rank=adapter_rank(adapter), shape=name)
        tables_SW, rows = jax.device_put(rows.table), rows._replace(table=None)
        # The draw writes to these: they must not lie in memory of NumPy.
        rows, drawn = jax.device_put((rows, nothing_drawn(rows.token.size, self._steps, options.top)), may_alias=False)
        for step in self._numbers[: min(longest, self._steps)]:
            h_SD, pools = self._all_layers(h_SD, pools, tables_SW, batch, adapter)
            args = self._ends, self._head, h_SD, batch, rows, drawn, step
            live, h_SD, batch, rows, drawn = self._draw(*args, **_draw_key(name, options))
            if before is not None and not before:  # of the step before, so that the device always has the next one to do
                break
            before = live
        return pools, rows, drawn

    def prepare_prefill(
        self, adapter: Adapter | None, pools: Pools, tokens_RT: Any, positions_RT: Any, tables_RW: Any, slots_R2: Any
    ) -> None:
        """Has what a prefill of this shape needs compiled on other threads."""
        self._use(adapter)
        if self.is_ready_to_prefill(tokens_RT.shape, tables_RW.shape[1], adapter):
            return
        name, args = batch_name(tokens_RT.shape, adapter), (self._ends, tokens_RT, positions_RT, slots_R2)
        rank = adapter_rank(adapter)
        h_MD, batch = jax.eval_shape(functools.partial(self._embed_tokens, rank=rank), *args)
        self._prepare_layers(h_MD, pools, tables_RW, batch, adapter)
        self._embed.prepare(*args, rank=rank, shape=name)
        self._norm.prepare(self._ends, h_MD, batch.positions, shape=name)

    def prepare_decode(self, adapter: Adapter | None, pools: Pools, rows: Any, options: DrawOptions) -> None:
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
        self._prepare_layers(h_SD, pools, rows.table, batch, adapter)
        self._embed.prepare(self._ends, *_newest(rows), rank=rank, shape=name)

    def is_ready(self, S: int, W: int, adapter: Adapter | None, options: DrawOptions) -> bool:
        """Are the programs compiled that decode S rows of up to W pages?"""
        draw = _draw_key(batch_name((S, 1), adapter), options)
        return self._layers_are_ready(batch_name((S, 1), adapter, W)) and self._draw.is_ready(**draw)

    def is_ready_to_prefill(self, shape: tuple[int, int], W: int, adapter: Adapter | None) -> bool:
        """Are the programs compiled that prefill a batch of this shape, its rows of up to W pages?"""
        return self._layers_are_ready(batch_name(shape, adapter, W))

    def forget_adapter(self) -> None:
        """Keeps no adapter alive."""
        self._use(None)

    def close(self) -> None:
        """Gives the weights back; nothing can be run any more."""
        self._use(None)
        self._weights, self._ends = [], {}
        jax.device_put(np.int32(0))  # JAX lets go of memory that it borrowed from NumPy at its next call alone

    # -- weights ---------------------------------------------------------------------------------------------------------

    def _by_program(self, layers: Mapping[str, Sequence[Any]]) -> list[tuple[int, int, tuple[Any, ...]]]:
        """What belongs to each layer, by stack, as the programs get it: (group, first place in its stacks, of each layer)."""
        calls = []
        for number, group in enumerate(self._cfg.groups):
            repeats = len(group[0].layers)
            each = max(n for n in range(1, repeats + 1) if repeats % n == 0 and (n == 1 or n * len(group) <= _MOST_LAYERS))
            for first in range(0, repeats, each):
                own = tuple(layers[stack.name][at] for at in range(first, first + each) for stack in group)
                calls.append((number, first, own))
        return calls

    def _use(self, adapter: Adapter | None) -> None:
        if adapter is self._adapter:
            return
        head, factors = (adapter or {}).get("lm_head"), {}
        for stack in stacks(self._cfg):
            host = joined(jax.tree.map(host_view, (adapter or {}).get(stack.name, {})), stack.block.same_input)
            factors[stack.name] = views_of_layers(host, len(stack.layers)) if host else [{}] * len(stack.layers)
        self._factors = self._by_program(factors) if adapter else self._no_factors
        self._head = head and jax.device_put(jax.tree.map(host_view, head))
        self._adapter = adapter

    # -- programs --------------------------------------------------------------------------------------------------------

    def _all_layers(
        self, h_MD: jax.Array, pools: Pools, tables_RW: jax.Array, batch: Batch, adapter: Adapter | None
    ) -> tuple[jax.Array, Pools]:
        name = batch_name(batch.positions.shape, adapter, tables_RW.shape[1])
        for (group, first, params), (_, _, factors) in zip(self._weights, self._factors, strict=True):
            at = self._numbers[first]
            h_MD, pools = self._layers(params, factors, at, h_MD, pools, tables_RW, batch, shape=name, group=group)
        return h_MD, pools

    def _prepare_layers(self, h_MD: Any, pools: Pools, tables_RW: Any, batch: Any, adapter: Adapter | None) -> None:
        name = batch_name(batch.positions.shape, adapter, tables_RW.shape[1])
        for (group, first, params), (_, _, factors) in zip(self._weights, self._factors, strict=True):
            if first == 0:
                args = params, factors, self._numbers[0], h_MD, pools, tables_RW, batch
                self._layers.prepare(*args, shape=name, group=group)

    def _layers_are_ready(self, name: str) -> bool:
        return all(self._layers.is_ready(name, group=group) for group in range(len(self._cfg.groups)))

    def _embed_tokens(self, ends, tokens_RT, positions_RT, slots_R2, *, rank):
        T = tokens_RT.shape[1]
        slots = own_slots(slots_R2, rank)
        slots_MR = None if slots is None else jnp.repeat(slots, T, axis=0)
        positions_RT = jnp.asarray(positions_RT)
        return embed(ends, tokens_RT), Batch(positions_RT, self._tables(positions_RT), slots_MR)

    def _tables(self, positions_RT):
        return rope_tables(self._cfg, positions_RT.reshape(-1))

    def _run_layers(self, params, factors, first, h_MD, pools, tables_RW, batch, *, group):
        """Layers of a group from place `first` of its stacks on."""
        stacks, tables = self._cfg.groups[group], ropes(self._cfg, batch.tables)
        for i, (own_params, own_factors) in enumerate(zip(params, factors, strict=True)):
            at, own = first + i // len(stacks), (own_params, own_factors, h_MD, pools)
            tokens = tables_RW, batch.positions, tables, batch.slots
            h_MD, pools = extend_layer(stacks[i % len(stacks)], at, *own, *tokens, self._caches)
        return h_MD, pools

    def _normed(self, ends, h_MD, positions_RT):
        return final_norm(self._cfg, ends)(h_MD).reshape(*positions_RT.shape, -1)

    def _draw_tokens(self, ends, head, h_SD, batch, rows, drawn, step, *, filters):
        """One token for every live row; (is any row still live, the new tokens' embeddings, what layers need of them, …)."""
        logits_SV = head_logits(final_norm(self._cfg, ends)(h_SD), unembedding(self._cfg, ends), head, batch.slots)
        rows, drawn = advance(logits_SV, rows, drawn, step, filters, _ROWS_AT_ONCE)
        position_S1 = jnp.where(rows.live, rows.position, -1)[:, None]
        batch = batch._replace(positions=position_S1, tables=self._tables(position_S1))
        return jnp.any(rows.live), embed(ends, rows.token), batch, rows, drawn


def _draw_key(name: str, options: DrawOptions) -> dict[str, Any]:
    return {"shape": f"{name} top {options.top}{' filters' * options.filters}", "filters": options.filters}


def _newest(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's newest token as a batch: tokens and positions [S, 1], adapter slots."""
    return rows.token[:, None], np.where(rows.live, rows.position, -1)[:, None], rows.slots
