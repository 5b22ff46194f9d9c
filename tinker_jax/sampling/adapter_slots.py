"""Adapters side by side: rows of one decode batch, each under its own adapter or none.

Adapters are laid next to each other along the rank axis; an adapter's slot is its columns there. A row uses the slot of its own
adapter alone: every other column is masked between the two factors, so that a linear of any number of adapters stays two plain
products.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax import lora
from tinker_jax.lora import Adapter
from tinker_jax.programs import Program
from tinker_jax.sharding import host_view

MOST_SLOT_RANK = 512
"""Summed ranks of the adapters in one batch; a request whose adapter finds no room waits. One adapter of any rank fits."""


class AdapterSlots:
    """The adapters of running sequences, by the name of their weights.

    Args:
        reserve: sets so many bytes of each device aside for the adapters that lie side by side, in place of what was set aside
            before; False: there are not so many, and nothing has changed.
    """

    def __init__(self, reserve: Callable[[int], bool] = lambda size: True) -> None:
        self._reserve = reserve
        self._users: collections.Counter[Hashable] = collections.Counter()
        self._adapters: dict[Hashable, Adapter] = {}
        self._spans: dict[Hashable, tuple[int, int]] = {}  # of what is in the tree
        self._tree: Adapter | None = None
        self._put = Program(_put, "adapter slots", donate=[0])
        self._finite = Program(_finite, "adapter check")

    @property
    def programs(self) -> int:
        """Number of compiled programs."""
        return self._put.count + self._finite.count

    @property
    def names(self) -> set[Hashable]:
        """Weights that some row uses, those of the bare base model included."""
        return set(self._users)

    def fits(self, weights: Hashable, adapter: Adapter | None) -> bool:
        """Is there room for a row of these weights? If so, the memory that they need is set aside."""
        if adapter is None or weights in self._adapters or not self._adapters:
            return True
        together = [*self._adapters.values(), adapter]
        rank = sum(map(_rank, together))
        return rank <= MOST_SLOT_RANK and self._reserve(_bytes(together, lora.bucket(rank)))

    def finite(self, adapter: Adapter) -> bool:
        """Are all of an adapter's numbers finite? One that is not would reach the rows of others: 0 · nan is nan."""
        leaves = jax.tree.leaves(adapter)
        devices = {device for leaf in leaves for device in leaf.devices()}
        if len(devices) == 1 and devices.pop().platform == "cpu":
            return all(np.isfinite(host_view(leaf)).all() for leaf in leaves)  # where they lie: nothing to compile
        return bool(self._finite(adapter, shape=describe(adapter)))

    def join(self, weights: Hashable, adapter: Adapter | None) -> None:
        """One more row of these weights."""
        self._users[weights] += 1
        if adapter is not None:
            self._adapters.setdefault(weights, adapter)

    def leave(self, weights: Hashable) -> None:
        """One row less."""
        self._users[weights] -= 1
        if not self._users[weights]:
            del self._users[weights]
            self._adapters.pop(weights, None)
            if not self._adapters:
                self._tree, self._spans = None, {}
                self._reserve(0)

    def replace(self, weights: Hashable, adapter: Adapter) -> None:
        """New values under an old name; running rows continue with them."""
        self._spans.pop(weights, None)  # also when no row uses them: the tree may still hold the old values
        if weights in self._adapters:
            self._adapters[weights] = adapter

    def span(self, weights: Hashable) -> tuple[int, int]:
        """Slot of these weights: their first column in `tree` and the one after their last; (0, 0) for the base model."""
        return self._spans.get(weights, (0, 0))

    def tree(self) -> Adapter | None:
        """The adapters as one, as wide as the power of two that holds their ranks; None when every row is of the base model."""
        width = lora.bucket(sum(map(_rank, self._adapters.values())))
        stale = not self._spans.keys() >= self._adapters.keys()
        if self._adapters and (stale or self._tree is None or _rank(self._tree) > 2 * width):
            self._build(width)
        return self._tree

    def warm_up(self, adapter: Adapter, most: int) -> list[Adapter]:
        """Compiles what putting up to `most` adapters of this shape together takes; a tree of every width there can be."""
        self.finite(adapter)
        rank, trees = _rank(adapter), []
        for width in sorted({lora.bucket(rank * n) for n in range(1, min(most, max(1, MOST_SLOT_RANK // rank)) + 1)}):
            if width == rank:
                trees.append(adapter)
            else:
                trees.append(self._join([adapter], width))
        return trees

    def _build(self, width: int) -> None:
        self._tree, self._spans, at = None, {}, 0
        for weights, adapter in self._adapters.items():
            self._spans[weights] = (at, at + _rank(adapter))
            at += _rank(adapter)
        adapters = list(self._adapters.values())
        if len(adapters) == 1 and _rank(adapters[0]) == width:
            self._tree = adapters[0]
            self._reserve(0)
            return
        self._reserve(_bytes(adapters, width))
        self._tree = self._join(adapters, width)

    def _join(self, adapters: list[Adapter], width: int) -> Adapter:
        tree, at = _wide(adapters, width), 0
        for adapter in adapters:
            tree = self._put(tree, adapter, np.int32(at), shape=f"{describe(adapter)} into {describe(tree)}")
            at += _rank(adapter)
        return tree


def describe(adapter: Adapter | None) -> str:
    """Names an adapter's shape: adapters of equal names share programs."""
    if not adapter:
        return "base"
    modules = {module for stack, node in adapter.items() for module in ([stack] if "a" in node else node)}
    return f"rank {_rank(adapter)} on {'+'.join(sorted(modules))}"


def batch_name(shape: tuple[int, ...], adapter: Adapter | None, pages: int | None = None) -> str:
    """Names the shapes of a batch of tokens under such an adapter, with tables of so many pages where it has any."""
    return f"{'x'.join(map(str, shape))} {describe(adapter)}{'' if pages is None else f' {pages} pages'}"


def adapter_rank(adapter: Adapter | None) -> int | None:
    """Width of the adapter's rank axis; None for the bare base model."""
    return _rank(adapter) if adapter else None


def _rank(adapter: Mapping[str, Any]) -> int:
    return next(leaf for leaf in _factors(adapter)).shape[-1]


def _factors(node: Mapping[str, Any]):
    if "a" in node:
        yield node["a"]
    else:
        for child in node.values():
            yield from _factors(child)


def _wide(adapters: list[Adapter], width: int) -> Adapter:
    """Zeros for every module that one of them has."""

    def grow(x: jax.Array, axis: int) -> jax.Array:
        shape = list(x.shape)
        shape[axis] = width
        return jnp.zeros(shape, x.dtype, device=x.sharding)

    wide: Adapter = {}
    for adapter in adapters:
        for name, node in lora.on_rank_axes(grow, adapter).items():
            wide[name] = node if name == "lm_head" else {**node, **wide.get(name, {})}
    return wide


def _bytes(adapters: Iterable[Adapter], width: int) -> int:
    """What `_wide` takes on each device."""
    leaves: dict[str, int] = {}
    for adapter in adapters:
        for path, x in jax.tree.leaves_with_path(adapter):
            size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            leaves[jax.tree_util.keystr(path)] = size // _rank(adapter) * width
    return sum(leaves.values())


def _put(wide: Adapter, adapter: Adapter, at: jax.Array) -> Adapter:
    def into(target: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
        if "a" in target:
            return {
                "a": jax.lax.dynamic_update_slice_in_dim(target["a"], source["a"], at, axis=-1),
                "b": jax.lax.dynamic_update_slice_in_dim(target["b"], source["b"], at, axis=-2),
            }
        return {name: into(node, source[name]) if name in source else node for name, node in target.items()}

    return into(wide, adapter)


def _finite(adapter: Adapter) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(adapter)]))
