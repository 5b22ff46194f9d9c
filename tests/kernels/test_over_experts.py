"""The loop over experts computes, forward and backward, what every token's experts do one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations

from tinker_jax.kernels.grouped_matmul import by_expert, over_experts

D, R, F = 24, 3, 20


def hidden(own, tokens):
    x, z = tokens
    return [jnp.tanh(x @ own["first"].T + z @ own["b"])]


def down(own, kept, weight):
    h = kept[0] * weight.astype(kept[0].dtype)
    return h @ own["second"].T, h @ own["a"]


def make(E, tokens, dtype=jnp.float32, seed=0):
    """(trained, frozen, (x, z))"""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), dtype)

    trained, frozen = {"b": draw(E, R, F), "a": draw(E, F, R)}, {"first": draw(E, F, D), "second": draw(E, D, F)}
    return trained, frozen, (draw(tokens, D), draw(tokens, R))


def choose(E, tokens, k, seed=0, padding=0):
    """(ids, weights) [M, k]; no two experts of a token are the same, and the last tokens chose none."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.standard_normal((tokens, E)) + rng.standard_normal(E), axis=1)[:, :k].astype(np.int32)
    ids[tokens - padding :] = E
    return jnp.asarray(ids), jnp.asarray(rng.random((tokens, k)), jnp.float32)


@functools.partial(jax.jit, static_argnames="one_size")
def ours(trained, frozen, tokens, ids, weights, *, one_size=False):
    dispatch = by_expert(ids, frozen["first"].shape[0])
    weights_S = jnp.zeros(weights.size).at[dispatch.place_MK.reshape(-1)].set(weights.reshape(-1), mode="drop")
    return over_experts(hidden, down, trained, frozen, tokens, weights_S, dispatch, one_size=one_size, keep_as="kept")


@jax.jit
def formula(trained, frozen, tokens, ids, weights):
    E = frozen["first"].shape[0]

    def expert(own, e):
        weight = jnp.sum(jnp.where(ids == e, weights, 0), axis=1, keepdims=True)
        return down(own, hidden(own, tokens), weight)

    made = jax.vmap(expert)({**trained, **frozen}, jnp.arange(E))
    return jax.tree.map(lambda y: jnp.sum(y.astype(jnp.float32), axis=0).astype(y.dtype), made)


# name: (experts, tokens, experts a token, padding)
CASES = {
    "one token": (6, 1, 2, 0),
    "no token": (4, 5, 2, 5),
    "more experts than choices": (40, 3, 2, 1),
    "blocks of 64": (2, 300, 1, 20),
    "blocks of several sizes": (4, 300, 2, 33),
    "one expert has all": (2, 500, 2, 0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("one_size", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_formula(case, one_size, dtype):
    E, tokens, k, padding = CASES[case]
    trained, frozen, rows = make(E, tokens, dtype)
    ids, weights = choose(E, tokens, k, padding=padding)
    g = make(E, tokens, dtype, seed=1)[2]

    def with_gradients(run):
        out, pull = jax.vjp(lambda *args: run(args[0], frozen, args[1], ids, args[2]), trained, rows, weights)
        return out, pull(g)

    got, want = (with_gradients(run) for run in (functools.partial(ours, one_size=one_size), formula))
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        tolerance = 1e-5 if dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=str(path))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 400), min_size=3, max_size=3), one_size=st.booleans(), seed=st.integers(0, 99))
def test_any_number_of_tokens_an_expert(counts, one_size, seed):
    """Tokens have one expert each here."""
    ends = np.minimum(np.cumsum(counts), 400)
    ids = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2, 3], np.diff([0, *ends, 400])))
    trained, frozen, rows = make(3, 400, seed=seed)
    args = trained, frozen, rows, jnp.asarray(ids[:, None], jnp.int32), jnp.ones((400, 1))
    for a, b in zip(ours(*args, one_size=one_size), formula(*args), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("E", "tokens", "k"), [(64, 1, 8), (16, 16, 4), (8, 175, 4), (8, 700, 2)])
def test_a_token_does_not_depend_on_its_neighbours_bit_for_bit(E, tokens, k, dtype):
    """The same token at another place, among others, whose experts have other numbers of tokens."""
    trained, frozen, (x, z) = make(E, tokens, dtype)
    own = choose(E, 1, k)
    results = set()
    for seed in range(1, 13):
        others, (ids, weights) = make(E, tokens, dtype, seed)[2], choose(E, tokens, k, seed, padding=seed % tokens)
        at = seed * 7 % tokens
        rows = others[0].at[at].set(x[0]), others[1].at[at].set(z[0])
        args = trained, frozen, rows, ids.at[at].set(own[0][0]), weights.at[at].set(own[1][0])
        results.add(tuple(np.asarray(y[at].astype(jnp.float32)).tobytes() for y in ours(*args, one_size=True)))
    assert len(results) == 1


def test_numbers_of_one_token_that_are_none_stay_with_it():
    trained, frozen, (x, z) = make(4, 300)
    ids, weights = choose(4, 300, 2)
    clean = ours(trained, frozen, (x, z), ids, weights)
    dirty = ours(trained, frozen, (x.at[7].set(jnp.nan), z), ids, weights)
    for a, b in zip(clean, dirty, strict=True):
        assert np.all(np.isnan(b[7]))
        np.testing.assert_array_equal(np.delete(a, 7, 0), np.delete(b, 7, 0))


def test_frozen_arrays_get_no_gradient_and_none_is_computed():
    trained, frozen, rows = make(4, 30)
    ids, weights = choose(4, 30, 2)

    def loss(trained, frozen):
        return sum(jnp.sum(y) for y in ours(trained, frozen, rows, ids, weights))

    assert not any(np.any(g) for g in jax.grad(loss, 1)(trained, frozen).values())
    alone, both = (jax.make_jaxpr(jax.grad(loss, of))(trained, frozen) for of in (0, (0, 1)))
    assert products(both) == products(alone)


def products(jaxpr):
    return sum(str(equation.primitive) == "dot_general" for equation in equations(jaxpr.jaxpr))


def test_memory_holds_what_is_kept_and_nothing_of_all_choices_at_the_models_width():
    E, tokens, k = 32, 512, 8
    trained, frozen, rows = make(E, tokens)
    ids, weights = choose(E, tokens, k)

    def run(trained, frozen, rows, ids, weights):
        out, pull = jax.vjp(lambda *args: ours(args[0], frozen, args[1], ids, args[2]), trained, rows, weights)
        return pull(out)

    memory: Any = jax.jit(run).lower(trained, frozen, rows, ids, weights).compile().memory_analysis()
    choices = tokens * k * 4
    assert memory.temp_size_in_bytes < choices * F + choices * D // 2
