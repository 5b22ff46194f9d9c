"""Dense decoders: Llama 3, Qwen2.5, Qwen3.

Pre-norm layers of grouped-query attention and a gated MLP. The families differ in three places only: Llama 3.1 scales its
rotary frequencies, Qwen2.5 has biases on q, k and v, Qwen3 normalises every query and key head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinker_jax.models.attention import Attention
from tinker_jax.models.block import Block, Group, group_layers
from tinker_jax.models.config import FileNames, Reader
from tinker_jax.models.mlp import GatedMLP
from tinker_jax.models.rope import Rope, parse_rope


@dataclass(frozen=True)
class DenseConfig:
    """Letters as in CONTRIBUTING.md: V vocabulary, D width, F feed-forward width, L layers, N query heads, K key/value heads,
    H head width; the rest as in `tinker_jax.models.config.ModelConfig`."""

    model_type: str
    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    rope: Rope
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    context_length: int

    file_names = FileNames()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The layers, all of one kind."""
        return _groups(self)


@functools.cache
def _groups(cfg: DenseConfig) -> tuple[Group, ...]:
    attn = Attention(cfg.D, cfg.N, cfg.K, cfg.H, cfg.rope, cfg.norm_eps, cfg.qkv_bias, qk_norm=cfg.qk_norm)
    return group_layers([Block(cfg.D, cfg.norm_eps, attn, GatedMLP(cfg.D, cfg.F))] * cfg.L)


def parse(cfg: Mapping[str, Any]) -> DenseConfig:
    """See `tinker_jax.models.registry.parse`."""
    read = Reader(cfg)
    read.require("hidden_act", "silu", "silu")
    read.require("mlp_bias", False, False)
    read.require("use_sliding_window", False, False)
    read.require("pretraining_tp", 1, 1)
    if read.model_type != "qwen2":
        read.require("attention_bias", False, False)
    D, (N, K) = read.need("hidden_size"), read.heads()
    H = read.head_dim(128 if read.model_type == "qwen3" else None)
    return DenseConfig(
        model_type=read.model_type,
        V=read.need("vocab_size"),
        D=D,
        F=read.need("intermediate_size"),
        L=read.layers,
        N=N,
        K=K,
        H=H,
        rope=parse_rope(cfg, H),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        tied=read.flag("tie_word_embeddings", False),
        qkv_bias=read.model_type == "qwen2",
        qk_norm=read.model_type == "qwen3",
        context_length=read.context_length,
    )
