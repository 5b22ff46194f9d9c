"""Routers of mixture-of-experts layers: the experts of each token and their weights, and how evenly experts are loaded.

A router takes logits float32 [M, E] and returns weights float32 [M, K] and experts int32 [M, K], K the experts of a token,
the first choice first. Among equal scores the lowest expert number wins; PyTorch leaves that open. Gradients flow through
the weights, not through the choice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Routed = tuple[jax.Array, jax.Array]
"""weights [M, K], experts [M, K]"""


def softmax_top_k(logits_ME: jax.Array, k: int, *, renormalise: bool) -> Routed:
    """The k largest of the softmax over all experts, divided by their sum where `renormalise` (Qwen3-MoE)."""
    weights_MK, experts_MK = jax.lax.top_k(jax.nn.softmax(logits_ME), k)
    if renormalise:
        weights_MK = weights_MK / weights_MK.sum(axis=-1, keepdims=True)
    return weights_MK, experts_MK


def top_k_softmax(logits_ME: jax.Array, k: int) -> Routed:
    """The softmax over the k largest logits (gpt-oss)."""
    chosen_MK, experts_MK = jax.lax.top_k(logits_ME, k)
    return jax.nn.softmax(chosen_MK), experts_MK


def grouped_sigmoid_top_k(
    logits_ME: jax.Array, bias_E: jax.Array, k: int, *, groups: int, top_groups: int, renormalise: bool, factor: float
) -> Routed:
    """The k largest of sigmoid(logits) + bias within the best groups of experts (DeepSeek-V3, Kimi-K2; arXiv:2412.19437).

    Weights are the sigmoids without the bias, divided by their sum where `renormalise`, times `factor`.

    Args:
        logits_ME: as above.
        bias_E: float32, steers the choice alone and gets no gradient.
        k: experts of a token, at most `top_groups` · E / `groups`.
        groups: number of groups of neighbouring experts, each of at least two. A group's score is the sum of its two best.
        top_groups: groups that a token may choose from.
        renormalise: whether the weights of a token sum to `factor`.
        factor: multiplies the weights.
    """
    M, E = logits_ME.shape
    scores_ME = jax.nn.sigmoid(logits_ME)
    choice_ME = scores_ME + bias_E[None]
    if top_groups < groups:
        grouped = choice_ME.reshape(M, groups, E // groups)
        best_two, _ = jax.lax.top_k(grouped, 2)
        _, kept = jax.lax.top_k(best_two.sum(axis=-1), top_groups)
        keep = (kept[:, :, None] == jnp.arange(groups)[None, None]).any(axis=1)
        choice_ME = jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(M, E)
    _, experts_MK = jax.lax.top_k(choice_ME, k)
    weights_MK = jnp.take_along_axis(scores_ME, experts_MK, axis=1)
    if renormalise:
        weights_MK = weights_MK / (weights_MK.sum(axis=-1, keepdims=True) + 1e-20)
    return weights_MK * factor, experts_MK


def load_metrics(counts_LE: np.ndarray) -> dict[str, float]:
    """How evenly tokens spread over experts, under the names and definitions of `tinker.types.ForwardBackwardOutput.metrics`.

    With b = (sum of a layer's counts) / E, its perfect balance, and the mean or maximum over layers of:

    - `e_frac_with_tokens`: share of experts with at least one token;
    - `e_frac_oversubscribed`: share of experts with more than b tokens;
    - `e_max_violation`: (most tokens of an expert - b) / b;
    - `e_min_violation`: (fewest tokens of an expert - b) / b.

    A layer without tokens counts as balanced: all experts used, none above b, violations 0.

    Args:
        counts_LE: tokens that chose each expert, of each layer with experts. A token counts once for each of its experts.
    """
    counts_LE = np.where(counts_LE.sum(axis=1, keepdims=True) > 0, counts_LE, 1)
    balance_L = counts_LE.mean(axis=1)
    most_L, least_L = (counts_LE.max(axis=1) - balance_L) / balance_L, (counts_LE.min(axis=1) - balance_L) / balance_L
    return {
        "e_frac_with_tokens:mean": float((counts_LE > 0).mean()),
        "e_frac_oversubscribed:mean": float((counts_LE > balance_L[:, None]).mean()),
        "e_max_violation:mean": float(most_L.mean()),
        "e_max_violation:max": float(most_L.max()),
        "e_min_violation:mean": float(least_L.mean()),
    }
