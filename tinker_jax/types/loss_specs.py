"""What each built-in loss takes: one table from which checks, defaults and documentation derive. Loads no jax.

The formulas are in `tinker_jax.losses`. Names, inputs and defaults are Tinker's; where Tinker publishes no default the
comment beside it gives the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class LossInput:
    """One entry of `Datum.loss_fn_inputs`. Its shape is that of `target_tokens`.

    Attributes:
        dtype: `"int64"` (whole numbers only) or `"float32"` (whole numbers are accepted and converted).
        required: refused when missing; otherwise `default` stands in.
        default: the value of every position when missing; None takes the config value of the same name.
    """

    dtype: Literal["int64", "float32"]
    required: bool = True
    default: float | None = None


@dataclass(frozen=True)
class LossSpec:
    """A built-in loss: its name, its `loss_fn_inputs`, its `loss_fn_config` keys with their defaults.

    Attributes:
        summary: the loss as one formula, for documentation.
        top_k_targets: `target_tokens` may be `(N, K)`, K target ids at each position.
    """

    name: str
    summary: str
    inputs: Mapping[str, LossInput]
    config: Mapping[str, float] = field(default_factory=dict)
    top_k_targets: bool = False


_TARGETS = {"target_tokens": LossInput("int64")}
_POLICY = {**_TARGETS, "logprobs": LossInput("float32"), "advantages": LossInput("float32")}
_CLIP_LOW = {"clip_low_threshold": LossInput("float32", required=False)}
_CLIP_HIGH = {"clip_high_threshold": LossInput("float32", required=False)}

_SPECS = (
    LossSpec(
        "cross_entropy",
        "Σ −lp·w",
        {**_TARGETS, "weights": LossInput("float32", required=False, default=1.0)},
        top_k_targets=True,
    ),
    LossSpec("importance_sampling", "−Σ r·A", _POLICY),
    LossSpec(
        "ppo",
        "−Σ min(r·A, clamp(r, lo, hi)·A)",
        {**_POLICY, **_CLIP_LOW, **_CLIP_HIGH},
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
    LossSpec(
        "cispo",
        "−Σ sg(clamp(r, lo, hi))·lp·A",
        {**_POLICY, **_CLIP_LOW, **_CLIP_HIGH},
        {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
    LossSpec(
        "dro",
        "−Σ [lp·A − ½·beta·(lp − q)²]",
        _POLICY,
        {"beta": 0.05},  # the example value of Tinker's documentation
    ),
    LossSpec(
        "gspo",
        "−Σ min(r·A, clamp(r, lo, hi)·A) with r = exp(mean over the sequence of (sg(lp) − q) + lp − sg(lp))",
        {**_POLICY, "sequence_ratio_mask": LossInput("float32"), **_CLIP_LOW, **_CLIP_HIGH},
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},  # GSPO, arXiv 2507.18071, section 5.1
    ),
    LossSpec(
        "stable_reinforce",
        "−Σ sg(min(r, hi))·lp·A + kl_coeff·Σ (r − 1 − log r)  (a substitute: Tinker's formula is unpublished)",
        {**_POLICY, **_CLIP_HIGH},
        {"clip_high_threshold": 4.0, "kl_coeff": 0.0},
    ),
)

LOSS_SPECS: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
