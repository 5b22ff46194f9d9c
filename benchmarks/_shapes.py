"""Published shapes with random bfloat16 weights made on the device: what benchmarks of accelerators run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tinker_jax.models.config import ModelConfig
from tinker_jax.models.dense import DenseConfig
from tinker_jax.models.experts import Experts
from tinker_jax.models.gpt_oss import ClampedSwiglu, GptOssConfig
from tinker_jax.models.qwen3_moe import Qwen3MoeConfig
from tinker_jax.models.rope import Rope, Yarn
from tinker_jax.models.weights import Weight, weights


def qwen3(D: int, L: int, N: int, F: int, *, tied: bool) -> DenseConfig:
    """A dense Qwen3 of the published family."""
    return DenseConfig("qwen3", 151_936, D, F, L, N, 8, 128, Rope(128, 1e6), 1e-6, tied, False, True, 40_960)


QWEN3_30B_A3B = Qwen3MoeConfig(
    model_type="qwen3_moe",
    V=151_936,
    D=2048,
    F=6144,
    F_expert=768,
    L=48,
    N=32,
    K=4,
    H=128,
    E=128,
    k=8,
    renormalise=True,
    sparse=tuple(range(48)),
    rope=Rope(128, 1e6),
    norm_eps=1e-6,
    tied=False,
    context_length=40_960,
)
GPT_OSS_20B = GptOssConfig(
    model_type="gpt_oss",
    V=201_088,
    D=2880,
    F=2880,
    L=24,
    N=64,
    K=8,
    H=64,
    E=32,
    k=4,
    windows=(128, None) * 12,
    act=ClampedSwiglu(1.702, 7.0),
    rope=Rope(64, 150_000.0, Yarn(32.0, 4096, truncate=False)),
    norm_eps=1e-5,
    tied=False,
    context_length=131_072,
)
DENSE = {
    "8B": qwen3(4096, 36, 32, 12_288, tied=False),
    "0.6B": qwen3(1024, 28, 16, 3072, tied=True),
    "4B": qwen3(2560, 36, 32, 9728, tied=True),
    "1.7B": qwen3(2048, 28, 16, 6144, tied=True),
}
MODELS: dict[str, ModelConfig] = {**DENSE, "30B-A3B": QWEN3_30B_A3B, "gpt-oss-20B": GPT_OSS_20B}
SMOKE_MODEL = replace(DENSE["0.6B"], V=512, D=64, F=96, L=2, N=4, K=2, H=16, rope=Rope(16, 1e6))
_SMOKE_MOE = {"V": 512, "D": 64, "L": 2, "N": 4, "K": 2, "H": 16, "rope": Rope(16, 1e6), "E": 8, "k": 2}
SMOKE: dict[str, ModelConfig] = {
    **dict.fromkeys(DENSE, SMOKE_MODEL),
    "30B-A3B": replace(QWEN3_30B_A3B, F=96, F_expert=32, sparse=(0, 1), **_SMOKE_MOE),
    "gpt-oss-20B": replace(GPT_OSS_20B, F=32, windows=(8, None), **_SMOKE_MOE),
}
"""The same families at toy size."""


def chosen(cfg: ModelConfig) -> float:
    """Share of the experts that a token goes to; 1: the model has none."""
    experts = {mlp for group in cfg.groups for stack in group if isinstance(mlp := stack.block.mlp, Experts)}
    [share] = {mlp.router.k / mlp.E for mlp in experts} or {1.0}
    return share


def parameters(table: Iterable[Weight], share: float) -> float:
    """Number of parameters, of experts only this share."""
    return sum(math.prod(w.full_shape) * (share if w.experts else 1) for w in table)


def random_weights(cfg: ModelConfig, mesh: Any) -> dict[str, Any]:
    """bfloat16 weights where an engine wants them: norms of one, the rest normal with deviation 0.02.

    Layers are drawn one after the other into their stack, so that beside the weights there is room for a layer at most.
    """
    import jax
    import jax.numpy as jnp

    from tinker_jax import sharding

    def make(weight: Weight, seed: int) -> jax.Array:
        def layer(key: jax.Array) -> jax.Array:
            return 0.02 * jax.random.normal(key, weight.shape, jnp.bfloat16)

        def draw() -> jax.Array:
            if weight.name.endswith("scale"):
                return jnp.ones(weight.full_shape, jnp.bfloat16)
            key = jax.random.key(seed)
            return jax.lax.map(layer, jax.random.split(key, weight.stacked)) if weight.stacked else layer(key)

        return jax.jit(draw, out_shardings=sharding.named(mesh, weight.full_axes))()

    return {weight.name: make(weight, seed) for seed, weight in enumerate(weights(cfg))}


def torch_model(cfg: DenseConfig, device: str) -> Any:
    """The same shape in transformers, with weights of its own."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=cfg.V,
        hidden_size=cfg.D,
        intermediate_size=cfg.F,
        num_hidden_layers=cfg.L,
        num_attention_heads=cfg.N,
        num_key_value_heads=cfg.K,
        head_dim=cfg.H,
        max_position_embeddings=cfg.context_length,
        tie_word_embeddings=cfg.tied,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope.theta},
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
