"""Rotary embedding: what `config.json` says of it, its frequencies, and the rotation of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.types import _check
from tinker_jax.types._show import brief
from tinker_jax.types.errors import BadRequestError, UnsupportedError


@dataclass(frozen=True)
class Llama3:
    """Scaling of the Llama 3.1 release: `factor` for the planes that turn less than `low_freq_factor` times within the
    original context, none for those that turn more than `high_freq_factor` times, a blend in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): as `Llama3` with `beta_slow` and `beta_fast` turns, but blended along the planes' numbers,
    and cos and sin are multiplied.

    Attributes:
        truncate: the blend begins and ends at whole planes.
        attention_factor: of cos and sin; None: derived, see `Rope.attention_factor`.
        mscale, mscale_all_dim: weights of ln(factor) in DeepSeek's factors; 0: not used.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of heads, or parts of heads, of an even `width`.

    Attributes:
        theta: plane i of width / 2 turns by theta^(-2i / width) radians a position, before `scaling`.
        interleaved: plane i is made of the numbers 2i and 2i + 1 (DeepSeek), not of i and i + width / 2.
    """

    width: int
    theta: float
    scaling: Llama3 | Yarn | None = None
    interleaved: bool = False

    @property
    def attention_factor(self) -> float:
        """What multiplies cos and sin. Unless the configuration says it, YaRN's is m(1), or m(mscale) / m(mscale_all_dim) where
        it gives both, with m(w) = 0.1 w ln(factor) + 1."""
        yarn = self.scaling
        if not isinstance(yarn, Yarn):
            return 1.0
        if yarn.attention_factor is not None:
            return yarn.attention_factor
        if yarn.mscale and yarn.mscale_all_dim:
            return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
        return _mscale(yarn.factor, 1.0)


def softmax_factor(rope: Rope) -> float:
    """What multiplies DeepSeek's softmax scale: m(mscale_all_dim)², with m as in `Rope.attention_factor`. Other families that
    use YaRN have no such factor."""
    return _mscale(rope.scaling.factor, rope.scaling.mscale_all_dim) ** 2 if isinstance(rope.scaling, Yarn) else 1.0


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(rope: Rope) -> np.ndarray:
    """Radians by which each plane turns in one position, float32 [width / 2]."""
    freq = 1.0 / rope.theta ** (np.arange(0, rope.width, 2, dtype=np.float64) / rope.width)
    match rope.scaling:
        case Llama3() as llama3:
            turns = llama3.original_context * freq / (2 * np.pi)
            scaled = (llama3.high_freq_factor - turns) / (llama3.high_freq_factor - llama3.low_freq_factor)
        case Yarn() as yarn:
            first, last = _blended_planes(rope, yarn)
            scaled = (np.arange(rope.width // 2) - first) / (last - first)
        case None:
            return freq.astype(np.float32)
    scaled = np.clip(scaled, 0.0, 1.0)
    return ((1 - scaled) * freq + scaled * freq / rope.scaling.factor).astype(np.float32)


def _blended_planes(rope: Rope, yarn: Yarn) -> tuple[float, float]:
    """The planes, as fractions of one, that turn `beta_fast` and `beta_slow` times within the original context."""

    def plane(turns: float) -> float:
        return rope.width * (math.log(yarn.original_context / (2 * math.pi)) - math.log(turns)) / (2 * math.log(rope.theta))

    first, last = plane(yarn.beta_fast), plane(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bound width - 1, where planes end at width / 2 - 1, and the thousandth are those of the paper's code.
    first, last = max(first, 0), min(last, rope.width - 1)
    return first, last + 0.001 if first == last else last


def rope_table(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, times `attention_factor`, float32 [..., width / 2], of integer positions [...]."""
    freq = rope_frequencies(rope).reshape((1,) * positions.ndim + (rope.width // 2,))
    angle = positions.astype(jnp.float32)[..., None] * freq
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x_MNH: jax.Array, table: tuple[jax.Array, jax.Array], *, interleaved: bool = False) -> jax.Array:
    """Turns each plane of each head, H the width of the rope; its planes lie in halves, as in most Hugging Face checkpoints, or
    `interleaved`, as in `Rope`.

    The result has the first numbers of all planes, then the second ones, also where the argument has them interleaved: queries
    and keys meet in dot products alone, which do not depend on a common order.
    """
    cos, sin = (t[:, None, :] for t in table)
    x = x_MNH.astype(jnp.float32)
    lo, hi = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x_MNH.dtype)


def parse_rope(cfg: Mapping[str, Any], width: int, *, interleaved: bool = False) -> Rope:
    """The rotary embedding that a `config.json` describes.

    Args:
        cfg: with `rope_parameters` (transformers 5) or with `rope_theta` and `rope_scaling` (transformers 4).
        width: numbers of a head that turn, even.
        interleaved: as in `Rope`; `config.json` does not always say it.

    Raises:
        UnsupportedError: a kind of scaling, or a partial rotation, that is not implemented.
        BadRequestError: a value that is missing or impossible, or two descriptions that disagree.
    """

    def of_file(*keys: str) -> dict[str, Any]:
        return {key: cfg[key] for key in keys if key in cfg}

    given: list[Mapping[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = cfg.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise _check.refuse(f"config.json: {key}", "an object or null", value)
        given += [value] if value else []
    defaults = of_file("rope_theta", "partial_rotary_factor", "max_position_embeddings")
    # transformers, too, prefers the file's own to that of the object.
    original = of_file("original_max_position_embeddings")
    ropes = [_rope({**defaults, **params, **original}, width, interleaved) for params in given or [{}]]
    if len(set(ropes)) > 1:
        raise BadRequestError("config.json: rope_parameters and rope_scaling disagree; keep the one that is meant.")
    return ropes[0]


def _rope(params: Mapping[str, Any], width: int, interleaved: bool) -> Rope:
    kind = params.get("rope_type", params.get("type", "default"))
    # YaRN divides by ln(theta), and its planes must turn slower and slower.
    theta = _number({"rope_theta": 10000.0, **params}, "rope_theta", above=1 if kind == "yarn" else 0)
    if (part := params.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError(f"config.json: partial_rotary_factor={brief(part)} is not supported; only 1.0 is.")
    if kind == "default":
        return Rope(width, theta, None, interleaved)
    if kind not in ("llama3", "yarn"):
        raise UnsupportedError(
            f"config.json: rope scaling {brief(kind)} is not supported; supported are 'default', 'llama3' and 'yarn'. "
            "Remove it from config.json if your sequences stay within the original context."
        )
    try:
        return Rope(width, theta, _llama3(params) if kind == "llama3" else _yarn(params), interleaved)
    except KeyError as missing:
        raise BadRequestError(f"config.json: {kind} rope scaling lacks {missing}.") from None


def _llama3(params: Mapping[str, Any]) -> Llama3:
    scaling = Llama3(
        factor=_number(params, "factor"),
        low_freq_factor=_number(params, "low_freq_factor"),
        high_freq_factor=_number(params, "high_freq_factor"),
        original_context=_context(params, "original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise BadRequestError(
            f"config.json: high_freq_factor={scaling.high_freq_factor} must be above low_freq_factor={scaling.low_freq_factor}."
        )
    return scaling


def _yarn(params: Mapping[str, Any]) -> Yarn:
    original = "original_max_position_embeddings"
    given = {key: value for key, value in params.items() if value is not None}
    scaling = Yarn(
        factor=_number(params, "factor"),
        original_context=_context(params, original if original in params else "max_position_embeddings"),
        beta_fast=_number({"beta_fast": 32.0, **given}, "beta_fast"),
        beta_slow=_number({"beta_slow": 1.0, **given}, "beta_slow"),
        truncate=_check.boolean(params.get("truncate", True), "config.json: truncate"),
        attention_factor=_number(given, "attention_factor") if "attention_factor" in given else None,
        mscale=_check.real(given.get("mscale", 0), "config.json: mscale", minimum=0),
        mscale_all_dim=_check.real(given.get("mscale_all_dim", 0), "config.json: mscale_all_dim", minimum=0),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise BadRequestError(f"config.json: beta_fast={scaling.beta_fast} is below beta_slow={scaling.beta_slow}.")
    return scaling


def _number(params: Mapping[str, Any], key: str, above: float = 0) -> float:
    return _check.real(params[key], f"config.json: {key}", above=above)


def _context(params: Mapping[str, Any], key: str) -> int:
    return _check.integer(params[key], f"config.json: {key}", minimum=1, maximum=2**31 - 1)
