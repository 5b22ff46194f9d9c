"""Model configuration: Hugging Face `config.json` → the few numbers that shape a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinker_jax.types import _check
from tinker_jax.types._show import brief
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


#: Indices are int32. Names are made for each layer, and tables for each page of a context, before a file could disagree.
_MOST = 2**31 - 1
_MOST_LAYERS = 10_000
_MOST_CONTEXT = 2**27


def _size(cfg: Mapping[str, Any], key: str, most: int = _MOST) -> int:
    return _check.integer(cfg[key], f"config.json: {key}", minimum=1, maximum=most)


def _number(cfg: Mapping[str, Any], key: str) -> float:
    return _check.real(cfg[key], f"config.json: {key}", above=0)


def _rope(cfg: Mapping[str, Any]) -> Rope:
    # transformers 5 writes rope_parameters; files of transformers 4 have rope_theta and rope_scaling.
    params: Mapping[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = cfg.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise _check.refuse(f"config.json: {key}", "an object or null", value)
        params = params or value or {}
    kind = params.get("rope_type", params.get("type", "default"))
    theta = _number({"rope_theta": 10000.0, **cfg, **params}, "rope_theta")
    if (part := params.get("partial_rotary_factor", cfg.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedError(f"config.json: partial_rotary_factor={brief(part)} is not supported; only 1.0 is.")
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        try:
            rope = Rope(
                theta,
                kind="llama3",
                factor=_number(params, "factor"),
                low_freq_factor=_number(params, "low_freq_factor"),
                high_freq_factor=_number(params, "high_freq_factor"),
                original_max_position=_size(params, "original_max_position_embeddings"),
            )
        except KeyError as missing:
            raise BadRequestError(f"config.json: llama3 rope scaling lacks {missing}.") from None
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise BadRequestError(
                f"config.json: high_freq_factor={rope.high_freq_factor} must be above low_freq_factor={rope.low_freq_factor}."
            )
        return rope
    raise UnsupportedError(
        f"config.json: rope scaling {brief(kind)} is not supported; supported are 'default' and 'llama3'. "
        "Remove it from config.json if your sequences stay within the original context."
    )


def _dense(cfg: Mapping[str, Any], *, qkv_bias: bool, qk_norm: bool, head_dim: int | None = None) -> DecoderConfig:
    model_type = cfg["model_type"]

    def require(key: str, supported: Any, default: Any) -> None:
        value = cfg.get(key, default)
        if value != supported:
            raise UnsupportedError(
                f"config.json: {key}={brief(value)} is not supported for {model_type}; only {supported!r} is."
            )

    def need(key: str, most: int = _MOST) -> int:
        if cfg.get(key) is None:
            raise BadRequestError(f"config.json: {key} is missing; a {model_type} model needs it.")
        return _size(cfg, key, most)

    def maybe(key: str) -> int | None:
        return None if cfg.get(key) is None else _size(cfg, key)

    require("hidden_act", "silu", "silu")
    require("mlp_bias", False, False)
    require("use_sliding_window", False, False)
    require("pretraining_tp", 1, 1)
    if model_type != "qwen2":
        require("attention_bias", False, False)
    if "quantization_config" in cfg:
        raise UnsupportedError("config.json: quantised checkpoints are not supported; use the bf16 checkpoint.")
    width, heads = need("hidden_size"), need("num_attention_heads")
    kv_heads = maybe("num_key_value_heads") or heads
    if heads % kv_heads:
        raise BadRequestError(f"config.json: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}.")
    head_dim = maybe("head_dim") or head_dim
    if head_dim is None:
        if width % heads:
            raise BadRequestError(f"config.json: hidden_size={width} is no multiple of num_attention_heads={heads}.")
        head_dim = width // heads
    if head_dim % 2:
        raise UnsupportedError(f"config.json: head_dim={head_dim} is odd; rotary embedding needs an even width.")
    return DecoderConfig(
        model_type=model_type,
        V=need("vocab_size"),
        D=width,
        F=need("intermediate_size"),
        L=need("num_hidden_layers", _MOST_LAYERS),
        N=heads,
        K=kv_heads,
        H=head_dim,
        rope=_rope(cfg),
        norm_eps=_number({"rms_norm_eps": 1e-6, **cfg}, "rms_norm_eps"),
        tied=_check.boolean(cfg.get("tie_word_embeddings", False), "config.json: tie_word_embeddings"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        context_length=_size({"max_position_embeddings": 2048, **cfg}, "max_position_embeddings", _MOST_CONTEXT),
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
        raise UnsupportedError(
            f"config.json: model_type {brief(model_type)} is not supported; supported: {', '.join(_FAMILIES)}."
        )
    return _FAMILIES[model_type](cfg)
