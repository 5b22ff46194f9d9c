"""Dense decoders: Llama 3, Qwen2.5, Qwen3.

Pre-norm blocks of grouped-query attention and a gated MLP. The families differ in three places only: Llama 3.1 scales its
rotary frequencies, Qwen2.5 has biases on q, k and v, Qwen3 normalises every query and key head.

A `Decoder` is built inside a jitted function from the flat parameter dict (docs/architecture.md), so that no module graph is
walked outside. Layers are stacked on a leading axis and scanned, so compile time does not grow with depth, except where
`extend` is given them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tinker_jax.kernels.attention import attention
from tinker_jax.kernels.attention.names import RESIDUALS
from tinker_jax.kernels.decode_attention import PagedAttention, Pages
from tinker_jax.lora import PRODUCTS
from tinker_jax.models.config import DecoderConfig
from tinker_jax.models.layers import Linear, RMSNorm, project, rope_table, rotate

Params = Mapping[str, jax.Array]
Remat = Literal["none", "attention", "full"]

#: What a layer keeps for the backward pass beside its input. Norms, rotations and gates are computed again in any case: that
#: costs less than to write and read what they made.
_KEPT: Mapping[Remat, tuple[str, ...]] = {"none": (PRODUCTS, RESIDUALS), "attention": (RESIDUALS,), "full": ()}

#: (q [M,N,H], k [M,K,H], v [M,K,H]) → out [M,N,H]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Linears of a layer that read the same tokens."""

Layers = Sequence[tuple["Block", Mapping[str, Any]]]
"""Each layer's weights and its part of an adapter."""


class Block(nnx.Module):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, cfg: DecoderConfig, params: Params) -> None:
        def linear(name: str) -> Linear:
            return Linear(params[f"layers.{name}.kernel"], params.get(f"layers.{name}.bias"))

        def norm(name: str) -> RMSNorm:
            return RMSNorm(params[f"layers.{name}.scale"], cfg.norm_eps)

        self.cfg = cfg
        self.attn_norm, self.mlp_norm = norm("attn_norm"), norm("mlp_norm")
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(f"{n}_proj") for n in "qkvo")
        self.q_norm, self.k_norm = (norm("q_norm"), norm("k_norm")) if cfg.qk_norm else (None, None)
        self.gate_proj, self.up_proj, self.down_proj = linear("gate_proj"), linear("up_proj"), linear("down_proj")

    def __call__(
        self,
        h_MD: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        lora: Mapping[str, Any],
        attend: Attend,
        slots_MR: jax.Array | None = None,
    ) -> jax.Array:
        cfg, M = self.cfg, h_MD.shape[0]

        def linears(x_MD: jax.Array, *names: str) -> list[jax.Array]:
            return project(x_MD, [getattr(self, name) for name in names], [lora.get(name) for name in names], slots_MR)

        q, k, v = linears(self.attn_norm(h_MD), *SAME_INPUT[0])
        q_MNH, k_MKH, v_MKH = q.reshape(M, cfg.N, cfg.H), k.reshape(M, cfg.K, cfg.H), v.reshape(M, cfg.K, cfg.H)
        if self.q_norm is not None and self.k_norm is not None:
            q_MNH, k_MKH = self.q_norm(q_MNH), self.k_norm(k_MKH)
        out_MNH = attend(rotate(q_MNH, rope), rotate(k_MKH, rope), v_MKH)
        (out_MD,) = linears(out_MNH.reshape(M, cfg.N * cfg.H), "o_proj")
        h_MD = h_MD + out_MD
        gate_MF, up_MF = linears(self.mlp_norm(h_MD), *SAME_INPUT[1])
        (down_MD,) = linears(jax.nn.silu(gate_MF) * up_MF, "down_proj")
        return h_MD + down_MD

    def forward(
        self,
        h_MD: jax.Array,
        segment_ids_BT: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        lora: Mapping[str, Any],
        attention: Callable[..., jax.Array],
    ) -> jax.Array:
        """This layer's part of `Decoder.forward`."""
        cfg, (B, T) = self.cfg, segment_ids_BT.shape

        def attend(q, k, v):
            q, k, v = (x.reshape(B, T, -1, cfg.H) for x in (q, k, v))
            return attention(q, k, v, segment_ids_BT, scale=cfg.H**-0.5).reshape(B * T, cfg.N, cfg.H)

        return self(h_MD, rope, lora, attend)

    def extend(
        self,
        h_MD: jax.Array,
        pages: Pages,
        positions_RT: jax.Array,
        tables_RW: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        lora: Mapping[str, Any],
        slots_MR: jax.Array | None,
        paged: PagedAttention,
    ) -> tuple[jax.Array, Pages]:
        """This layer's part of `Decoder.extend`; the tables name pages of this layer."""

        def attend(q, k, v):
            nonlocal pages
            q, k, v = (x.reshape(*positions_RT.shape, -1, self.cfg.H) for x in (q, k, v))
            pages = paged.write(pages, k, v, tables_RW, positions_RT)
            out = paged.attend(pages, q, tables_RW, positions_RT, scale=self.cfg.H**-0.5)
            return out.reshape(h_MD.shape[0], self.cfg.N, self.cfg.H)

        h_MD = self(h_MD, rope, lora, attend, slots_MR)
        return h_MD, pages


class Decoder(nnx.Module):
    """The whole model up to the final norm; the unembedding belongs to whoever needs log-probabilities.

    Args:
        cfg: shape of the model.
        params: flat dict of base weights, layers stacked.
    """

    def __init__(self, cfg: DecoderConfig, params: Params) -> None:
        self.cfg = cfg
        self.embedding_VD = nnx.Param(params["embed.embedding"])
        self.layers = Block(cfg, params)
        self.final_norm = RMSNorm(params["final_norm.scale"], cfg.norm_eps)

    def forward(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        lora: Mapping[str, Any] | None = None,
        *,
        remat: Remat = "none",
        attention: Callable[..., jax.Array] = attention,
    ) -> jax.Array:
        """Hidden states of whole, packed rows.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32 position of each token within its own sequence.
            segment_ids_BT: int32 id of the sequence each token belongs to; padding has an id of its own.
            lora: adapter with its scale folded in (`tinker_jax.lora.scaled`), or None for the bare base model.
            remat: what layers keep for the backward pass, see `_KEPT`.
            attention: `tinker_jax.kernels.attention.attention`, bound to a mesh where there is more than one device.

        Returns:
            Hidden states after the final norm [B·T, D].
        """
        rope = rope_table(self.cfg.rope, self.cfg.H, positions_BT.reshape(-1))

        def layer(h_MD, xs):
            block, factors = xs
            return block.forward(h_MD, segment_ids_BT, rope, factors, attention), None

        h_MD = self.embedding_VD[...][tokens_BT.reshape(-1)]
        h_MD, _ = jax.lax.scan(rematerialised(layer, remat), h_MD, (self.layers, (lora or {}).get("layers", {})))
        return self.final_norm(h_MD)

    def unstacked(self, lora: Mapping[str, Any] | None = None) -> Layers:
        """Each layer's own weights and factors, for `extend`: a copy of both, made once for a loop over decode steps."""
        stacked = (self.layers, (lora or {}).get("layers", {}))
        return [jax.tree.map(lambda x, at=at: x[at], stacked) for at in range(self.cfg.L)]

    def extend(
        self,
        tokens_RT: jax.Array,
        positions_RT: jax.Array,
        tables_RW: jax.Array,
        pages: Pages,
        lora: Mapping[str, Any] | None = None,
        slots_MR: jax.Array | None = None,
        *,
        paged: PagedAttention,
        layers: Layers | None = None,
    ) -> tuple[jax.Array, Pages]:
        """T more tokens of each of R sequences whose past lies in pages: writes their keys and values, attends to all so far.

        All layers share one pool: page p of layer l is l · (pages of a layer) + p.

        Args:
            tokens_RT: int32 token ids.
            positions_RT: int32 position of each token in its sequence, increasing; -1 is padding.
            tables_RW: int32 pages of each sequence, in order, as in the first layer.
            pages: the pool.
            lora: as in `forward`.
            slots_MR: bool [R·T, rank], as in `tinker_jax.lora.updates`; None: every token takes the whole adapter.
            paged: the attention over pages of this mesh.
            layers: what `unstacked` made of `lora`; None scans the stacked ones.

        Returns:
            Hidden states after the final norm [R·T, D], and the pool, updated in place when donated.
        """
        cfg, M = self.cfg, tokens_RT.size
        each = paged.pages(pages) // cfg.L
        rope = rope_table(cfg.rope, cfg.H, positions_RT.reshape(M))

        def layer(carry, xs):
            (block, factors), at = xs
            return block.extend(*carry, positions_RT, tables_RW + at * each, rope, factors, slots_MR, paged), None

        carry = self.embedding_VD[...][tokens_RT.reshape(M)], pages
        if layers is None:
            stacked = (self.layers, (lora or {}).get("layers", {}))
            carry, _ = jax.lax.scan(layer, carry, (stacked, jnp.arange(cfg.L, dtype=jnp.int32)))
        else:
            for at, own in enumerate(layers):
                carry, _ = layer(carry, (own, at))
        h_MD, pages = carry
        return self.final_norm(h_MD), pages


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer whose derivative computes again what `_KEPT` does not name."""
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*_KEPT[remat]))


def unembedding(cfg: DecoderConfig, params: Params) -> jax.Array:
    """The matrix [V, D] that turns hidden states into logits."""
    return params["embed.embedding" if cfg.tied else "lm_head.kernel"]
