"""gpt-oss: attention with sinks, every other layer within a sliding window, and experts with biases in every layer.

The router keeps the largest logits and takes the softmax over those. Gate and up are clamped, and up is shifted by one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tinker_jax.models.attention import Attention
from tinker_jax.models.block import Block, Group, group_layers
from tinker_jax.models.config import FileNames, Reader
from tinker_jax.models.experts import Experts, Layout
from tinker_jax.models.rope import Rope, parse_rope
from tinker_jax.models.routers import top_k_softmax
from tinker_jax.models.weights import Weight
from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, UnsupportedError

LAYOUT = Layout(None, "mlp.experts", transposed=True, interleaved=True)
_KINDS = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class TopKRouter:
    """See `tinker_jax.models.routers.top_k_softmax`."""

    k: int

    def weights(self, D: int, E: int) -> list[Weight]:
        return [
            Weight("router.kernel", "mlp.router.weight", (E, D), (None, None)),
            Weight("router.bias", "mlp.router.bias", (E,), (None,)),
        ]

    def __call__(self, params: Mapping[str, jax.Array], logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
        return top_k_softmax(logits_ME + params["router.bias"].astype(jnp.float32)[None], self.k)


@dataclass(frozen=True)
class ClampedSwiglu:
    """(up + 1) · gate · sigmoid(alpha · gate), gate at most `limit`, up within ±`limit`."""

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


@dataclass(frozen=True)
class GptOssConfig:
    """Letters as in CONTRIBUTING.md: V vocabulary, D width, F feed-forward width of an expert, L layers, N query heads, K
    key/value heads, H head width, E experts.

    Attributes:
        k: experts of a token.
        windows: of each layer, as in `tinker_jax.models.attention.Attention`.
        act: of the experts.
    """

    model_type: str
    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    E: int
    k: int
    windows: tuple[int | None, ...]
    act: ClampedSwiglu
    rope: Rope
    norm_eps: float
    tied: bool
    context_length: int

    file_names = FileNames(tinker=((".self_attn.", ".attn."),))

    @property
    def groups(self) -> tuple[Group, ...]:
        """The layers: one with a window and one without, again and again."""
        return _groups(self)


@functools.cache
def _groups(cfg: GptOssConfig) -> tuple[Group, ...]:
    experts = Experts(cfg.D, cfg.F, cfg.E, TopKRouter(cfg.k), LAYOUT, cfg.act, biases=True)
    heads, biases = (cfg.D, cfg.N, cfg.K, cfg.H, cfg.rope, cfg.norm_eps), {"qkv_bias": True, "o_bias": True}
    blocks = []
    for window in cfg.windows:
        attn = Attention(*heads, **biases, window=window, sinks=True)
        blocks.append(Block(cfg.D, cfg.norm_eps, attn, experts))
    return group_layers(blocks)


def parse(cfg: Mapping[str, Any]) -> GptOssConfig:
    """See `tinker_jax.models.registry.parse`."""
    read = Reader(cfg)
    read.require("hidden_act", "silu", "silu")
    read.require("attention_bias", True, True)
    (N, K), H, L = read.heads(), read.head_dim(64), read.layers
    E, k = read.experts("num_local_experts", "num_experts")
    return GptOssConfig(
        model_type=read.model_type,
        V=read.need("vocab_size"),
        D=read.need("hidden_size"),
        F=read.need("intermediate_size"),
        L=L,
        N=N,
        K=K,
        H=H,
        E=E,
        k=k,
        windows=_windows(read, L),
        act=ClampedSwiglu(read.number("swiglu_alpha", 1.702), read.number("swiglu_limit", 7.0)),
        rope=parse_rope({"rope_theta": 150_000.0, **cfg}, H),
        norm_eps=read.number("rms_norm_eps", 1e-5),
        tied=read.flag("tie_word_embeddings", False),
        context_length=read.context_length,
    )


def _windows(read: Reader, L: int) -> tuple[int | None, ...]:
    window, kinds = read.need("sliding_window"), read.cfg.get("layer_types")
    if kinds is None:  # as transformers
        kinds = [_KINDS[layer % 2] for layer in range(L)]
    if not _check.is_list(kinds) or len(kinds) != L:
        raise BadRequestError(f"config.json: layer_types: expected a list of num_hidden_layers={L} names, got {brief(kinds)}.")
    for kind in kinds:
        if kind not in _KINDS:
            raise UnsupportedError(
                f"config.json: layer_types: {brief(kind)} is not supported; supported are {', '.join(_KINDS)}."
            )
    return tuple(window if kind == _KINDS[0] else None for kind in kinds)
