"""The published dense Qwen3 shapes, with random bfloat16 weights made on the device: what benchmarks of accelerators run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinker_jax.models.dense import DenseConfig
from tinker_jax.models.rope import Rope


def qwen3(D: int, L: int, N: int, F: int, *, tied: bool) -> DenseConfig:
    """A dense Qwen3 of the published family."""
    return DenseConfig("qwen3", 151_936, D, F, L, N, 8, 128, Rope(128, 1e6), 1e-6, tied, False, True, 40_960)


MODELS = {
    "8B": qwen3(4096, 36, 32, 12_288, tied=False),
    "0.6B": qwen3(1024, 28, 16, 3072, tied=True),
    "4B": qwen3(2560, 36, 32, 9728, tied=True),
    "1.7B": qwen3(2048, 28, 16, 6144, tied=True),
}
SMOKE_MODEL = replace(MODELS["0.6B"], V=512, D=64, F=96, L=2, N=4, K=2, H=16, rope=Rope(16, 1e6))


def random_weights(cfg: DenseConfig, mesh: Any) -> dict[str, Any]:
    """bfloat16 weights where an engine wants them: norms of one, the rest normal with deviation 0.02."""
    import jax
    import jax.numpy as jnp

    from tinker_jax import sharding
    from tinker_jax.models.weights import weights

    def make(weight: Any, seed: int) -> jax.Array:
        def draw() -> jax.Array:
            if weight.name.endswith("scale"):
                return jnp.ones(weight.full_shape, jnp.bfloat16)
            return 0.02 * jax.random.normal(jax.random.key(seed), weight.full_shape, jnp.bfloat16)

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
