"""The decoder: an embedding, groups of layers, a final norm. What its layers are is the family's.

Layers are stacked on a leading axis and scanned, so that compile time does not grow with depth, except where `extend` is given
them one by one. Everything is a pure function of flat parameters (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tinker_jax.kernels.attention import attention, attention_on
from tinker_jax.kernels.attention.names import RESIDUALS
from tinker_jax.lora import PRODUCTS
from tinker_jax.models.block import Packed, Paged, Params, Report, Ropes, Stack
from tinker_jax.models.caches import Caches, Pools
from tinker_jax.models.config import ModelConfig
from tinker_jax.models.layers import RMSNorm
from tinker_jax.models.rope import Rope, rope_table

Remat = Literal["none", "attention", "full"]

#: What a layer keeps for the backward pass beside its input. Norms, rotations and gates are computed again in any case: that
#: costs less than to write and read what they made.
_KEPT: Mapping[Remat, tuple[str, ...]] = {"none": (PRODUCTS, RESIDUALS), "attention": (RESIDUALS,), "full": ()}

Layers = Sequence[tuple[Stack, int, Params, Mapping[str, Any]]]
"""Each layer: its stack, its place there, its weights, its part of an adapter."""


@dataclass(frozen=True)
class Decoder:
    """The whole model up to the final norm; the unembedding belongs to whoever needs log-probabilities.

    Attributes:
        cfg: of the model.
        params: flat dict of base weights, layers stacked.
    """

    cfg: ModelConfig
    params: Params

    def forward(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        lora: Mapping[str, Any] | None = None,
        *,
        remat: Remat = "none",
        attention: Callable[..., jax.Array] = attention,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, list[Report]]:
        """Hidden states of whole, packed rows.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32 position of each token within its own sequence.
            segment_ids_BT: int32 id of the sequence each token belongs to; padding has 0.
            lora: adapter with its scale folded in (`tinker_jax.lora.scaled`), or None for the bare base model.
            remat: what layers keep for the backward pass, see `_KEPT`.
            attention: `tinker_jax.kernels.attention.attention`, bound to `mesh` where there is more than one device.
            mesh: where the arrays are; None: JAX's default device.

        Returns:
            Hidden states after the final norm [B·T, D]; and what each layer reports.
        """
        tables = ropes(self.cfg, rope_tables(self.cfg, positions_BT.reshape(-1)))
        tokens, reports = Packed(segment_ids_BT, tables, attention, mesh), {}

        h_MD = embed(self.params, tokens_BT)
        for group in self.cfg.groups:
            layers = [
                rematerialised(lambda h_MD, params, factors, block=stack.block: block(params, h_MD, tokens, factors), remat)
                for stack in group
            ]

            def step(h_MD, xs, layers=layers):
                out = []
                for layer, (params, factors) in zip(layers, xs, strict=True):
                    h_MD, report = layer(h_MD, params, factors)
                    out.append(report)
                return h_MD, out

            own = [(stack.params(self.params), (lora or {}).get(stack.name, {})) for stack in group]
            h_MD, out = jax.lax.scan(step, h_MD, own)
            reports |= {stack.name: report for stack, report in zip(group, out, strict=True)}
        own = [jax.tree.map(lambda x, at=at: x[at], reports[stack.name]) for stack, at in in_order(self.cfg)]
        return final_norm(self.cfg, self.params)(h_MD), own

    def unstacked(self, lora: Mapping[str, Any] | None = None) -> Layers:
        """Each layer's own weights and factors, for `extend`: a copy of both, made once for a loop over decode steps."""
        layers = []
        for stack, at in in_order(self.cfg):
            own = stack.params(self.params), (lora or {}).get(stack.name, {})
            layers.append((stack, at, *jax.tree.map(lambda x, at=at: x[at], own)))
        return layers

    def extend(
        self,
        tokens_RT: jax.Array,
        positions_RT: jax.Array,
        tables_RW: jax.Array,
        pools: Pools,
        lora: Mapping[str, Any] | None = None,
        slots_MR: jax.Array | None = None,
        *,
        caches: Caches,
        layers: Layers | None = None,
    ) -> tuple[jax.Array, Pools]:
        """T more tokens of each of R sequences whose past lies in pages: writes what is kept of them, attends to all so far.

        Args:
            tokens_RT: int32 token ids.
            positions_RT: int32 position of each token in its sequence, increasing; -1 is padding.
            tables_RW: int32 pages of each sequence, in order, as in the first layer.
            pools: of `caches`.
            lora: as in `forward`.
            slots_MR: bool [R·T, rank], as in `tinker_jax.lora.updates`; None: every token takes the whole adapter.
            caches: of this model and mesh.
            layers: what `unstacked` made of `lora`; None scans the stacked ones.

        Returns:
            Hidden states after the final norm [R·T, D], and the pools, updated in place when donated.
        """
        tables = ropes(self.cfg, rope_tables(self.cfg, positions_RT.reshape(-1)))

        def layer(stack, at, params, factors, h_MD, pools):
            return extend_layer(stack, at, params, factors, h_MD, pools, tables_RW, positions_RT, tables, slots_MR, caches)

        h_MD = embed(self.params, tokens_RT)
        if layers is not None:
            for stack, at, params, factors in layers:
                h_MD, pools = layer(stack, at, params, factors, h_MD, pools)
            return final_norm(self.cfg, self.params)(h_MD), pools
        for group in self.cfg.groups:

            def step(carry, xs, group=group):
                own, at = xs
                for stack, (params, factors) in zip(group, own, strict=True):
                    carry = layer(stack, at, params, factors, *carry)
                return carry, None

            own = [(stack.params(self.params), (lora or {}).get(stack.name, {})) for stack in group]
            numbers = jnp.arange(len(group[0].layers), dtype=jnp.int32)
            (h_MD, pools), _ = jax.lax.scan(step, (h_MD, pools), (own, numbers))
        return final_norm(self.cfg, self.params)(h_MD), pools


def extend_layer(
    stack: Stack,
    at: Any,
    params: Params,
    factors: Mapping[str, Any],
    h_MD: jax.Array,
    pools: Pools,
    tables_RW: jax.Array,
    positions_RT: jax.Array,
    ropes: Ropes,
    slots_MR: jax.Array | None,
    caches: Caches,
) -> tuple[jax.Array, Pools]:
    """One layer's part of `Decoder.extend`; `at` is its place in its stack."""
    kind, own_RW, attention = caches.of(stack, at, pools, tables_RW)
    tokens = Paged(positions_RT, ropes, slots_MR, own_RW, pools[kind], attention)
    h_MD, _ = stack.block(params, h_MD, tokens, factors)
    return h_MD, (*pools[:kind], tokens.pages, *pools[kind + 1 :])


def in_order(cfg: ModelConfig) -> list[tuple[Stack, int]]:
    """Every layer of the model: its stack and its place there."""
    return [(stack, at) for group in cfg.groups for at in range(len(group[0].layers)) for stack in group]


def stacks(cfg: ModelConfig) -> list[Stack]:
    """All stacks of the model."""
    return [stack for group in cfg.groups for stack in group]


def outside(cfg: ModelConfig, params: Params) -> dict[str, jax.Array]:
    """Weights that belong to no layer."""
    prefixes = tuple(f"{stack.name}." for stack in stacks(cfg))
    return {name: x for name, x in params.items() if not name.startswith(prefixes)}


def _rotary(cfg: ModelConfig) -> list[Rope]:
    return list(dict.fromkeys(stack.block.attn.rope for stack in stacks(cfg)))


def rope_tables(cfg: ModelConfig, positions: jax.Array) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """cos and sin of integer positions, for each rotary embedding of the model."""
    return tuple(rope_table(rope, positions) for rope in _rotary(cfg))


def ropes(cfg: ModelConfig, tables: Sequence[tuple[jax.Array, jax.Array]]) -> Ropes:
    """What `rope_tables` made, by rotary embedding: programs pass it on without."""
    return dict(zip(_rotary(cfg), tables, strict=True))


def attention_of(cfg: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    """The attention of whole rows that every layer of the model can use on a mesh."""
    mixers = [stack.block.attn for stack in stacks(cfg)]
    (heads,) = {mixer.heads for mixer in mixers}
    sinks, windows = any(mixer.sinks for mixer in mixers), any(mixer.window for mixer in mixers)
    return attention_on(mesh, heads, dtype, sinks=sinks, windows=windows)


def activation_dtype(params: Params) -> jnp.dtype:
    """The dtype of hidden states: that of the norms, which are never quantised."""
    return params["final_norm.scale"].dtype


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Embeddings of tokens [..., laid end to end] [M, D]."""
    return params["embed.embedding"][tokens.reshape(-1)].astype(activation_dtype(params))


def final_norm(cfg: ModelConfig, params: Params) -> RMSNorm:
    """The norm behind the last layer."""
    return RMSNorm(params["final_norm.scale"], cfg.norm_eps)


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer whose derivative computes again what `_KEPT` does not name."""
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*_KEPT[remat]))


def unembedding(cfg: ModelConfig, params: Params) -> jax.Array:
    """The matrix [V, D] that turns hidden states into logits."""
    return params["embed.embedding" if cfg.tied else "lm_head.kernel"]
