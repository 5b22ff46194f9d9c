"""Rotary embedding (placeholder until the branch with yarn is merged)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.models.config import number, size
from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `kind` is `"default"` or `"llama3"` (frequency-dependent scaling of Llama 3.1)."""

    width: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def parse_rope(cfg: Mapping[str, Any], width: int) -> Rope:
    # transformers 5 writes rope_parameters; files of transformers 4 have rope_theta and rope_scaling.
    params: Mapping[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = cfg.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise _check.refuse(f"config.json: {key}", "an object or null", value)
        params = params or value or {}
    kind = params.get("rope_type", params.get("type", "default"))
    theta = number({"rope_theta": 10000.0, **cfg, **params}, "rope_theta")
    if (part := params.get("partial_rotary_factor", cfg.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UnsupportedError(f"config.json: partial_rotary_factor={brief(part)} is not supported; only 1.0 is.")
    if kind == "default":
        return Rope(width, theta)
    if kind == "llama3":
        try:
            rope = Rope(
                width,
                theta,
                kind="llama3",
                factor=number(params, "factor"),
                low_freq_factor=number(params, "low_freq_factor"),
                high_freq_factor=number(params, "high_freq_factor"),
                original_max_position=size(params, "original_max_position_embeddings"),
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


def rope_frequencies(rope: Rope) -> np.ndarray:
    """Angular frequency of each of the H/2 planes, float32.

    `"llama3"` divides low frequencies by `factor`, keeps high ones, and blends linearly in between, by how often a plane
    turns within the original context (Llama 3.1 release).
    """
    freq = 1.0 / rope.theta ** (np.arange(0, rope.width, 2, dtype=np.float64) / rope.width)
    if rope.kind == "llama3":
        turns = rope.original_max_position * freq / (2 * np.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / rope.factor
    return freq.astype(np.float32)


def rope_table(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., width/2] in float32 of integer positions [...]."""
    freq = rope_frequencies(rope).reshape((1,) * positions.ndim + (rope.width // 2,))
    angle = positions.astype(jnp.float32)[..., None] * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_MNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of each head against each other (the half-split layout of Hugging Face checkpoints)."""
    cos, sin = (t[:, None, :] for t in table)
    lo, hi = jnp.split(x_MNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x_MNH.dtype)
