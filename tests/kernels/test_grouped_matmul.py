"""Grouped products equal the plain formula, forward and backward; dispatch and combine equal NumPy's."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations

from tinker_jax.kernels.grouped_matmul import Dispatch, api, blocks, by_expert, combine, grouped_matmul, mosaic, spread
from tinker_jax.kernels.grouped_matmul.reference import reference_grouped_matmul

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.02}
# name: (S, D, N, sizes)
CASES = {
    "empty groups": (37, 24, 40, (0, 5, 0, 20, 12, 0)),
    "one group has all": (50, 24, 40, (0, 50, 0)),
    "rows behind": (41, 24, 40, (3, 0, 9, 1)),
    "no rows": (7, 24, 40, (0, 0)),
    "one expert": (130, 16, 8, (129,)),
    "more experts than rows": (3, 24, 40, (0, 0, 1, 0, 1, 0, 0, 1)),
    "odd widths": (90, 13, 7, (64, 1, 20)),
    "large groups": (600, 12, 20, (300, 0)),
}


def make(S, D, N, sizes, *, transposed, dtype=jnp.float32, seed=0):
    """x, w, sizes and a cotangent of y."""
    rng, E = np.random.default_rng(seed), len(sizes)
    shapes = (S, D), (E, N, D) if transposed else (E, D, N), (S, N)
    x, w, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, w, jnp.asarray(sizes, jnp.int32), g


def close(got, want, dtype):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[jnp.dtype(dtype).name] * max(1, np.abs(want).max(initial=0)))


class GroupedMatmulTests:
    """What a backend must do; each backend subclasses it."""

    implementation: api.Implementation

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize("case", CASES)
    def test_results_and_gradients_are_those_of_the_formula(self, case, transposed, dtype):
        x, w, sizes, g = make(*CASES[case], transposed=transposed, dtype=dtype)

        @jax.jit
        def run(x, w, sizes, g):
            def ours(x, w):
                return grouped_matmul(x, w, sizes, transposed=transposed, frozen=False, implementation=self.implementation)

            y, vjp = jax.vjp(ours, x, w)
            return y, *vjp(g)

        @jax.jit
        def formula(x, w, sizes, g):
            y, vjp = jax.vjp(lambda x, w: reference_grouped_matmul(x, w, sizes, transposed=transposed), x, w)
            return y, *vjp(g)

        got, want = run(x, w, sizes, g), formula(x, w, sizes, g)
        assert [a.dtype for a in got] == [dtype] * 3
        for ours, theirs in zip(got, want, strict=True):
            close(ours, theirs, dtype)
        behind = int(sum(CASES[case][3]))
        assert not np.any(got[0][behind:]) and not np.any(got[1][behind:])

    @pytest.mark.parametrize("transposed", [True, False])
    def test_a_frozen_weight_gets_no_gradient_and_none_is_computed(self, transposed):
        x, w, sizes, g = make(*CASES["rows behind"], transposed=transposed)

        def loss(x, w):
            y = grouped_matmul(x, w, sizes, transposed=transposed, frozen=True, implementation=self.implementation)
            return jnp.sum(y * g)

        dx, dw = jax.grad(loss, argnums=(0, 1))(x, w)
        want = jax.grad(lambda x: jnp.sum(reference_grouped_matmul(x, w, sizes, transposed=transposed) * g))(x)
        close(dx, want, jnp.float32)
        assert not np.any(dw)
        alone = jax.make_jaxpr(jax.grad(loss))(x, w)
        both = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w)
        assert products(both) == products(alone)

    @pytest.mark.parametrize("transposed", [True, False])
    def test_what_stands_behind_the_last_group_reaches_nothing(self, transposed):
        x, w, sizes, g = make(*CASES["rows behind"], transposed=transposed)
        behind = int(sizes.sum())

        def run(x, g):
            def ours(x, w):
                return grouped_matmul(x, w, sizes, transposed=transposed, frozen=False, implementation=self.implementation)

            y, vjp = jax.vjp(ours, x, w)
            return y, *vjp(g)

        for clean, dirty in zip(run(x, g), run(x.at[behind:].set(jnp.nan), g.at[behind:].set(jnp.nan)), strict=True):
            np.testing.assert_array_equal(clean, dirty)


def products(jaxpr):
    return sum(str(equation.primitive) in ("dot_general", "ragged_dot_general") for equation in equations(jaxpr.jaxpr))


class TestBlocks(GroupedMatmulTests):
    implementation = "blocks"


class TestXla(GroupedMatmulTests):
    implementation = "xla"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes, S", [((5, 0, 300, 1, 128, 0), 500), ((0, 0), 7), ((3, 4), 7), ((200, 56), 256)])
def test_weight_gradients_in_blocks_of_rows_are_those_of_the_formula(sizes, S, transposed):
    rng, sizes_E = np.random.default_rng(0), np.array(sizes, np.int32)
    x, g = (rng.standard_normal((S, n)).astype(np.float32) for n in (6, 10))
    left, right = (g, x) if transposed else (x, g)
    ends = np.cumsum(sizes)
    expected = [left[end - n : end].T @ right[end - n : end] for n, end in zip(sizes, ends, strict=True)]
    ours = jax.jit(blocks.weight_gradient, static_argnames="transposed")(x, g, sizes_E, transposed=transposed)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


class TestMosaic:
    @pytest.mark.gpu
    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize(("D", "N"), [(2048, 768), (768, 2048), (128, 256)])
    def test_a_card_agrees_with_the_formula(self, D, N, transposed):
        assert mosaic.fault(mosaic.product, D, N, "bfloat16") is None

    @pytest.mark.parametrize(
        ("D", "N", "dtype", "capability", "reason"),
        [
            (128, 128, "float32", None, "takes bfloat16 and float16, not float32"),
            (128, 64, "bfloat16", None, "takes widths of several times 64, not 128 and 64"),
            (128, 200, "bfloat16", None, "takes widths of several times 64, not 128 and 200"),
            (128, 128, "bfloat16", "8.0", "Hopper"),
            (128, 128, "bfloat16", "10.0", "Hopper"),
        ],
    )
    def test_what_the_kernel_cannot_do_is_refused_with_the_reason(self, D, N, dtype, capability, reason):
        with pytest.raises(NotImplementedError, match=reason):
            mosaic.check(D, N, dtype, capability, on_this_device=False)

    def test_the_kernel_is_refused_on_a_cpu(self):
        x, w, sizes, _ = make(*CASES["rows behind"], transposed=True)
        with pytest.raises(NotImplementedError, match="runs on NVIDIA GPUs, not on 'cpu'"):
            grouped_matmul(x, w, sizes, transposed=True, frozen=True, implementation="mosaic")

    def test_the_self_check_finds_a_wrong_product_while_a_program_is_traced(self):
        found = []

        def program(x):
            found.append(mosaic.fault(reference_grouped_matmul, 32, 48, "bfloat16"))
            found.append(mosaic.fault(_late_by_a_row, 32, 48, "bfloat16"))
            return x

        jax.jit(program)(jnp.ones(3))
        assert found[0] is None and "differs from the plain formula" in found[1]


def _late_by_a_row(x_SD, w, sizes_E, *, transposed):
    return reference_grouped_matmul(x_SD, w, sizes_E.at[0].add(1), transposed=transposed)


def test_an_implementation_that_is_passed_over_is_named_once(caplog, monkeypatch):
    x, w, sizes, _ = make(41, 80, 96, (3, 0, 9, 1), transposed=True)
    gpu = SimpleNamespace(platform="gpu", compute_capability="8.6")
    mesh = SimpleNamespace(devices=np.array([gpu]))
    api._log_fallback.cache_clear()
    monkeypatch.setitem(api.PREFERENCE, "gpu", ("mosaic", "blocks"))
    with caplog.at_level(logging.WARNING, "tinker_jax"):
        for _ in range(2):
            y = grouped_matmul(x, w, sizes, transposed=True, frozen=True, mesh=mesh)  # pyright: ignore[reportArgumentType]
    close(y, reference_grouped_matmul(x, w, sizes, transposed=True), jnp.float32)
    assert [r.getMessage() for r in caplog.records] == [
        "grouped matmul: mosaic is not used: the kernel is for compute capability 9.0 (Hopper), the GPU has 8.6"
    ]


def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    x, w, sizes, _ = make(*CASES["rows behind"], transposed=True)
    with pytest.raises(ValueError, match=r"x \(41, 24\), w \(4, 40, 24\) and sizes \(4,\) do not fit .* transposed=False"):
        grouped_matmul(x, w, sizes, transposed=False, frozen=True)
    with pytest.raises(ValueError, match="x is bfloat16 and w is float32"):
        grouped_matmul(x.astype(jnp.bfloat16), w, sizes, transposed=True, frozen=True)


_by_expert, _combine = jax.jit(by_expert, static_argnums=1), jax.jit(combine)


@settings(max_examples=40, deadline=None)
@given(M=st.sampled_from([1, 32]), K=st.sampled_from([1, 3]), E=st.sampled_from([1, 6, 40]), seed=st.integers(0, 99))
def test_dispatch_is_a_stable_sort_and_combine_its_weighted_inverse(M, K, E, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, E + 1, (M, K)).astype(np.int32)
    rows, place, sizes = (np.asarray(a) for a in _by_expert(jnp.asarray(ids), E))
    order = np.argsort(ids.ravel(), kind="stable")
    np.testing.assert_array_equal(rows, order // K)
    np.testing.assert_array_equal(sizes, np.bincount(ids.ravel(), minlength=E + 1)[:E])
    inverse = np.empty(M * K, int)
    inverse[order] = np.arange(M * K)
    np.testing.assert_array_equal(place, np.where(ids < E, inverse.reshape(M, K), M * K))

    y, weights = rng.standard_normal((M * K, 3), np.float32), rng.standard_normal((M, K), np.float32)
    y[sizes.sum() :] = np.nan
    want = np.einsum("MK,MKD->MD", weights, np.where((ids < E)[:, :, None], y[inverse.reshape(M, K)], 0))
    got = _combine(jnp.asarray(y), jnp.where(ids < E, weights, jnp.nan), jnp.asarray(place))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_of_spread_and_combine_are_those_of_plain_indexing():
    M, K, E, D = 9, 3, 5, 4
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, E + 1, (M, K)), jnp.int32)
    x, weights, scale = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((M, D), (M, K), (M * K, D)))
    dispatch = by_expert(ids, E)
    held = (ids < E)[:, :, None]

    def ours(x, weights):
        return jnp.sum(jnp.sin(combine(scale * spread(x, dispatch), weights, dispatch.place_MK)))

    def plain(x, weights):
        y = scale * x[dispatch.rows_S]
        chosen = jnp.where(held, y[jnp.minimum(dispatch.place_MK, M * K - 1)], 0)
        return jnp.sum(jnp.sin(jnp.einsum("MK,MKD->MD", weights, chosen)))

    for got, want in zip(
        jax.jit(jax.grad(ours, (0, 1)))(x, weights), jax.jit(jax.grad(plain, (0, 1)))(x, weights), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    traced = jax.make_jaxpr(jax.grad(ours, (0, 1)))(x, weights)
    assert "scatter-add" not in {str(equation.primitive) for equation in equations(traced)}


def test_combine_sums_in_float32_and_returns_the_dtype_of_y():
    y = combine(jnp.asarray([[256], [1], [1]], jnp.bfloat16), jnp.ones((1, 3)), jnp.arange(3, dtype=jnp.int32)[None])
    assert y.dtype == jnp.bfloat16 and y[0, 0] == 258  # 256 + 1 is 256 in bfloat16


def test_more_choices_than_an_integer_can_order_are_refused():
    with pytest.raises(ValueError, match="do not fit into 32 bits; dispatch fewer tokens"):
        jax.eval_shape(lambda ids: by_expert(ids, 512), jax.ShapeDtypeStruct((1 << 20, 8), jnp.int32))


def test_a_layer_of_experts_equals_one_expert_after_the_other():
    M, K, E, D, N = 20, 2, 4, 8, 12
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.standard_normal((M, E)), 1)[:, :K].astype(np.int32)
    x, w, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, D), (E, N, D), (M, K)))
    dispatch: Dispatch = by_expert(jnp.asarray(ids), E)
    y = grouped_matmul(spread(jnp.asarray(x), dispatch), jnp.asarray(w), dispatch.sizes_E, transposed=True, frozen=True)
    want = np.einsum("MK,MKND,MD->MN", weights, w[ids], x)
    np.testing.assert_allclose(combine(y, jnp.asarray(weights), dispatch.place_MK), want, rtol=1e-4, atol=1e-4)
