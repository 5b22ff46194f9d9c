"""Dense decoders: Llama 3, Qwen2.5, Qwen3.

Pre-norm blocks of grouped-query attention and a gated MLP. The families differ in three places only: Llama 3.1 scales its
rotary frequencies, Qwen2.5 has biases on q, k and v, Qwen3 normalises every query and key head.

A `Decoder` is built inside a jitted function from the flat parameter dict (docs/architecture.md), so that no module graph is
walked outside. Layers are stacked on a leading axis and scanned: compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tinker_jax.kernels.attention import attention
from tinker_jax.kernels.attention.names import RESIDUALS
from tinker_jax.models.config import DecoderConfig
from tinker_jax.models.layers import Linear, RMSNorm, rope_table, rotate

Params = Mapping[str, jax.Array]
Remat = Literal["none", "attention", "full"]

#: (q [M,N,H], k [M,K,H], v [M,K,H]) → (out [M,N,H], whatever the caller wants kept of this layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Cache(NamedTuple):
    """Keys and values of past tokens, [L, S, K, C, H] each: S rows of capacity C.

    Heads stand before positions, so that a decode step multiplies contiguous matrices without transposing the cache.
    """

    k: jax.Array
    v: jax.Array


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
        self, h_MD: jax.Array, rope: tuple[jax.Array, jax.Array], lora: Mapping[str, Any], attend: Attend
    ) -> tuple[jax.Array, Any]:
        cfg, M = self.cfg, h_MD.shape[0]
        x_MD = self.attn_norm(h_MD)
        q_MNH = self.q_proj(x_MD, lora.get("q_proj")).reshape(M, cfg.N, cfg.H)
        k_MKH = self.k_proj(x_MD, lora.get("k_proj")).reshape(M, cfg.K, cfg.H)
        v_MKH = self.v_proj(x_MD, lora.get("v_proj")).reshape(M, cfg.K, cfg.H)
        if self.q_norm is not None and self.k_norm is not None:
            q_MNH, k_MKH = self.q_norm(q_MNH), self.k_norm(k_MKH)
        out_MNH, kept = attend(rotate(q_MNH, rope), rotate(k_MKH, rope), v_MKH)
        h_MD = h_MD + self.o_proj(out_MNH.reshape(M, cfg.N * cfg.H), lora.get("o_proj"))
        x_MD = self.mlp_norm(h_MD)
        gate_MF = jax.nn.silu(self.gate_proj(x_MD, lora.get("gate_proj")))
        up_MF = self.up_proj(x_MD, lora.get("up_proj"))
        return h_MD + self.down_proj(gate_MF * up_MF, lora.get("down_proj")), kept


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
        keep_cache: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states of whole, packed rows.

        Args:
            tokens_BT: int32 token ids.
            positions_BT: int32 position of each token within its own sequence.
            segment_ids_BT: int32 id of the sequence each token belongs to; padding has an id of its own.
            lora: adapter with its scale folded in (`tinker_jax.lora.scaled`), or None for the bare base model.
            remat: what each layer keeps for the backward pass: `"none"` everything, `"attention"` its input and what
                attention's own backward pass needs, so that all but attention is computed again, `"full"` its input.
            keep_cache: also return every layer's keys and values.

        Returns:
            Hidden states after the final norm [B·T, D], and the cache [L, B, K, T, H] or None.
        """
        cfg, (B, T) = self.cfg, tokens_BT.shape
        rope = rope_table(cfg.rope, cfg.H, positions_BT.reshape(B * T))

        def attend(q, k, v):
            q, k, v = (x.reshape(B, T, -1, cfg.H) for x in (q, k, v))
            out = attention(q, k, v, segment_ids_BT, scale=cfg.H**-0.5)
            return out.reshape(B * T, cfg.N, cfg.H), Cache(k.swapaxes(1, 2), v.swapaxes(1, 2)) if keep_cache else None

        def layer(h_MD, xs):
            block, factors = xs
            return block(h_MD, rope, factors, attend)

        if remat != "none":
            keep = (RESIDUALS,) if remat == "attention" else ()
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*keep))
        h_MD = self.embedding_VD[...][tokens_BT.reshape(B * T)]
        h_MD, cache = jax.lax.scan(layer, h_MD, (self.layers, (lora or {}).get("layers", {})))
        return self.final_norm(h_MD), cache

    def decode(
        self, tokens_S: jax.Array, positions_S: jax.Array, cache: Cache, lora: Mapping[str, Any] | None = None
    ) -> tuple[jax.Array, Cache]:
        """One token for each row of a cache: writes its key and value at `positions_S`, attends to all up to there.

        Args:
            tokens_S: int32 token ids.
            positions_S: int32 position of each token, below the cache's capacity C.
            cache: [L, S, K, C, H]; what lies beyond a row's position is ignored.
            lora: as in `forward`.

        Returns:
            Hidden states after the final norm [S, D] and the cache, updated in place when donated.
        """
        cfg, S = self.cfg, tokens_S.shape[0]
        C, G = cache.k.shape[3], cfg.N // cfg.K
        rope = rope_table(cfg.rope, cfg.H, positions_S)
        rows = jnp.arange(S)
        visible_SC = jnp.arange(C)[None] <= positions_S[:, None]

        def layer(carry, xs):
            h_SD, cache = carry
            block, factors, at = xs

            def attend(q_SNH, k_SKH, v_SKH):
                k, v = cache.k.at[at, rows, :, positions_S].set(k_SKH), cache.v.at[at, rows, :, positions_S].set(v_SKH)
                q_SKGH = q_SNH.reshape(S, cfg.K, G, cfg.H)
                scores = jnp.einsum("SKGH,SKCH->SKGC", q_SKGH, k[at], preferred_element_type=jnp.float32)
                scores = jnp.where(visible_SC[:, None, None], scores * cfg.H**-0.5, -jnp.inf)
                probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
                return jnp.einsum("SKGC,SKCH->SKGH", probs, v[at]).reshape(S, cfg.N, cfg.H), Cache(k, v)

            h_SD, cache = block(h_SD, rope, factors, attend)
            return (h_SD, cache), None

        h_SD = self.embedding_VD[...][tokens_S]
        xs = (self.layers, (lora or {}).get("layers", {}), jnp.arange(cfg.L))
        (h_SD, cache), _ = jax.lax.scan(layer, (h_SD, cache), xs)
        return self.final_norm(h_SD), cache


def unembedding(cfg: DecoderConfig, params: Params) -> jax.Array:
    """The matrix [V, D] that turns hidden states into logits."""
    return params["embed.embedding" if cfg.tied else "lm_head.kernel"]


def empty_cache(cfg: DecoderConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A zeroed cache for `rows` sequences of at most `capacity` tokens."""
    shape = (cfg.L, rows, cfg.K, capacity, cfg.H)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
