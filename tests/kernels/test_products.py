"""x wᵀ is the same numbers whichever way it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

from tinker_jax.kernels.products import times_transposed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [24, 21])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 65])
def test_any_number_of_rows_gives_the_plain_product(rows, width, dtype):
    rng = np.random.default_rng(rows)
    x, w = rng.normal(size=(rows, 40)), rng.normal(size=(width, 40))
    y = jax.jit(times_transposed)(jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    assert y.dtype == dtype and y.shape == (rows, width)
    np.testing.assert_allclose(
        y.astype(jnp.float32), x @ w.T, rtol=1e-5 if dtype == jnp.float32 else 0.05, atol=2e-5 if dtype == jnp.float32 else 0.3
    )


def test_sums_come_in_the_dtype_that_is_asked_for():
    x, w = jnp.ones((3, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    assert times_transposed(x, w, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_flow_through_few_rows(rows):
    x, w = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 8)), jnp.float32), jnp.ones((16, 8))
    got = jax.grad(lambda x: jnp.sum(times_transposed(x, w) ** 2))(x)
    np.testing.assert_allclose(got, jax.grad(lambda x: jnp.sum((x @ w.T) ** 2))(x), rtol=1e-5)


def test_many_rows_and_accelerators_get_the_plain_form():
    def barriers(rows):
        traced = jax.jit(times_transposed).trace(jnp.ones((rows, 8)), jnp.ones((4, 8)))
        return sum(str(equation.primitive) == "optimization_barrier" for equation in equations(traced.jaxpr))

    assert barriers(65) == barriers(1) == 0 < barriers(2)
    lowered = jax.jit(times_transposed).trace(jnp.ones((2, 8)), jnp.ones((4, 8))).lower(lowering_platforms=("tpu",))
    assert "optimization_barrier" not in lowered.as_text()
