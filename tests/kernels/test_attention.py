"""Every attention backend equals the plain formula, forward and backward, on packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinker_jax.kernels.attention import attention


def make(B, T, N, K, H, segments, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v = (jax.random.normal(key, (B, T, n, H)) for key, n in zip(keys[:3], (N, K, K), strict=True))
    return q, k, v, jnp.asarray(segments, jnp.int32), jax.random.normal(keys[3], (B, T, N, H))


def packed(T, lengths):
    ids = np.zeros(T, np.int32)
    at = 0
    for i, n in enumerate(lengths):
        ids[at : at + n] = i + 1
        at += n
    return ids


CASES = {
    "one segment a row": (2, 64, 4, 2, 8, [packed(64, [64]), packed(64, [50])]),
    "several blocks": (1, 300, 2, 1, 16, [packed(300, [300])]),
    "packed across blocks": (2, 384, 4, 4, 8, [packed(384, [10, 200, 30, 144]), packed(384, [130, 1, 2, 100])]),
    "single tokens": (1, 8, 2, 2, 4, [packed(8, [1] * 8)]),
    "row of padding": (2, 256, 2, 1, 8, [packed(256, []), packed(256, [129, 127])]),
}


@pytest.mark.parametrize("case", CASES)
def test_blockwise_equals_the_formula_forward_and_backward(case):
    q, k, v, seg, g = make(*CASES[case])

    def run(implementation):
        def f(q, k, v):
            return attention(q, k, v, seg, scale=q.shape[-1] ** -0.5, implementation=implementation)

        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(g)

    for ours, plain in zip(jax.jit(lambda: run("blockwise"))(), run("reference"), strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5, rtol=1e-4)


def test_a_sequence_packed_beside_others_equals_itself_alone():
    q, k, v, _, g = make(1, 200, 4, 2, 8, [packed(200, [200])])
    seg = jnp.asarray([packed(200, [70, 90, 40])])

    def run(q, k, v, seg, g):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, seg, scale=0.3), q, k, v)
        return out, *vjp(g)

    whole = run(q, k, v, seg, g)
    part = slice(70, 160)
    alone = run(q[:, part], k[:, part], v[:, part], jnp.ones((1, 90), jnp.int32), g[:, part])
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_allclose(a[:, part], b, atol=1e-5)


def test_blockwise_never_holds_a_square_of_the_row_length():
    T = 8192
    q, k, v, seg, _ = (jax.ShapeDtypeStruct(s, d) for s, d in [((1, T, 1, 8), jnp.float32)] * 3 + [((1, T), jnp.int32)] * 2)

    def loss(q, k, v, seg):
        return attention(q, k, v, seg, scale=1.0).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, seg).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T * 4 / 8


def test_bfloat16_inputs_keep_float32_accuracy_of_the_softmax():
    q, k, v, seg, _ = make(1, 256, 2, 2, 32, [packed(256, [256])])
    exact = attention(q, k, v, seg, scale=0.2, implementation="reference")
    low = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), seg, scale=0.2)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.03)
