"""Model configuration: Hugging Face `config.json` → the few numbers that shape a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinker_jax.types.errors import BadRequestError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `kind` is `"default"` or `"llama3"` (frequency-dependent scaling of Llama 3.1)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """A dense pre-norm decoder with grouped-query attention (Llama 3, Qwen2.5, Qwen3).

    Letters as in CONTRIBUTING.md: V vocabulary, D width, F feed-forward width, L layers, N query heads, K key/value heads,
    H head width.
    """

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


def _rope(cfg: Mapping[str, Any]) -> Rope:
    # transformers 5 writes rope_parameters; files of transformers 4 have rope_theta and rope_scaling.
    params = dict(cfg.get("rope_parameters") or cfg.get("rope_scaling") or {})
    kind = params.get("rope_type", params.get("type", "default"))
    theta = float(params.get("rope_theta", cfg.get("rope_theta", 10000.0)))
    if (part := params.get("partial_rotary_factor", cfg.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedError(f"config.json: partial_rotary_factor={part} is not supported; only 1.0 is.")
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        try:
            rope = Rope(
                theta,
                kind="llama3",
                factor=float(params["factor"]),
                low_freq_factor=float(params["low_freq_factor"]),
                high_freq_factor=float(params["high_freq_factor"]),
                original_max_position=int(params["original_max_position_embeddings"]),
            )
        except KeyError as missing:
            raise BadRequestError(f"config.json: llama3 rope scaling lacks {missing}.") from None
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise BadRequestError(
                f"config.json: high_freq_factor={rope.high_freq_factor} must be above low_freq_factor={rope.low_freq_factor}."
            )
        return rope
    raise UnsupportedError(
        f"config.json: rope scaling {kind!r} is not supported; supported are 'default' and 'llama3'. "
        "Remove it from config.json if your sequences stay within the original context."
    )


def _dense(cfg: Mapping[str, Any], *, qkv_bias: bool, qk_norm: bool, head_dim: int | None = None) -> DecoderConfig:
    model_type = cfg["model_type"]

    def require(key: str, supported: Any, default: Any) -> None:
        value = cfg.get(key, default)
        if value != supported:
            raise UnsupportedError(f"config.json: {key}={value!r} is not supported for {model_type}; only {supported!r} is.")

    def need(key: str) -> int:
        if cfg.get(key) is None:
            raise BadRequestError(f"config.json: {key} is missing; a {model_type} model needs it.")
        return int(cfg[key])

    require("hidden_act", "silu", "silu")
    require("mlp_bias", False, False)
    require("use_sliding_window", False, False)
    require("pretraining_tp", 1, 1)
    if model_type != "qwen2":
        require("attention_bias", False, False)
    if "quantization_config" in cfg:
        raise UnsupportedError("config.json: quantised checkpoints are not supported; use the bf16 checkpoint.")
    width, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads = int(cfg.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise BadRequestError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}.")
    head_dim = int(cfg.get("head_dim") or head_dim or width // heads)
    if head_dim % 2:
        raise UnsupportedError(f"config.json: head_dim={head_dim} is odd; rotary embedding needs an even width.")
    return DecoderConfig(
        model_type=model_type,
        V=need("vocab_size"),
        D=width,
        F=need("intermediate_size"),
        L=need("num_hidden_layers"),
        N=heads,
        K=kv_heads,
        H=head_dim,
        rope=_rope(cfg),
        norm_eps=float(cfg.get("rms_norm_eps", 1e-6)),
        tied=bool(cfg.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        context_length=int(cfg.get("max_position_embeddings", 2048)),
    )


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], DecoderConfig]] = {
    "llama": lambda cfg: _dense(cfg, qkv_bias=False, qk_norm=False),
    "qwen2": lambda cfg: _dense(cfg, qkv_bias=True, qk_norm=False),
    "qwen3": lambda cfg: _dense(cfg, qkv_bias=False, qk_norm=True, head_dim=128),
}


def parse(cfg: Mapping[str, Any]) -> DecoderConfig:
    """The configuration that a `config.json` describes.

    Raises:
        UnsupportedError: a `model_type` or a value that no family here implements.
        BadRequestError: a value that is missing or impossible.
    """
    model_type = str(cfg.get("model_type"))
    if model_type not in _FAMILIES:
        raise UnsupportedError(f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(_FAMILIES)}.")
    return _FAMILIES[model_type](cfg)
