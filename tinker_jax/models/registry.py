"""Which family reads which `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tinker_jax.models import deepseek_v3, dense, gpt_oss, qwen3_moe
from tinker_jax.models.config import ModelConfig
from tinker_jax.types._show import brief
from tinker_jax.types.errors import UnsupportedError

FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": dense.parse,
    "qwen2": dense.parse,
    "qwen3": dense.parse,
    "qwen3_moe": qwen3_moe.parse,
    "gpt_oss": gpt_oss.parse,
    "deepseek_v3": deepseek_v3.parse,
    "kimi_k2": deepseek_v3.parse,
}


def parse(cfg: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a `config.json` describes.

    Raises:
        UnsupportedError: a `model_type` or a value that no family here implements.
        BadRequestError: a value that is missing or impossible.
    """
    model_type = str(cfg.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type {brief(model_type)} is not supported; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type](cfg)
