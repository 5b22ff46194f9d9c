"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in most or all layers.

The router takes the softmax over all experts, keeps the best of it, and divides them by their sum where `norm_topk_prob` says
so. A layer is dense when `mlp_only_layers` names it or `decoder_sparse_step` passes it over.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from tinker_jax.models.attention import Attention
from tinker_jax.models.block import Block, Group, group_layers
from tinker_jax.models.config import FileNames, Reader
from tinker_jax.models.experts import Experts, Layout
from tinker_jax.models.mlp import GatedMLP
from tinker_jax.models.rope import Rope, parse_rope
from tinker_jax.models.routers import softmax_top_k
from tinker_jax.models.weights import Weight

LAYOUT = Layout("mlp.experts.{expert}.{name}.weight", "mlp.experts")


@dataclass(frozen=True)
class SoftmaxRouter:
    """See `tinker_jax.models.routers.softmax_top_k`."""

    k: int
    renormalise: bool

    def weights(self, D: int, E: int) -> list[Weight]:
        return [Weight("router.kernel", "mlp.gate.weight", (E, D), (None, None))]

    def __call__(self, params: Mapping[str, jax.Array], logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
        return softmax_top_k(logits_ME, self.k, renormalise=self.renormalise)


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Letters as in CONTRIBUTING.md: V vocabulary, D width, L layers, N query heads, K key/value heads, H head width,
    E experts.

    Attributes:
        F, F_expert: feed-forward width of a dense layer and of an expert.
        k: experts of a token.
        renormalise: weights of a token's experts sum to one.
        sparse: layers with experts.
    """

    model_type: str
    V: int
    D: int
    F: int
    F_expert: int
    L: int
    N: int
    K: int
    H: int
    E: int
    k: int
    renormalise: bool
    sparse: tuple[int, ...]
    rope: Rope
    norm_eps: float
    tied: bool
    context_length: int

    file_names = FileNames()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The layers, dense ones and those with experts."""
        return _groups(self)


@functools.cache
def _groups(cfg: Qwen3MoeConfig) -> tuple[Group, ...]:
    attn = Attention(cfg.D, cfg.N, cfg.K, cfg.H, cfg.rope, cfg.norm_eps, qk_norm=True)
    experts = Experts(cfg.D, cfg.F_expert, cfg.E, SoftmaxRouter(cfg.k, cfg.renormalise), LAYOUT)
    dense = GatedMLP(cfg.D, cfg.F)
    return group_layers([Block(cfg.D, cfg.norm_eps, attn, experts if layer in cfg.sparse else dense) for layer in range(cfg.L)])


def parse(cfg: Mapping[str, Any]) -> Qwen3MoeConfig:
    """See `tinker_jax.models.registry.parse`."""
    read = Reader(cfg)
    read.require("hidden_act", "silu", "silu")
    read.require("use_sliding_window", False, False)
    read.require("attention_bias", False, False)
    D, (N, K), H, L = read.need("hidden_size"), read.heads(), read.head_dim(), read.layers
    E, k = read.experts()
    step, dense = read.maybe("decoder_sparse_step") or 1, read.numbers("mlp_only_layers")
    return Qwen3MoeConfig(
        model_type=read.model_type,
        V=read.need("vocab_size"),
        D=D,
        F=read.need("intermediate_size"),
        F_expert=read.need("moe_intermediate_size"),
        L=L,
        N=N,
        K=K,
        H=H,
        E=E,
        k=k,
        renormalise=read.flag("norm_topk_prob", False),
        sparse=tuple(layer for layer in range(L) if layer not in dense and (layer + 1) % step == 0),
        rope=parse_rope(cfg, H),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        tied=read.flag("tie_word_embeddings", False),
        context_length=read.context_length,
    )
