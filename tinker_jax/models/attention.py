"""Grouped-query attention, with the options of the families that use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from tinker_jax.kernels.heads import Heads
from tinker_jax.models.layers import Linear, RMSNorm, project
from tinker_jax.models.rope import Rope, rotate
from tinker_jax.models.sizes import ADAPTER_RANK, Sizes
from tinker_jax.models.weights import Weight, linear, norm
from tinker_jax.sharding import parts

if TYPE_CHECKING:
    from tinker_jax.models.block import Tokens


@dataclass(frozen=True)
class Attention:
    """q, k, v of normed hidden states, rotated, softmax(q kᵀ / √H) v, output.

    Attributes:
        D, N, K, H: width of the model, query heads, key/value heads, width of a head.
        rope: of queries and keys.
        eps: of the norms of heads.
        qkv_bias, o_bias: do the linears have biases?
        qk_norm: is every query and key head normed?
        window: a token at position p sees positions p - window + 1 to p alone; None: everything before it.
        sinks: has every query head a logit that takes its share of the softmax and has no value?
    """

    D: int
    N: int
    K: int
    H: int
    rope: Rope
    eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    sinks: bool = False

    #: Linears that read the same tokens.
    same_input = (("q_proj", "k_proj", "v_proj"),)

    @property
    def heads(self) -> Heads:
        """Of attention over whole rows."""
        return Heads(self.N, self.K, self.H)

    @property
    def cached(self) -> Heads:
        """Of attention over what is kept of earlier tokens."""
        return self.heads

    def weights(self) -> list[Weight]:
        """Rows of the table, as a layer knows them."""
        D, q, kv = self.D, self.N * self.H, self.K * self.H
        rows = linear("q_proj", "self_attn.q_proj", (q, D), ("heads", "embed"), "attn", self.qkv_bias)
        rows += linear("k_proj", "self_attn.k_proj", (kv, D), ("kv_heads", "embed"), "attn", self.qkv_bias)
        rows += linear("v_proj", "self_attn.v_proj", (kv, D), ("kv_heads", "embed"), "attn", self.qkv_bias)
        if self.qk_norm:
            rows += [norm("q_norm", "self_attn.q_norm", self.H), norm("k_norm", "self_attn.k_norm", self.H)]
        if self.sinks:
            rows.append(Weight("sinks.logits", "self_attn.sinks", (self.N,), ("heads",)))
        return rows + linear("o_proj", "self_attn.o_proj", (D, q), ("embed", "heads"), "attn", self.o_bias)

    def __call__(self, params: Mapping[str, jax.Array], x_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]) -> jax.Array:
        """Its part of the layer, [M, D]."""
        M = x_MD.shape[0]

        def linears(x_MD: jax.Array, *names: str) -> list[jax.Array]:
            layers = [Linear(params[f"{name}.kernel"], params.get(f"{name}.bias")) for name in names]
            return project(x_MD, layers, [lora.get(name) for name in names], tokens.slots_MR)

        q, k, v = linears(x_MD, *self.same_input[0])
        q_MNH, k_MKH, v_MKH = q.reshape(M, self.N, self.H), k.reshape(M, self.K, self.H), v.reshape(M, self.K, self.H)
        if self.qk_norm:
            q_MNH = RMSNorm(params["q_norm.scale"], self.eps)(q_MNH)
            k_MKH = RMSNorm(params["k_norm.scale"], self.eps)(k_MKH)
        table, sinks_N = tokens.ropes[self.rope], params["sinks.logits"] if self.sinks else None
        q_MNH, k_MKH = rotate(q_MNH, table), rotate(k_MKH, table)
        out_MNH = tokens.attend(q_MNH, k_MKH, v_MKH, scale=self.H**-0.5, window=self.window, sinks_N=sinks_N)
        (out_MD,) = linears(out_MNH.reshape(M, self.N * self.H), "o_proj")
        return out_MD

    def sizes(self, mesh: Mapping[str, int]) -> Sizes:
        """Numbers that it holds of a token, on each device of such a mesh."""
        tensor = parts(mesh, "heads")
        q, kv = -(-self.N * self.H // tensor), -(-self.K * self.H // tensor)
        products = self.D + q + 2 * kv + 4 * ADAPTER_RANK
        return Sizes(products, residuals=q, residuals_f32=self.N // tensor, working=3 * self.D + 4 * q + 2 * kv)
