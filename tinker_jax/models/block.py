"""A layer of a decoder, the tokens that it works on, and how layers of one kind are stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from tinker_jax.kernels.decode_attention import PagedAttention
from tinker_jax.kernels.heads import Heads
from tinker_jax.models.layers import RMSNorm
from tinker_jax.models.rope import Rope
from tinker_jax.models.sizes import Sizes
from tinker_jax.models.weights import Weight, norm

Params = Mapping[str, jax.Array]
Report = dict[str, jax.Array]
"""What a channel mixer tells of the tokens at work; see its class."""

Ropes = Mapping[Rope, tuple[jax.Array, jax.Array]]
"""cos and sin of every token, for each rotary embedding of the model."""


class Tokens(Protocol):
    """What a layer asks of the tokens at work, M of them laid end to end."""

    @property
    def ropes(self) -> Ropes: ...

    @property
    def slots_MR(self) -> jax.Array | None:
        """Bool, as in `tinker_jax.lora.updates`."""
        ...

    @property
    def real_M(self) -> jax.Array:
        """Bool: it is a token, and no padding."""
        ...

    @property
    def mesh(self) -> Mesh | None:
        """Where they are, for what GSPMD cannot cut; None: JAX's default device."""
        ...

    def attend(
        self,
        q_MNH: jax.Array,
        k_MKH: jax.Array,
        v_MKV: jax.Array | None,
        *,
        scale: float,
        window: int | None = None,
        sinks_N: jax.Array | None = None,
    ) -> jax.Array:
        """Attention [M, N, V] of each token to itself and those before it in its sequence; arguments as those of
        `tinker_jax.kernels.attention.attention`. Without values the keys are latents, of which values are the beginning."""
        ...

    @property
    def kept(self) -> bool:
        """Does `attend` keep keys and values for tokens to come? Then those of latent attention are latents."""
        ...


@dataclass(frozen=True)
class Packed:
    """Tokens of whole rows, in training.

    Attributes:
        segment_ids_BT: int32; sequences of a row have ids of their own, padding has 0.
        ropes: see `Tokens`.
        attention: `tinker_jax.kernels.attention.attention`, bound to `mesh` where there is more than one device.
        mesh: see `Tokens`.
    """

    segment_ids_BT: jax.Array
    ropes: Ropes
    attention: Callable[..., jax.Array]
    mesh: Mesh | None = None
    slots_MR: None = None
    kept = False

    @property
    def real_M(self) -> jax.Array:
        return self.segment_ids_BT.reshape(-1) > 0

    def attend(self, q_MNH, k_MKH, v_MKV, *, scale, window=None, sinks_N=None):
        B, T = self.segment_ids_BT.shape
        q, k, v = (x.reshape(B, T, *x.shape[1:]) for x in (q_MNH, k_MKH, v_MKV))
        out = self.attention(q, k, v, self.segment_ids_BT, scale=scale, window=window, sinks_N=sinks_N)
        return out.reshape(B * T, *out.shape[2:])


@dataclass
class Paged:
    """New tokens of sequences whose past lies in pages.

    Attributes:
        positions_RT: int32 position of each token in its sequence, increasing; -1 is padding.
        ropes, slots_MR: see `Tokens`.
        tables_RW: int32 pages of each sequence in this layer.
        pages: the pool, which `attend` writes to.
        attention: over the pool.
    """

    positions_RT: jax.Array
    ropes: Ropes
    slots_MR: jax.Array | None
    tables_RW: jax.Array
    pages: Any
    attention: PagedAttention
    kept = True

    @property
    def mesh(self) -> Mesh:
        return self.attention.mesh

    @property
    def real_M(self) -> jax.Array:
        return self.positions_RT.reshape(-1) >= 0

    def attend(self, q_MNH, k_MKH, v_MKV, *, scale, window=None, sinks_N=None):
        R, T = self.positions_RT.shape
        q, k = (x.reshape(R, T, *x.shape[1:]) for x in (q_MNH, k_MKH))
        v = None if v_MKV is None else v_MKV.reshape(R, T, *v_MKV.shape[1:])
        self.pages = self.attention.write(self.pages, k, v, self.tables_RW, self.positions_RT)
        positions = self.tables_RW, self.positions_RT
        out = self.attention.attend(self.pages, q, *positions, scale=scale, window=window, sinks_N=sinks_N)
        return out.reshape(R * T, *out.shape[2:])


class TokenMixer(Protocol):
    """Attention, in one of its forms."""

    @property
    def rope(self) -> Rope: ...
    @property
    def heads(self) -> Heads:
        """Of attention over whole rows."""
        ...

    @property
    def cached(self) -> Heads:
        """Of attention over what is kept of earlier tokens."""
        ...

    @property
    def window(self) -> int | None: ...
    @property
    def sinks(self) -> bool: ...
    @property
    def same_input(self) -> tuple[tuple[str, ...], ...]: ...
    def weights(self) -> list[Weight]: ...
    def __call__(self, params: Params, x_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]) -> jax.Array: ...
    def sizes(self, mesh: Mapping[str, int]) -> Sizes: ...


class ChannelMixer(Protocol):
    """What works on each token by itself."""

    @property
    def same_input(self) -> tuple[tuple[str, ...], ...]: ...
    def weights(self) -> list[Weight]: ...
    def __call__(
        self, params: Params, x_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]
    ) -> tuple[jax.Array, Report]: ...
    def sizes(self, mesh: Mapping[str, int]) -> Sizes: ...


@dataclass(frozen=True)
class Block:
    """One layer: h + attention(norm(h)), then h + mlp(norm(h)).

    Attributes:
        D: width of the model.
        eps: of the norms.
        attn: token mixer.
        mlp: channel mixer.
    """

    D: int
    eps: float
    attn: TokenMixer
    mlp: ChannelMixer

    @property
    def same_input(self) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same tokens."""
        return (*self.attn.same_input, *self.mlp.same_input)

    def weights(self) -> list[Weight]:
        """Rows of the table, in the order of the forward pass, names as a layer knows them."""
        before = norm("attn_norm", "input_layernorm", self.D), norm("mlp_norm", "post_attention_layernorm", self.D)
        return [before[0], *self.attn.weights(), before[1], *self.mlp.weights()]

    def __call__(self, params: Params, h_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]) -> tuple[jax.Array, Report]:
        """The layer's output [M, D], and what its channel mixer reports."""
        h_MD = h_MD + self.attn(params, RMSNorm(params["attn_norm.scale"], self.eps)(h_MD), tokens, lora)
        out_MD, report = self.mlp(params, RMSNorm(params["mlp_norm.scale"], self.eps)(h_MD), tokens, lora)
        return h_MD + out_MD, report

    def sizes(self, mesh: Mapping[str, int]) -> Sizes:
        """Numbers that it holds of a token, on each device of such a mesh, its input left out."""
        return self.attn.sizes(mesh) + self.mlp.sizes(mesh)


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, whose weights lie on a leading axis.

    Attributes:
        name: before the names of their weights, and key of their part of an adapter.
        block: each of them.
        layers: their numbers in the model.
    """

    name: str
    block: Block
    layers: tuple[int, ...]

    def params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Its weights out of the flat dict, under the names that a layer knows."""
        prefix = f"{self.name}."
        return {name.removeprefix(prefix): x for name, x in params.items() if name.startswith(prefix)}


Group = tuple[Stack, ...]
"""Stacks of equal length whose layers run in turn: the first of each, the second of each, and so on."""


def group_layers(blocks: Sequence[Block]) -> tuple[Group, ...]:
    """The layers of a model, as few groups of repeating patterns as a walk from the first to the last finds.

    Compile time follows the number of stacks. A model of one kind is one stack, `"layers"`; others are numbered.

    Args:
        blocks: of each layer, in order; equal ones are of one kind.
    """
    runs: list[tuple[int, int, int]] = []  # first layer, length of the pattern, repeats
    at = 0
    while at < len(blocks):
        best: tuple[int, int] = 1, 1
        for length in range(1, (len(blocks) - at) // 2 + 1):
            repeats = 1
            while blocks[at : at + length] == blocks[at + repeats * length : at + (repeats + 1) * length]:
                repeats += 1
            if repeats > 1 and length * repeats > best[0] * best[1]:
                best = length, repeats
        length, repeats = best
        runs.append((at, length, repeats))
        at += length * repeats
    count = sum(length for _, length, _ in runs)
    groups, number = [], 0
    for first, length, repeats in runs:
        group = []
        for place in range(first, first + length):
            name = "layers" if count == 1 else f"layers_{number}"
            group.append(Stack(name, blocks[place], tuple(range(place, place + length * repeats, length))))
            number += 1
        groups.append(tuple(group))
    return tuple(groups)
