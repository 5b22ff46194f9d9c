"""The table that names every weight: our place, the Hugging Face name, shape, meaning of each axis, LoRA group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tinker_jax.models.config import DecoderConfig

LoraGroup = Literal["attn", "mlp", "unembed"]


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    Attributes:
        name: key in the flat parameter dict, e.g. `"layers.q_proj.kernel"`.
        hf: Hugging Face name; `{layer}` stands for the layer's number when `stacked`.
        shape: shape in our layout, without the leading layer axis.
        axes: logical axis of each dimension of `shape` (see `tinker_jax.sharding.RULES`).
        stacked: number of layers stacked on a leading axis, 0 for a weight outside the layers.
        lora: group that trains an adapter on it, or None.
    """

    name: str
    hf: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stacked: int = 0
    lora: LoraGroup | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape in the parameter dict, layer axis included."""
        return (self.stacked, *self.shape) if self.stacked else self.shape

    @property
    def full_axes(self) -> tuple[str | None, ...]:
        """Logical axes in the parameter dict; the layer axis is never cut."""
        return (None, *self.axes) if self.stacked else self.axes

    @property
    def module(self) -> str:
        """Name of the module it belongs to, e.g. `"q_proj"`, `"lm_head"`."""
        return self.name.split(".")[-2]


def weights(cfg: DecoderConfig) -> tuple[Weight, ...]:
    """Every weight of a dense decoder, in the order of its forward pass."""
    table = [Weight("embed.embedding", "model.embed_tokens.weight", (cfg.V, cfg.D), ("vocab", "embed"))]

    def norm(name: str, hf: str, width: int) -> None:
        table.append(Weight(f"layers.{name}.scale", f"model.layers.{{layer}}.{hf}.weight", (width,), (None,), stacked=cfg.L))

    def linear(module: str, hf: str, shape: tuple[int, int], axes: tuple[str, str], lora: LoraGroup, bias: bool) -> None:
        prefix = f"model.layers.{{layer}}.{hf}.{module}"
        table.append(Weight(f"layers.{module}.kernel", f"{prefix}.weight", shape, axes, stacked=cfg.L, lora=lora))
        if bias:
            table.append(Weight(f"layers.{module}.bias", f"{prefix}.bias", shape[:1], axes[:1], stacked=cfg.L))

    q, kv = cfg.N * cfg.H, cfg.K * cfg.H
    norm("attn_norm", "input_layernorm", cfg.D)
    linear("q_proj", "self_attn", (q, cfg.D), ("heads", "embed"), "attn", cfg.qkv_bias)
    linear("k_proj", "self_attn", (kv, cfg.D), ("kv_heads", "embed"), "attn", cfg.qkv_bias)
    linear("v_proj", "self_attn", (kv, cfg.D), ("kv_heads", "embed"), "attn", cfg.qkv_bias)
    if cfg.qk_norm:
        norm("q_norm", "self_attn.q_norm", cfg.H)
        norm("k_norm", "self_attn.k_norm", cfg.H)
    linear("o_proj", "self_attn", (cfg.D, q), ("embed", "heads"), "attn", False)
    norm("mlp_norm", "post_attention_layernorm", cfg.D)
    linear("gate_proj", "mlp", (cfg.F, cfg.D), ("mlp", "embed"), "mlp", False)
    linear("up_proj", "mlp", (cfg.F, cfg.D), ("mlp", "embed"), "mlp", False)
    linear("down_proj", "mlp", (cfg.D, cfg.F), ("embed", "mlp"), "mlp", False)
    table.append(Weight("final_norm.scale", "model.norm.weight", (cfg.D,), (None,)))
    if not cfg.tied:
        table.append(Weight("lm_head.kernel", "lm_head.weight", (cfg.V, cfg.D), ("vocab", "embed"), lora="unembed"))
    return tuple(table)


@dataclass(frozen=True)
class LoraTarget:
    """A linear that an adapter can train: `y = x Wᵀ + scale · (x a) b`, `a` [D_in, R], `b` [R, D_out]."""

    module: str
    group: LoraGroup
    fan_in: int
    fan_out: int
    axes: tuple[str | None, str | None]
    stacked: int


def lora_targets(cfg: DecoderConfig) -> tuple[LoraTarget, ...]:
    """Linears with a LoRA group; the unembedding is one even when it shares the embedding's matrix."""
    targets = [
        LoraTarget(w.module, w.lora, w.shape[1], w.shape[0], (w.axes[1], w.axes[0]), w.stacked)
        for w in weights(cfg)
        if w.lora in ("attn", "mlp")
    ]
    targets.append(LoraTarget("lm_head", "unembed", cfg.D, cfg.V, ("embed", "vocab"), 0))
    return tuple(targets)
