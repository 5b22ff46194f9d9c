"""AdamW equals torch's, step by step, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tinker_jax import optim
from tinker_jax.types.errors import BadRequestError


def random_tree(rng, scale=1.0):
    return {
        "layers": {
            "q_proj": {"a": scale * rng.normal(size=(2, 6, 3)), "b": scale * rng.normal(size=(2, 3, 4))},
        },
        "lm_head": {"a": scale * rng.normal(size=(6, 3))},
    }


def to_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_twenty_steps_with_changing_hyperparameters_equal_torch_and_compile_once():
    rng = np.random.default_rng(0)
    start = random_tree(rng)
    adapter = to_jax(start)
    state = optim.init(adapter)
    leaves = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for x in jax.tree.leaves(start)]
    torch_adam = torch.optim.AdamW(leaves, lr=1.0)
    traces = []

    @jax.jit
    def step(adapter, grads, state, hyper):
        traces.append(None)
        return optim.adamw(adapter, grads, state, hyper)

    for i in range(20):
        values = {
            "learning_rate": 1e-2 / (1 + i),
            "beta1": 0.9 if i < 10 else 0.8,
            "beta2": 0.95,
            "eps": 1e-12 if i % 2 else 1e-8,
            "weight_decay": 0.1 * (i % 3),
            "grad_clip_norm": [0.0, 0.5, 100.0][i % 3],
        }
        grads = random_tree(rng, scale=10.0 ** (i % 3 - 1))
        adapter, state, metrics, _ = step(adapter, to_jax(grads), state, optim.adam_hyper(**values))

        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = torch.tensor(grad, dtype=torch.float32)
        max_norm = values["grad_clip_norm"] or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        group = torch_adam.param_groups[0]
        group["lr"], group["eps"], group["weight_decay"] = (
            values["learning_rate"],
            values["eps"],
            values["weight_decay"],
        )
        group["betas"] = (values["beta1"], values["beta2"])
        torch_adam.step()

        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(adapter), leaves, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-5)
    assert len(traces) == 1
    assert int(state["count"]) == 20


def test_the_moments_equal_torch_s():
    rng = np.random.default_rng(1)
    start = random_tree(rng)
    adapter, grads = to_jax(start), random_tree(rng)
    _, state, _, _ = optim.adamw(adapter, to_jax(grads), optim.init(adapter), optim.adam_hyper())
    for mu, nu, grad in zip(*(jax.tree.leaves(x) for x in (state["mu"], state["nu"], grads)), strict=True):
        np.testing.assert_allclose(mu, 0.1 * grad, rtol=1e-5)
        np.testing.assert_allclose(nu, 0.05 * grad**2, rtol=1e-5)


def test_zero_gradients_change_nothing_at_the_default_eps():
    adapter = to_jax(random_tree(np.random.default_rng(2)))
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    after, state, metrics, _ = jax.jit(optim.adamw)(adapter, zeros, optim.init(adapter), optim.adam_hyper(grad_clip_norm=1.0))
    jax.tree.map(np.testing.assert_array_equal, after, adapter)
    assert metrics["grad_norm"] == 0 and int(state["count"]) == 1


def test_a_first_step_moves_every_entry_by_the_learning_rate():
    adapter = to_jax(random_tree(np.random.default_rng(3)))
    grads = jax.tree.map(lambda x: 1e-6 * jnp.sign(x), adapter)
    after, _, _, _ = optim.adamw(adapter, grads, optim.init(adapter), optim.adam_hyper(learning_rate=1e-2))
    jax.tree.map(lambda a, x: np.testing.assert_allclose(a, x - 1e-2 * np.sign(x), atol=1e-6), after, adapter)


def test_the_state_is_float32_and_laid_out_as_the_adapter():
    adapter = to_jax(random_tree(np.random.default_rng(4)))
    state = optim.init(adapter)
    assert set(state) == {"mu", "nu", "count"} and state["count"].dtype == jnp.int32
    for moment in (state["mu"], state["nu"]):
        assert jax.tree.structure(moment) == jax.tree.structure(adapter)
        assert all(x.dtype == jnp.float32 and not x.any() for x in jax.tree.leaves(moment))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": float("nan")}, "AdamParams.learning_rate must be a finite float32 number, got nan"),
        ({"learning_rate": "1e-4"}, "AdamParams.learning_rate must be a finite number, got '1e-4'"),
        ({"learning_rate": -1.0}, "AdamParams.learning_rate must be at least 0, got -1.0"),
        ({"beta2": 1.0}, r"AdamParams.beta2 must be in \[0, 1\), got 1.0"),
        ({"learning_rate": 1e39}, "AdamParams.learning_rate must be a finite float32 number, got 1e\\+39"),
        ({"beta1": 1 - 1e-9}, r"AdamParams.beta1 must be in \[0, 1\), got 0.999999999"),
        ({"eps": 0.0}, "AdamParams.eps must be above 0, got 0.0"),
        ({"weight_decay": float("inf")}, "AdamParams.weight_decay must be a finite float32 number"),
        ({"grad_clip_norm": -0.5}, "AdamParams.grad_clip_norm must be at least 0, got -0.5"),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(values, message):
    with pytest.raises(BadRequestError, match=message):
        optim.adam_hyper(**values)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    rng = np.random.default_rng(0)
    adapter = to_jax(random_tree(rng))
    adapter, state, _, applied = optim.adamw(adapter, to_jax(random_tree(rng)), optim.init(adapter), optim.adam_hyper())
    grads = to_jax(random_tree(rng))
    grads["lm_head"]["a"] = grads["lm_head"]["a"].at[0, 0].set(bad)
    after, state_after, metrics, refused = optim.adamw(adapter, grads, state, optim.adam_hyper(weight_decay=0.1))
    assert applied and not refused and not np.isfinite(metrics["grad_norm"])
    for old, new in zip(jax.tree.leaves((adapter, state)), jax.tree.leaves((after, state_after)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 1e-37, "learning_rate": 1e25},
        {"weight_decay": 1e38},
        {"learning_rate": 1e38},
        {"learning_rate": 1e30, "weight_decay": 1e30},
    ],
)
def test_a_step_after_which_something_would_not_be_finite_changes_nothing(change):
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: 100 * x, to_jax(random_tree(rng)))
    grads = jax.tree.map(lambda x: x.at[0].set(1e-20), to_jax(random_tree(rng)))
    state = optim.init(adapter)
    hyper = optim.adam_hyper(**{"weight_decay": 0.1, **change})
    for step in (optim.adamw, jax.jit(optim.adamw)):
        after, state_after, metrics, applied = step(adapter, grads, state, hyper)
        assert not applied and np.isfinite(metrics["grad_norm"])
        for a, b in zip(jax.tree.leaves((after, state_after)), jax.tree.leaves((adapter, state)), strict=True):
            np.testing.assert_array_equal(a, b)
