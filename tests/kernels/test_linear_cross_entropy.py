"""The tiled head: equal to full logits in value and gradient, bounded in memory, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import products

from tinker_jax.kernels.linear_cross_entropy import default_tile, linear_cross_entropy, linear_top_k
from tinker_jax.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference, linear_top_k_reference
from tinker_jax.kernels.linear_cross_entropy.xla import plan_tiles

D, V, R = 16, 97, 4
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 4e-2}  # relative to the largest entry of the array


def problem(rows, targets=1, dtype=jnp.float32, lora=True, seed=0):
    rng = np.random.default_rng(seed)
    h_MD = jnp.asarray(rng.normal(size=(rows, D)), dtype)
    kernel_VD = jnp.asarray(rng.normal(size=(V, D)), dtype)
    targets_MK = jnp.asarray(rng.integers(0, V, (rows, targets)), jnp.int32)
    factors = {
        "a": jnp.asarray(rng.normal(size=(D, R)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(R, V)) / 4, jnp.float32),
    }
    g_MK = jnp.asarray(rng.normal(size=(rows, targets)), jnp.float32)
    return h_MD, kernel_VD, targets_MK, factors if lora else None, g_MK


def value_and_grads(fn, h_MD, kernel_VD, targets_MK, lora, g_MK, **options):
    def loss(h_MD, lora):
        logprobs_MK, entropy_M = fn(h_MD, kernel_VD, targets_MK, lora=lora, **options)
        return jnp.sum(logprobs_MK * g_MK), (logprobs_MK, entropy_M)

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h_MD, lora)
    return outputs, grads


def assert_near(got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(1.0, np.abs(w).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("block", [V, 32, 7, 40], ids=["whole-vocabulary", "blocks", "many-blocks", "last-block-overlaps-much"])
@pytest.mark.parametrize(
    ("rows", "targets", "tile", "lora"),
    [(24, 1, 8, True), (24, 3, 8, False), (23, 2, 8, True), (5, 1, 64, True), (23, 12, 7, True), (1, 1, 1, False)],
    ids=["even", "no-lora", "padded", "one-tile", "many-targets", "one-row"],
)
def test_values_and_gradients_equal_those_of_full_logits(dtype, rows, targets, tile, lora, block):
    args = problem(rows, targets, dtype, lora)
    got = value_and_grads(linear_cross_entropy, *args, tile=tile, block=block, entropy=True)
    want = value_and_grads(linear_cross_entropy_reference, *args)
    assert got[0][0].dtype == got[0][1].dtype == jnp.float32
    assert [g.dtype for g in jax.tree.leaves(got[1])] == [w.dtype for w in jax.tree.leaves(want[1])]
    assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("block", [V, 32])
def test_log_probabilities_are_the_same_bits_with_and_without_a_gradient(block):
    h, kernel, targets, lora, g = problem(23, 2)
    options = {"tile": 8, "block": block, "entropy": True}
    alone = jax.jit(lambda h, lora: tuple(linear_cross_entropy(h, kernel, targets, lora=lora, **options)))(h, lora)
    outputs, _ = value_and_grads(linear_cross_entropy, h, kernel, targets, lora, g, **options)
    for x, y in zip(alone, outputs, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("block", [V, 32])
def test_a_bfloat16_gradient_keeps_its_digits_where_the_target_is_almost_certain(block):
    h, kernel, _, _, g = problem(24, dtype=jnp.bfloat16, lora=False)
    h = (3 * h).astype(jnp.bfloat16)
    targets = jnp.argmax(h @ kernel.T, axis=-1)[:, None]
    probability = jnp.exp(linear_cross_entropy(h, kernel, targets).logprobs_MK)
    assert jnp.sum(probability > 0.99) >= 8
    _, (dh, _) = value_and_grads(linear_cross_entropy, h, kernel, targets, None, g, tile=8, block=block)
    _, (exact, _) = value_and_grads(
        linear_cross_entropy_reference, h.astype(jnp.float32), kernel.astype(jnp.float32), targets, None, g
    )
    size_M = np.linalg.norm(exact, axis=-1)
    error_M = np.linalg.norm(np.asarray(dh, np.float32) - exact, axis=-1)
    seen = size_M > 1e-4  # below, float32 itself cancels
    assert (error_M[seen] < 0.02 * size_M[seen]).all()


def test_a_repeated_target_counts_once_for_each_mention():
    h, kernel, _, lora, _ = problem(6)
    targets = jnp.full((6, 10), 5, jnp.int32)
    g = jnp.ones((6, 10), jnp.float32)
    _, many = value_and_grads(linear_cross_entropy, h, kernel, targets, lora, g)
    _, once = value_and_grads(linear_cross_entropy, h, kernel, targets[:, :1], lora, 10 * g[:, :1])
    assert_near(many, once, 1e-5)


def test_entropy_is_absent_unless_asked_for_and_carries_no_gradient():
    h, kernel, targets, lora, _ = problem(9)
    assert linear_cross_entropy(h, kernel, targets, lora=lora).entropy_M is None

    def total_entropy(h):
        entropy_M = linear_cross_entropy(h, kernel, targets, lora=lora, entropy=True).entropy_M
        assert entropy_M is not None
        return entropy_M.sum()

    grad = jax.grad(total_entropy)(h)
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("block", [V, 32])
def test_extreme_logits_stay_finite(block):
    h, kernel, targets, lora, g = problem(9)
    outputs, grads = value_and_grads(linear_cross_entropy, 1e4 * h, kernel, targets, lora, g, tile=4, block=block, entropy=True)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((outputs, grads)))


def test_rows_with_zero_cotangent_get_exactly_zero_gradient():
    h, kernel, targets, lora, g = problem(9)
    _, (dh, _) = value_and_grads(linear_cross_entropy, h, kernel, targets, lora, g.at[4].set(0.0), tile=4)
    np.testing.assert_array_equal(dh[4], 0.0)


@pytest.mark.parametrize("rows", [16, 13])
def test_top_k_equals_that_of_full_logits(rows):
    h, kernel, _, lora, _ = problem(rows)
    got = jax.jit(lambda h, lora: linear_top_k(h, kernel, 5, lora=lora, tile=4))(h, lora)
    want = linear_top_k_reference(h, kernel, 5, lora=lora)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])


def test_rows_over_data_axes_and_vocabulary_over_tensor_give_the_same_numbers():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    vocab = 96
    h, kernel, targets, _, g = problem(64, 2)
    kernel, targets = kernel[:vocab], targets % vocab
    lora = {"a": h[:D, :R], "b": kernel[:, :R].T}

    def step(h, kernel, targets, lora, g):
        def loss(h, lora):
            out = linear_cross_entropy(h, kernel, targets, lora=lora, tile=16, block=vocab, entropy=True)
            return jnp.sum(out.logprobs_MK * g), out

        top = linear_top_k(h, kernel, 3, lora=lora, tile=16)
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(h, lora), top

    rows, head = P(("data", "fsdp")), P("tensor")
    specs = (rows, head, rows, {"a": P(), "b": P(None, "tensor")}, rows)
    args = (h, kernel, targets, lora, g)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), args, specs)
    compiled = jax.jit(step).lower(*placed).compile()
    assert_near(compiled(*placed), jax.jit(step)(*args), 1e-5)
    # A tile of 16 rows is 4 rows on each of the 4 data shards and half the vocabulary on each of the 2 others.
    program = compiled.as_text() or ""
    assert f"f32[4,{vocab // 2}]" in program
    assert f"f32[64,{vocab}]" not in program


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("block", [None, 151_936], ids=["blocks", "whole-vocabulary"])
def test_memory_is_one_tile_whatever_the_number_of_tokens(tied, lora, block):
    vocab, width, rank = 151_936, 512, 8
    tile_bytes, head_bytes = 4 * vocab * default_tile(vocab), 4 * vocab * width

    def temp_bytes(rows):
        def loss(h, factors, kernel, targets):
            h = h + kernel[targets[:, 0]] if tied else h
            out = linear_cross_entropy(h, kernel, targets, lora=factors, entropy=True, block=block)
            return out.logprobs_MK.sum(), out.entropy_M

        shape = jax.ShapeDtypeStruct
        factors = {"a": shape((width, rank), jnp.float32), "b": shape((rank, vocab), jnp.float32)} if lora else None
        args = shape((rows, width), jnp.float32), factors, shape((vocab, width), jnp.float32), shape((rows, 1), jnp.int32)
        memory = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*args).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    few, many = temp_bytes(2048), temp_bytes(16_384)
    assert tile_bytes <= 64 << 20
    assert few < 1.5 * tile_bytes < head_bytes / 3  # so there is neither a copy nor a gradient of the head
    hidden_bytes = 4 * (16_384 - 2048) * width
    assert many - few < 3.05 * hidden_bytes  # hidden states in the order of the tiles, rows of the mean in it and out of it


@pytest.mark.parametrize(("lora", "times"), [(False, 2), (True, 3)], ids=["frozen", "lora"])
def test_a_head_pays_for_logits_and_the_mean_of_its_rows_and_once_more_for_an_adapter(lora, times):
    h, kernel, targets, factors, g = problem(24, lora=lora)

    def loss(h, factors, kernel):
        return jnp.sum(g * linear_cross_entropy(h, kernel, targets, lora=factors, tile=8).logprobs_MK)

    # Asked for the head's gradient too, which is zero by definition.
    found = sorted(products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(h, factors, kernel)))
    assert found[-times:] == [8 * V * D] * times
    assert all(size <= 24 * V * R for size in found[:-times]) and (len(found) > times) == lora


def test_the_frozen_head_gets_a_zero_gradient():
    h, kernel, targets, lora, _ = problem(9)
    grad = jax.grad(lambda kernel: linear_cross_entropy(h, kernel, targets, lora=lora).logprobs_MK.sum())(kernel)
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize(
    ("rows", "tile", "expected"),
    [(64, 16, (4, 16)), (64, 100, (1, 64)), (1000, 104, (10, 100)), (24, 7, (4, 6)), (997, 104, (10, 100))],
)
def test_tiles_divide_the_rows_when_they_can(rows, tile, expected):
    assert plan_tiles(rows, tile) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h_MD": jnp.zeros((3, D + 1))}, "of one width"),
        ({"targets_MK": jnp.zeros((3,), jnp.int32)}, r"targets_MK must be \[3, K\]"),
        ({"targets_MK": jnp.zeros((4, 1), jnp.int32)}, r"targets_MK must be \[3, K\]"),
        ({"targets_MK": jnp.zeros((3, 1), jnp.float32)}, "must hold integers, got float32"),
        ({"lora": {"a": jnp.zeros((D, R)), "b": jnp.zeros((V, R))}}, r"expected lora a \[16, R\] and b \[R, 97\]"),
        ({"tile": -1}, "tile must be at least 1 row"),
        ({"block": -1}, "block must be at least 1 token"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(change, message):
    args = {"h_MD": jnp.zeros((3, D)), "kernel_VD": jnp.zeros((V, D)), "targets_MK": jnp.zeros((3, 1), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(args | change))


def test_top_k_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="k must be between 1 and the vocabulary's 97, got 98"):
        linear_top_k(jnp.zeros((3, D)), jnp.zeros((V, D)), 98)
