"""The past of a model: pools of pages, one for each kind of attention that its layers have."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from tinker_jax.kernels.decode_attention import PagedAttention, paged_attention_on
from tinker_jax.kernels.heads import Heads
from tinker_jax.models.block import Stack
from tinker_jax.models.config import ModelConfig

Pools = tuple[Any, ...]


class Caches:
    """Attention over pages of a model's layers on a mesh.

    Layers of one kind share a pool: page p of the kind's layer l is l · (pages of a layer) + p. A sequence has the same pages
    in every layer of every kind.

    Args:
        cfg: of the model.
        mesh: devices, there or only compiled for.
        dtype: of queries, keys and values.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, dtype: Any) -> None:
        counts: dict[Heads, int] = {}
        # Of each stack: its kind, the place of its first layer among those of the kind, and how far apart its layers are.
        self._places: dict[str, tuple[int, int, int]] = {}
        for group in cfg.groups:
            kinds = [stack.block.attn.cached for stack in group]
            for at, (stack, heads) in enumerate(zip(group, kinds, strict=True)):
                before = counts.setdefault(heads, 0) + kinds[:at].count(heads)
                self._places[stack.name] = list(counts).index(heads), before, kinds.count(heads)
            for stack, heads in zip(group, kinds, strict=True):
                counts[heads] += len(stack.layers)
        self.mesh, self.layers = mesh, tuple(counts.values())
        kinds = []
        for heads in counts:
            mixers = [stack.block.attn for group in cfg.groups for stack in group if stack.block.attn.cached == heads]
            sinks, windows = any(m.sinks for m in mixers), any(m.window for m in mixers)
            kinds.append(paged_attention_on(mesh, heads, jnp.dtype(dtype), sinks=sinks, windows=windows))
        self.kinds: tuple[PagedAttention, ...] = tuple(kinds)

    @property
    def most_entries(self) -> int | None:
        """Of the tables of one call on one device; None: any number."""
        return min((n for n in (kind.backend.most_entries for kind in self.kinds) if n is not None), default=None)

    def empty(self, pages: int) -> Pools:
        """Zeroed pools, placed on the mesh.

        Args:
            pages: of each layer and each part of the rows, page 0 among them, which belongs to no row.
        """
        return tuple(kind.empty(pages * layers) for kind, layers in zip(self.kinds, self.layers, strict=True))

    def empty_anywhere(self, pages: int) -> Pools:
        """Zeroed pools of one device, committed to none."""
        return tuple(kind.backend.empty(pages * layers) for kind, layers in zip(self.kinds, self.layers, strict=True))

    def of(self, stack: Stack, at: Any, pools: Pools, tables_RW: Any) -> tuple[int, Any, PagedAttention]:
        """Where a layer's past lies.

        Args:
            stack: the layer's.
            at: its place in the stack.
            pools: all.
            tables_RW: pages of each sequence, numbered as in the first layer.

        Returns:
            Number of the layer's pool, tables for it, attention over it.
        """
        kind, first, step = self._places[stack.name]
        each = self.kinds[kind].pages(pools[kind]) // self.layers[kind]
        return kind, tables_RW + (first + step * at) * each, self.kinds[kind]
