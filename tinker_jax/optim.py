"""AdamW as Tinker defines it, which is torch's, on optax: pure functions over an adapter pytree."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from tinker_jax.types.errors import BadRequestError

Tree = Any  # a pytree of float32 arrays, laid out as the adapter


class AdamHyper(NamedTuple):
    """Hyperparameters of one step, each a float32 scalar that jit traces: changing one compiles nothing.

    Attributes:
        weight_decay: decoupled; multiplied by the learning rate.
        grad_clip_norm: largest global norm of the gradient; 0 clips nothing.
    """

    learning_rate: ArrayLike
    beta1: ArrayLike
    beta2: ArrayLike
    eps: ArrayLike
    weight_decay: ArrayLike
    grad_clip_norm: ArrayLike


def adam_hyper(
    learning_rate: float = 1e-4,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    grad_clip_norm: float = 0.0,
) -> AdamHyper:
    """Check the values of an `AdamParams` (same names and defaults) and make them ready for `adamw`.

    Raises:
        BadRequestError: a value that is not, in float32, a finite number in its range. `eps` must be above 0 although
            torch takes 0: an entry whose gradient is exactly zero, as LoRA A's is at the first step, would become NaN.
    """
    values = AdamHyper(learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm)._asdict()
    rounded = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise BadRequestError(f"AdamParams.{name} must be a finite number, got {value!r}")
        with np.errstate(over="ignore"):
            rounded[name] = np.float32(value)
        if not np.isfinite(rounded[name]):
            raise BadRequestError(f"AdamParams.{name} must be a finite float32 number, got {value!r}")
        if name in ("beta1", "beta2") and not 0 <= rounded[name] < 1:
            raise BadRequestError(f"AdamParams.{name} must be in [0, 1), got {value!r}")
        if name == "eps" and rounded[name] <= 0:
            raise BadRequestError(f"AdamParams.eps must be above 0, got {value!r}")
        if rounded[name] < 0:
            raise BadRequestError(f"AdamParams.{name} must be at least 0, got {value!r}")
    return AdamHyper(**rounded)


def init(adapter: Tree) -> dict[str, Any]:
    """Fresh state for `adapter`: `{"mu": zeros like it, "nu": zeros like it, "count": int32 0}`, moments in float32; NumPy."""

    def zeros() -> Tree:
        return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), adapter)

    return {"mu": zeros(), "nu": zeros(), "count": np.zeros((), np.int32)}


def adamw(
    adapter: Tree, grads: Tree, opt_state: dict[str, Any], hyper: AdamHyper
) -> tuple[Tree, dict[str, Any], dict[str, jax.Array], jax.Array]:
    """One step of `torch.optim.AdamW` after `torch.nn.utils.clip_grad_norm_`.

    With g the gradient times min(1, c / (‖g‖ + 1e-6)) when c = `grad_clip_norm` > 0, and t the step from 1:
    m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²; θ ← θ − lr·(m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε) + wd·θ).

    A gradient whose norm is not finite changes nothing: parameters and state come back as they were. Nor does a step after
    which one of their values would not be finite.

    Args:
        adapter: parameters.
        grads: summed gradients, laid out as `adapter`.
        opt_state: from `init` or an earlier step.
        hyper: from `adam_hyper`.

    Returns:
        `(adapter, opt_state, {"grad_norm": global norm before clipping, float32 scalar}, was it applied)`.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    norm = optax.global_norm(grads)
    # clip_grad_norm_'s coefficient; optax.clip_by_global_norm has no 1e-6 and would differ.
    coefficient = jnp.where(jnp.greater(hyper.grad_clip_norm, 0), jnp.minimum(1.0, hyper.grad_clip_norm / (norm + 1e-6)), 1.0)
    grads = jax.tree.map(lambda g: g * coefficient, grads)

    transform: Any = optax.chain(
        # The annotations of these promise Python floats; what they compute is traced as well.
        optax.scale_by_adam(b1=cast(float, hyper.beta1), b2=cast(float, hyper.beta2), eps=cast(float, hyper.eps)),
        optax.add_decayed_weights(cast(float, hyper.weight_decay)),
        optax.scale_by_learning_rate(cast(float, hyper.learning_rate)),
    )
    _, *stateless = transform.init(adapter)
    before = optax.ScaleByAdamState(count=opt_state["count"], mu=opt_state["mu"], nu=opt_state["nu"])
    updates, (after, *_) = transform.update(grads, (before, *stateless), adapter)
    old = (adapter, opt_state)
    new = (optax.apply_updates(adapter, updates), {"mu": after.mu, "nu": after.nu, "count": after.count})
    finite = jnp.stack([jnp.isfinite(norm), *(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new))])
    applied = jnp.all(finite)
    adapter, opt_state = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
    return adapter, opt_state, {"grad_norm": norm}, applied
