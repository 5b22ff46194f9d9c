"""The built-in losses: pure functions of packed log-probabilities, each a few lines. Sums over tokens, never means.

Letters: `lp` log-probability of the target token under the weights being trained, `q` the one under which it was
sampled (`loss_fn_inputs["logprobs"]`), `A` advantage, `r = exp(lp − q)`, `sg` stop-gradient. A micro-batch packs
several sequences, with padding, into M positions. `evaluate` is the entry: it neutralises padding, fills in defaults and
measures; a loss function only holds its formula.

**Numerical range.** `lp − q` is clamped to ±60 before it is exponentiated, so that a ratio stays finite in float32 and
an infinite ratio times zero never turns into NaN. Beyond the clamp (e^60 ≈ 1e26) the ratio has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from tinker_jax.types.loss_specs import LOSS_SPECS

Inputs = Mapping[str, jax.Array]
Config = Mapping[str, "jax.Array | np.float32"]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

_MAX_LOG_RATIO = 60.0

sg = jax.lax.stop_gradient


class Packing(NamedTuple):
    """Where the positions of a micro-batch belong.

    Attributes:
        mask_M: bool, True at real positions.
        sequence_M: int32, which sequence a position belongs to, in `[0, num_sequences)`; anything valid in padding.
        num_sequences: static upper bound of the number of sequences.
    """

    mask_M: jax.Array
    sequence_M: jax.Array
    num_sequences: int


class LossOutput(NamedTuple):
    """What `evaluate` returns.

    Attributes:
        per_token_loss: float32 with the shape of the log-probabilities, exactly 0 at padding. Its sum is the loss.
        metrics: `{"name:reduction": (value, weight)}`, partial results for `combine_metrics`: a sum and the count it
            runs over for `mean`, the value itself for `sum`, `min` and `max`. Without gradient.
    """

    per_token_loss: jax.Array
    metrics: Metrics


class _Terms(NamedTuple):
    """A loss at each position, and where its ratio was clipped (None for losses that clip nothing)."""

    loss: jax.Array
    clipped: jax.Array | None = None


def default_config(loss_fn: str, config: Mapping[str, float] | None = None) -> dict[str, np.float32]:
    """A loss's whole config: its defaults overlaid with `config`, as float32 scalars that jit traces.

    Raises:
        KeyError: unknown loss or key; callers check input at the door (`engine.validate`).
    """
    values = dict(LOSS_SPECS[loss_fn].config)
    for key, value in (config or {}).items():
        if key not in values:
            raise KeyError(key)
        values[key] = value
    return {key: np.float32(value) for key, value in values.items()}


def evaluate(
    loss_fn: str,
    logprobs: jax.Array,
    inputs: Inputs,
    config: Config,
    packing: Packing,
    entropy_M: jax.Array | None = None,
) -> LossOutput:
    """Loss and metrics of a packed micro-batch. Differentiable in `logprobs`.

    Args:
        loss_fn: a name in `LOSS_SPECS`.
        logprobs: lp, float32 `[M]`, or `[M, K]` where the loss takes several targets a position.
        inputs: `loss_fn_inputs` packed to the shape of `logprobs`; `target_tokens` is not needed. Optional ones may be
            missing and take the default of the table, or the config value they override position by position.
        config: scalars as from `default_config`; traced, so that new values compile nothing.
        packing: which positions are real and which sequence they belong to.
        entropy_M: entropy of the model's distribution at each position, for the metric; None leaves it out.

    Metrics: `loss:sum` always, `entropy:mean` when given, over the positions of weight ≠ 0. Losses on ratios add, over
    sampled positions (prompt positions, recognised by `q = 0` and `A = 0` together, do not count): `ratio:mean`,
    `ratio:min`, `ratio:max` of r; `kl_sampler_k1:mean` = mean(q − lp) and `kl_sampler_k3:mean` = mean(r − 1 − log r),
    two estimates of KL(sampler ‖ trained); `clip_fraction:mean` where the loss clips.
    """
    spec = LOSS_SPECS[loss_fn]
    mask = packing.mask_M if logprobs.ndim == 1 else packing.mask_M[:, None]
    lp = jnp.where(mask, logprobs.astype(jnp.float32), 0.0)
    filled = {}
    for name, declared in spec.inputs.items():
        if name == "target_tokens":
            continue
        value = inputs.get(name)
        if value is None:
            value = config[name] if declared.default is None else jnp.float32(declared.default)
            value = jnp.broadcast_to(value, lp.shape)
        filled[name] = jnp.where(mask, value.astype(jnp.float32), 0.0)

    terms = _FORMULAS[loss_fn](lp, filled, config, packing)
    # Selecting, not multiplying, keeps padding out whatever it holds.
    per_token_loss = jnp.where(mask, terms.loss, 0.0)
    metrics: Metrics = {"loss:sum": (jnp.sum(per_token_loss), jnp.float32(1.0))}
    if "advantages" in filled:
        counted_M = packing.mask_M & _sampled(filled)
        metrics |= _ratio_metrics(lp, filled["logprobs"], counted_M, terms.clipped)
    else:
        weighted = mask & (filled["weights"] != 0)
        counted_M = weighted if weighted.ndim == 1 else jnp.any(weighted, axis=-1)
    if entropy_M is not None:
        metrics["entropy:mean"] = _mean(entropy_M, counted_M)
    return LossOutput(per_token_loss, jax.tree.map(sg, metrics))


def combine_metrics(parts: Iterable[Mapping[str, tuple[SupportsFloat, SupportsFloat]]]) -> dict[str, float]:
    """Join the metrics of the micro-batches of one call: `{"name:reduction": float}`, summed in float64.

    A mean, minimum or maximum over no position at all does not exist and is left out.
    """
    collected: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            collected.setdefault(name, []).append((float(value), float(weight)))
    combined = {}
    for name, pairs in collected.items():
        values = [value for value, weight in pairs if weight > 0]
        if not values:
            continue
        reduction = name.rpartition(":")[2]
        match reduction:
            case "sum":
                combined[name] = sum(values)
            case "mean":
                combined[name] = sum(values) / sum(weight for _, weight in pairs)
            case "min" | "max":
                combined[name] = (min if reduction == "min" else max)(values)
            case _:
                raise ValueError(f"metric {name!r} must end in :sum, :mean, :min or :max")
    return combined


def cross_entropy(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """−lp·w. Weights have any sign; with K targets a position each has its own weight."""
    del config, packing
    return _Terms(-lp * inputs["weights"])


def importance_sampling(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """−r·A."""
    del config, packing
    return _Terms(-_ratio(lp, inputs["logprobs"]) * inputs["advantages"])


def ppo(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """−min(r·A, clamp(r, lo, hi)·A); lo and hi bound the ratio itself."""
    del config, packing
    return _Terms(*_clipped_objective(_ratio(lp, inputs["logprobs"]), inputs))


def cispo(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """−sg(clamp(r, lo, hi))·lp·A: a clipped token keeps its gradient, unlike in PPO (MiniMax-M1, arXiv 2506.13585)."""
    del config, packing
    r, lo, hi = _ratio(lp, inputs["logprobs"]), inputs["clip_low_threshold"], inputs["clip_high_threshold"]
    return _Terms(-sg(jnp.clip(r, lo, hi)) * lp * inputs["advantages"], (r < lo) | (r > hi))


def dro(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """−(lp·A − ½·beta·(lp − q)²), as published: at every position, so a prompt with q = 0 is pulled towards lp = 0."""
    del packing
    return _Terms(-(lp * inputs["advantages"] - 0.5 * config["beta"] * (lp - inputs["logprobs"]) ** 2))


def gspo(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """PPO's objective on a ratio shared by the sequence (Qwen, arXiv 2507.18071).

    With m the positions where `sequence_ratio_mask` ≠ 0: ℓ = mean over m of (sg(lp) − q), r = exp(ℓ + lp − sg(lp)). The
    value is the sequence's ratio, the gradient each token's own. A sequence whose m is empty contributes 0.
    """
    del config
    in_mean = inputs["sequence_ratio_mask"] != 0

    def by_sequence(x_M: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_M, packing.sequence_M, packing.num_sequences)

    count_S = by_sequence(in_mean.astype(jnp.float32))
    total_S = by_sequence(jnp.where(in_mean, sg(lp) - inputs["logprobs"], 0.0))
    mean_S = total_S / jnp.maximum(count_S, 1.0)
    r_M = _exp(mean_S[packing.sequence_M]) * jnp.exp(lp - sg(lp))
    loss_M, clipped_M = _clipped_objective(r_M, inputs)
    defined_M = (count_S > 0)[packing.sequence_M]
    return _Terms(jnp.where(defined_M, loss_M, 0.0), clipped_M & defined_M)


def stable_reinforce(lp: jax.Array, inputs: Inputs, config: Config, packing: Packing) -> _Terms:
    """A documented SUBSTITUTE for Tinker's `stable_reinforce`, whose formula is unpublished.

    REINFORCE with truncated importance weights and an optional pull towards the sampler:
    −sg(min(r, hi))·lp·A + kl_coeff·(r − 1 − log r), the second term at sampled positions only.
    `hi` is `clip_high_threshold`, 4 by default; `kl_coeff` is 0 by default. r − 1 − log r is never negative, and its
    expected gradient over the sampler's tokens is that of KL(sampler ‖ trained). Provenance spans, which Tinker's own
    loss needs, are not used.
    """
    del packing
    r, hi = _ratio(lp, inputs["logprobs"]), inputs["clip_high_threshold"]
    penalty = jnp.where(_sampled(inputs), _k3(lp, inputs["logprobs"]), 0.0)
    return _Terms(-sg(jnp.minimum(r, hi)) * lp * inputs["advantages"] + config["kl_coeff"] * penalty, r > hi)


_FORMULAS: Mapping[str, Callable[[jax.Array, Inputs, Config, Packing], _Terms]] = {
    formula.__name__: formula for formula in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo, stable_reinforce)
}


def _exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _ratio(lp: jax.Array, q: jax.Array) -> jax.Array:
    return _exp(lp - q)


def _k3(lp: jax.Array, q: jax.Array) -> jax.Array:
    log_ratio = jnp.clip(lp - q, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def _sampled(inputs: Inputs) -> jax.Array:
    """Positions that a policy sampled. Callers fill prompt positions with q = 0 and A = 0."""
    return (inputs["logprobs"] != 0) | (inputs["advantages"] != 0)


def _clipped_objective(r: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """−min(r·A, clamp(r, lo, hi)·A), written as a choice: at a bound itself the gradient is whole."""
    A, lo, hi = inputs["advantages"], inputs["clip_low_threshold"], inputs["clip_high_threshold"]
    clipped = jnp.where(A > 0, r > hi, (A < 0) & (r < lo))
    return -jnp.where(clipped, sg(jnp.clip(r, lo, hi)), r) * A, clipped


def _ratio_metrics(lp: jax.Array, q: jax.Array, counted: jax.Array, clipped: jax.Array | None) -> Metrics:
    r, count = _ratio(lp, q), jnp.sum(counted, dtype=jnp.float32)
    metrics = {
        "ratio:mean": _mean(r, counted),
        "ratio:min": (jnp.min(jnp.where(counted, r, jnp.inf)), count),
        "ratio:max": (jnp.max(jnp.where(counted, r, -jnp.inf)), count),
        "kl_sampler_k1:mean": _mean(q - lp, counted),
        "kl_sampler_k3:mean": _mean(_k3(lp, q), counted),
    }
    if clipped is not None:
        metrics["clip_fraction:mean"] = _mean(clipped.astype(jnp.float32), counted)
    return metrics


def _mean(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.where(counted, x, 0.0)), jnp.sum(counted, dtype=jnp.float32)
