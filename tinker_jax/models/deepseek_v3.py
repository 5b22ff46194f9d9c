"""DeepSeek-V3 and Kimi-K2: latent attention, a few dense layers, then experts with one that every token goes to.

The router takes sigmoids; a bias that training never sees steers the choice, which may be limited to groups of experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from tinker_jax.models.block import Block, Group, group_layers
from tinker_jax.models.config import FileNames, Reader
from tinker_jax.models.experts import Experts, Layout
from tinker_jax.models.latent_attention import LatentAttention
from tinker_jax.models.mlp import GatedMLP
from tinker_jax.models.rope import Rope, parse_rope
from tinker_jax.models.routers import grouped_sigmoid_top_k
from tinker_jax.models.weights import Weight
from tinker_jax.types.errors import BadRequestError, UnsupportedError

LAYOUT = Layout("mlp.experts.{expert}.{name}.weight", "mlp.experts")


@dataclass(frozen=True)
class SigmoidRouter:
    """See `tinker_jax.models.routers.grouped_sigmoid_top_k`."""

    k: int
    groups: int
    top_groups: int
    renormalise: bool
    factor: float

    def weights(self, D: int, E: int) -> list[Weight]:
        return [
            Weight("router.kernel", "mlp.gate.weight", (E, D), (None, None)),
            Weight("router.choice_bias", "mlp.gate.e_score_correction_bias", (E,), (None,), exact=True),
        ]

    def __call__(self, params: Mapping[str, jax.Array], logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
        return grouped_sigmoid_top_k(
            logits_ME,
            params["router.choice_bias"],
            self.k,
            groups=self.groups,
            top_groups=self.top_groups,
            renormalise=self.renormalise,
            factor=self.factor,
        )


@dataclass(frozen=True)
class DeepseekV3Config:
    """Letters as in CONTRIBUTING.md: V vocabulary, D width, L layers, E experts.

    Attributes:
        F, F_expert, F_shared: feed-forward width of a dense layer, of an expert, of the expert of all tokens (0: none).
        dense: number of dense layers, which come first.
        predictors: further layers in files, which predict tokens beyond the next and have no place in the model.
        attn: of every layer.
        router: of every layer with experts.
    """

    model_type: str
    V: int
    D: int
    F: int
    F_expert: int
    F_shared: int
    L: int
    E: int
    dense: int
    predictors: int
    attn: LatentAttention
    router: SigmoidRouter
    norm_eps: float
    tied: bool
    context_length: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """The dense layers, and those with experts."""
        return _groups(self)

    @property
    def rope(self) -> Rope:
        return self.attn.rope

    @property
    def file_names(self) -> FileNames:
        """Layers beyond the last are those of multi-token prediction."""
        return FileNames(unused=tuple(f"model.layers.{self.L + i}." for i in range(self.predictors)))


@functools.cache
def _groups(cfg: DeepseekV3Config) -> tuple[Group, ...]:
    shared = GatedMLP(cfg.D, cfg.F_shared, "shared_", "mlp.shared_experts") if cfg.F_shared else None
    experts = Experts(cfg.D, cfg.F_expert, cfg.E, cfg.router, LAYOUT, shared=shared)
    mlps = [GatedMLP(cfg.D, cfg.F)] * cfg.dense + [experts] * (cfg.L - cfg.dense)
    return group_layers([Block(cfg.D, cfg.norm_eps, cfg.attn, mlp) for mlp in mlps])


def parse(cfg: Mapping[str, Any]) -> DeepseekV3Config:
    """See `tinker_jax.models.registry.parse`."""
    read = Reader(cfg)
    read.require("hidden_act", "silu", "silu")
    read.require("attention_bias", False, False)
    read.require("pretraining_tp", 1, 1)
    read.require("moe_layer_freq", 1, 1)
    read.require("scoring_func", "sigmoid", "sigmoid")
    read.require("topk_method", "noaux_tc", "noaux_tc")
    D, N, L = read.need("hidden_size"), read.need("num_attention_heads"), read.layers
    E, k = read.experts("n_routed_experts", "num_local_experts")
    turning = read.need("qk_rope_head_dim")
    if turning % 2:
        raise UnsupportedError(f"config.json: qk_rope_head_dim={turning} is odd; rotary embedding needs an even width.")
    rope = parse_rope(cfg, turning, interleaved=read.flag("rope_interleave", True))
    width = read.need("moe_intermediate_size")
    dense = read.need("first_k_dense_replace", L, least=0)
    return DeepseekV3Config(
        model_type=read.model_type,
        V=read.need("vocab_size"),
        D=D,
        F=read.need("intermediate_size"),
        F_expert=width,
        F_shared=width * read.count("n_shared_experts"),
        L=L,
        E=E,
        predictors=read.predictors,
        dense=dense,
        attn=LatentAttention(
            D,
            N,
            read.need("kv_lora_rank"),
            read.maybe("q_lora_rank"),
            read.need("qk_nope_head_dim"),
            read.need("v_head_dim"),
            rope,
        ),
        router=_router(read, E, k),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        tied=read.flag("tie_word_embeddings", False),
        context_length=read.context_length,
    )


def _router(read: Reader, E: int, k: int) -> SigmoidRouter:
    groups, top_groups = read.maybe("n_group") or 1, read.maybe("topk_group") or 1
    if E % groups or top_groups > groups or (top_groups < groups and E // groups < 2):
        raise BadRequestError(
            f"config.json: n_group={groups} and topk_group={top_groups} do not divide {E} experts into groups of at least two, "
            "of which no more are chosen than there are."
        )
    if k > (most := top_groups * (E // groups)):
        raise BadRequestError(f"config.json: num_experts_per_tok={k} is above the {most} experts of topk_group={top_groups}.")
    return SigmoidRouter(k, groups, top_groups, read.flag("norm_topk_prob", True), read.number("routed_scaling_factor", 1.0))
