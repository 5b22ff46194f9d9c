"""LoRA adapters as plain pytrees.

`{"layers": {"q_proj": {"a": [L, D, R], "b": [L, R, out]}, …}, "lm_head": {"a": [D, R], "b": [R, V]}}`, float32, with an
entry for each stack of layers that the model has. Experts share one of the two factors and have one of their own of the other:
`a` [L, D, R] and `b` [L, 2, E, R, F] of gate and up, `a` [L, E, F, R] and `b` [L, R, D] of down. In an adapter from elsewhere
they may share none: `a` [L, 2, E, D, R] and `b` [L, 2, E, R, F] of gate and up, `a` [L, E, F, R] and `b` [L, E, R, D] of down.
Those modules have names of their own, so that adapters of both forms can be computed side by side. The model takes an adapter
as an argument; the base weights never change.

Programs are compiled for a few ranks only: an adapter at work is padded to the next of them with zeros, which change no result
and which training leaves at zero; one that is stored has its own rank.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

PRODUCTS = "products"
"""Name, for a rematerialisation policy, of what matrix products made."""

ALPHA = 32.0
"""Tinker's constant α: an update is scaled by α / rank."""

PER_EXPERT = "mlp_per_expert"
"""Stands for the group `"mlp"` in an adapter whose experts share no factor."""

Adapter = dict[str, Any]


class Target(Protocol):
    """What an adapter must know of a linear (see `tinker_jax.models.weights.LoraTarget`)."""

    @property
    def stack(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def groups(self) -> tuple[str, ...]: ...
    @property
    def fan_in(self) -> int: ...
    @property
    def fan_out(self) -> int: ...
    @property
    def axes(self) -> tuple[str | None, str | None]: ...
    @property
    def stacked(self) -> int: ...
    @property
    def a_lead(self) -> tuple[tuple[int, str | None], ...]: ...
    @property
    def b_lead(self) -> tuple[tuple[int, str | None], ...]: ...


def scale(rank: int) -> float:
    """The factor of the low-rank update."""
    return ALPHA / rank


def bucket(rank: int) -> int:
    """The rank at which an adapter is computed: a power of two, at least 8."""
    return max(8, 1 << (rank - 1).bit_length())


def pad(tree: Adapter) -> Adapter:
    """An adapter, or the state of its optimiser, at the rank of its bucket: more columns of `a` and rows of `b`, all zero.

    The update `(x a) b` is the same, and the gradients of what was added are exactly zero: those of `a` come through zero
    rows of `b`, those of `b` through zero columns of `a`.
    """

    def grow(x: Any, axis: int) -> Any:
        missing = bucket(x.shape[axis]) - x.shape[axis]
        widths = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
        return (np if isinstance(x, np.ndarray) else jnp).pad(x, widths) if missing else x

    return on_rank_axes(grow, tree)


def trim(tree: Adapter, rank: int) -> Adapter:
    """What `pad` made of a tree of this rank, back as it was."""
    return on_rank_axes(lambda x, axis: x if x.shape[axis] == rank else jax.lax.slice_in_dim(x, 0, rank, axis=axis), tree)


def on_rank_axes(change: Callable[[jax.Array, int], jax.Array], tree: Mapping[str, Any]) -> Adapter:
    """Maps every factor: `change` gets it and which of its axes has the rank's length."""
    if "a" in tree:
        return {"a": change(tree["a"], -1), "b": change(tree["b"], -2)}
    return {name: on_rank_axes(change, node) if isinstance(node, Mapping) else node for name, node in tree.items()}


def _build(targets: Sequence[Target], groups: Sequence[str], make: Callable[[Target, str], Any]) -> Adapter:
    tree: Adapter = {}
    for target in targets:
        if not set(groups).isdisjoint(target.groups):
            factors = {"a": make(target, "a"), "b": make(target, "b")}
            (tree.setdefault(target.stack, {}) if target.stack else tree)[target.module] = factors
    return tree


def shape(target: Target, factor: str, rank: int) -> tuple[int, ...]:
    """Of a target's factor `"a"` or `"b"`."""
    matrix = (target.fan_in, rank) if factor == "a" else (rank, target.fan_out)
    lead = tuple(size for size, _ in (target.a_lead if factor == "a" else target.b_lead))
    return (*([target.stacked] if target.stacked else []), *lead, *matrix)


def abstract(targets: Sequence[Target], rank: int, groups: Sequence[str]) -> Adapter:
    """The adapter's shapes and dtypes, nothing allocated."""
    return _build(targets, groups, lambda t, f: jax.ShapeDtypeStruct(shape(t, f, rank), jnp.float32))


def logical_axes(targets: Sequence[Target], groups: Sequence[str]) -> Adapter:
    """Logical axes of every factor, as tuples; the rank and layer axes are never cut."""

    def axes(target: Target, factor: str) -> tuple[str | None, ...]:
        matrix = (target.axes[0], None) if factor == "a" else (None, target.axes[1])
        lead = tuple(axis for _, axis in (target.a_lead if factor == "a" else target.b_lead))
        return (*([None] if target.stacked else []), *lead, *matrix)

    return _build(targets, groups, axes)


def init(seed: int, targets: Sequence[Target], rank: int, groups: Sequence[str]) -> Adapter:
    """A fresh adapter: `a` uniform in ±1/√fan_in, `b` zero, so that the model starts as its base, bit for bit.

    Made on the host by Philox (Salmon et al., 2011), whose numbers are the same on every machine: nothing is compiled, and each
    device takes its own part. Each factor's key holds its module's place in `targets`, so training fewer groups leaves the
    others' values alone.

    Args:
        seed: modulo 2**64.
        targets: of the model.
        rank: of the adapter.
        groups: that are trained.

    Returns:
        NumPy arrays, float32.
    """
    index = {(t.stack, t.module): i for i, t in enumerate(targets)}

    def make(target: Target, factor: str) -> np.ndarray:
        sizes = shape(target, factor, rank)
        if factor == "b":
            return np.zeros(sizes, np.float32)
        count = math.prod(sizes)
        words = (
            np.random.Philox(key=[seed % 2**64, index[target.stack, target.module]])
            .random_raw(-(-count // 2))
            .view(np.uint32)[:count]
        )
        uniform = (words >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)  # 24 bits, in [-1, 1)
        return (uniform / np.float32(math.sqrt(target.fan_in))).reshape(sizes)

    return _build(targets, groups, make)


def scaled(adapter: Adapter, factor: jax.Array | float) -> Adapter:
    """The adapter with its scale folded into every `b`, as the model's linears expect it."""

    def fold(node: Mapping[str, Any]) -> dict[str, Any]:
        if "a" in node:
            return {"a": node["a"], "b": node["b"] * factor}
        return {name: fold(child) for name, child in node.items()}

    return fold(adapter)


def updates(
    x_MD: jax.Array, adapters: Sequence[Mapping[str, jax.Array] | None], slots_MR: jax.Array | None = None
) -> list[jax.Array | None]:
    """The low-rank updates `(x a) b` of linears that read the same tokens x [M, D_in], in x's dtype.

    The narrow products with every `a` are made as one, forward and backward.

    Args:
        x_MD: the linears' input.
        adapters: `{"a": [D_in, R], "b": [R, D_out]}` of each, scaled already, or None for one that has none; or as `joined`
            makes them.
        slots_MR: bool, which part of the rank axis each token's own adapter takes; None: all of it.

    Returns:
        [M, D_out] of each, or None.
    """
    given = [x for x in adapters if x is not None]
    if not given:
        return [None] * len(adapters)
    a = jnp.concatenate([x["a"] for x in given if "a" in x], axis=-1).astype(x_MD.dtype)
    z = checkpoint_name(x_MD @ a, PRODUCTS)
    if slots_MR is not None:
        z = jnp.where(jnp.tile(slots_MR, len(given)), z, 0)
    ends = np.cumsum([x["b"].shape[-2] for x in given])[:-1]
    parts = iter(jnp.split(z, ends, axis=-1))
    return [None if x is None else next(parts) @ x["b"].astype(x_MD.dtype) for x in adapters]


def joined(
    layers: Mapping[str, Mapping[str, Any]], together: Sequence[Sequence[str]], concatenate: Callable[..., Any] = np.concatenate
) -> dict[str, dict[str, Any]]:
    """The factors of a stack of layers, `a` of linears that read the same input side by side, so that `updates` need not join
    them.

    Args:
        layers: factors by module.
        together: modules that read the same input; the first that has an adapter gets the `a` of all.
        concatenate: of the factors' kind of array.
    """
    out = {name: dict(factors) for name, factors in layers.items()}
    for names in together:
        own = [out[name] for name in names if name in out]
        if own:
            own[0]["a"] = concatenate([factors.pop("a") for factors in own], axis=-1)
    return out


def groups(*, train_attn: bool, train_mlp: bool, train_unembed: bool, per_expert: bool = False) -> tuple[str, ...]:
    """Names of the trained groups from Tinker's three flags, and from whether experts have all factors of their own."""
    flags = {"attn": train_attn, PER_EXPERT if per_expert else "mlp": train_mlp, "unembed": train_unembed}
    return tuple(name for name, on in flags.items() if on)


def count(adapter: Adapter) -> int:
    """Number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter))
