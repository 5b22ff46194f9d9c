"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): what is kept of a token is one short vector for all heads.

    c = norm(W_a x)          [C], the latent of keys and values
    k_n = (W_uk,n c, r)      r = rotated W_r x, which all heads share
    v_n = W_uv,n c

Over whole rows keys and values are written out. Over kept tokens only (c, r) is read: q_n · k_n = (W_uk,nᵀ q_n) · c + q_r · r,
so W_uk goes into the query, and W_uv is applied to the sum of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tinker_jax.kernels.heads import Heads
from tinker_jax.models.layers import Linear, RMSNorm, project
from tinker_jax.models.rope import Rope, rotate, softmax_factor
from tinker_jax.models.sizes import ADAPTER_RANK, Sizes
from tinker_jax.models.weights import Weight, linear, norm
from tinker_jax.sharding import parts

if TYPE_CHECKING:
    from tinker_jax.models.block import Tokens

_EPS = 1e-6  # of the norms of latents, whatever that of the layers is


@dataclass(frozen=True)
class LatentAttention:
    """See the top of this file.

    Attributes:
        D, N: width of the model, heads.
        C: width of the latent of keys and values.
        Q: width of the latent of queries; None: they have none.
        H: width of the part of a query and a key that is not rotated. The width of the rotated one is that of `rope`.
        V: width of a value.
        rope: of queries and of the keys' shared part.
    """

    D: int
    N: int
    C: int
    Q: int | None
    H: int
    V: int
    rope: Rope

    window = None
    sinks = False

    @property
    def same_input(self) -> tuple[tuple[str, ...], ...]:
        """Linears that read the same tokens."""
        return (("q_proj" if self.Q is None else "q_a_proj", "kv_a_proj"),)

    @property
    def heads(self) -> Heads:
        """Of attention over whole rows."""
        return Heads(self.N, self.N, self.H + self.rope.width, self.V)

    @property
    def cached(self) -> Heads:
        """Of attention over what is kept of earlier tokens: their latents, and the shared part of their keys."""
        return Heads(self.N, 1, self.C + self.rope.width, self.C, latent=True)

    def weights(self) -> list[Weight]:
        """Rows of the table, as a layer knows them."""
        D, N, attn, width = self.D, self.N, "self_attn", self.H + self.rope.width
        if self.Q is None:
            rows = linear("q_proj", f"{attn}.q_proj", (N * width, D), ("heads", "embed"), "attn")
        else:
            rows = linear("q_a_proj", f"{attn}.q_a_proj", (self.Q, D), (None, "embed"), "attn")
            rows.append(norm("q_a_norm", f"{attn}.q_a_layernorm", self.Q))
            rows += linear("q_b_proj", f"{attn}.q_b_proj", (N * width, self.Q), ("heads", None), "attn")
        kv = self.C + self.rope.width
        rows += linear("kv_a_proj", f"{attn}.kv_a_proj_with_mqa", (kv, D), (None, "embed"), "attn")
        rows.append(norm("kv_a_norm", f"{attn}.kv_a_layernorm", self.C))
        rows += linear("kv_b_proj", f"{attn}.kv_b_proj", (N * (self.H + self.V), self.C), ("heads", None), "attn")
        return rows + linear("o_proj", f"{attn}.o_proj", (D, N * self.V), ("embed", "heads"), "attn")

    def __call__(self, params: Mapping[str, jax.Array], x_MD: jax.Array, tokens: Tokens, lora: Mapping[str, Any]) -> jax.Array:
        """Its part of the layer, [M, D]."""
        M, N, H, C = x_MD.shape[0], self.N, self.H, self.C

        def linears(x_MD: jax.Array, *names: str) -> list[jax.Array]:
            layers = [Linear(params[f"{name}.kernel"]) for name in names]
            return project(x_MD, layers, [lora.get(name) for name in names], tokens.slots_MR)

        q, kv = linears(x_MD, *self.same_input[0])
        if self.Q is not None:
            (q,) = linears(RMSNorm(params["q_a_norm.scale"], _EPS)(q), "q_b_proj")
        q_MNH, turned_MNR = jnp.split(q.reshape(M, N, -1), [H], axis=-1)
        c_MC, shared_M1R = RMSNorm(params["kv_a_norm.scale"], _EPS)(kv[:, :C]), kv[:, None, C:]
        table, interleaved = tokens.ropes[self.rope], self.rope.interleaved
        turned_MNR, shared_M1R = (rotate(x, table, interleaved=interleaved) for x in (turned_MNR, shared_M1R))
        scale = softmax_factor(self.rope) * (H + self.rope.width) ** -0.5

        if not tokens.kept:
            (kv,) = linears(c_MC, "kv_b_proj")
            k_MNH, v_MNV = jnp.split(kv.reshape(M, N, -1), [H], axis=-1)
            k = jnp.concatenate([k_MNH, jnp.broadcast_to(shared_M1R, turned_MNR.shape)], axis=-1)
            out_MNV = tokens.attend(jnp.concatenate([q_MNH, turned_MNR], axis=-1), k, v_MNV, scale=scale)
        else:
            up = _Up(params["kv_b_proj.kernel"], lora.get("kv_b_proj"), tokens.slots_MR, N, H)
            q = jnp.concatenate([up.absorbed(q_MNH), turned_MNR], axis=-1)
            latent = jnp.concatenate([c_MC[:, None], shared_M1R], axis=-1)
            out_MNV = up.values(tokens.attend(q, latent, None, scale=scale))
        (out_MD,) = linears(out_MNV.reshape(M, N * self.V), "o_proj")
        return out_MD

    def sizes(self, mesh: Mapping[str, int]) -> Sizes:
        """Numbers that it holds of a token, on each device of such a mesh."""
        tensor = parts(mesh, "heads")
        q, kv, v = (-(-self.N * width // tensor) for width in (self.H + self.rope.width, self.H + self.V, self.V))
        latents = (self.Q or 0) + self.C + self.rope.width
        products = self.D + q + kv + latents + 5 * ADAPTER_RANK
        return Sizes(products, residuals=v, residuals_f32=self.N // tensor, working=3 * self.D + 12 * q + 6 * kv + 4 * latents)


class _Up:
    """W_uk and W_uv of all heads, an adapter's part included, applied on the other side of the softmax.

    Args:
        kernel: of `kv_b_proj`, [N · (H + V), C]: a head's keys, then its values.
        factors: of its adapter, `a` [C, R] and `b` [R, N · (H + V)], or None.
        slots_MR: as in `tinker_jax.lora.updates`.
        N: heads.
        H: width of a key.
    """

    def __init__(
        self, kernel: jax.Array, factors: Mapping[str, jax.Array] | None, slots_MR: jax.Array | None, N: int, H: int
    ) -> None:
        self._k_NHC, self._v_NVC = jnp.split(kernel.reshape(N, -1, kernel.shape[1]), [H], axis=1)
        self._factors, self._slots_MR = None, slots_MR
        if factors is not None:
            a_CR, b = (factors[name].astype(kernel.dtype) for name in ("a", "b"))
            self._factors = a_CR, *jnp.split(b.reshape(b.shape[0], N, -1), [H], axis=2)

    def absorbed(self, q_MNH: jax.Array) -> jax.Array:
        """Queries of latents, [M, N, C]."""
        out = jnp.einsum("MNH,NHC->MNC", q_MNH, self._k_NHC)
        if self._factors is not None:
            a_CR, b_RNH, _ = self._factors
            out = out + jnp.einsum("MNR,CR->MNC", self._own(jnp.einsum("MNH,RNH->MNR", q_MNH, b_RNH)), a_CR)
        return out

    def values(self, latent_MNC: jax.Array) -> jax.Array:
        """Values of sums of latents, [M, N, V]."""
        out = jnp.einsum("MNC,NVC->MNV", latent_MNC, self._v_NVC)
        if self._factors is not None:
            a_CR, _, b_RNV = self._factors
            out = out + jnp.einsum("MNR,RNV->MNV", self._own(jnp.einsum("MNC,CR->MNR", latent_MNC, a_CR)), b_RNV)
        return out

    def _own(self, z_MNR: jax.Array) -> jax.Array:
        return z_MNR if self._slots_MR is None else jnp.where(self._slots_MR[:, None], z_MNR, 0)
