"""Every loss against an independent NumPy float64 formula: values, gradients, packing, padding, metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax.losses import Packing, combine_metrics, default_config, evaluate
from tinker_jax.types.loss_specs import LOSS_SPECS

ROWS, SEQUENCES = 32, 5  # one shape for all examples, so that each loss compiles once
RATIO_LOSSES = [name for name in LOSS_SPECS if name != "cross_entropy"]


# ---- The formulas again, in float64, sequence by sequence, each with its derivative in lp worked out by hand. ----


def numpy_loss(name, lp, x, config):
    """(loss at each position, its gradient in lp) of one sequence; x holds the inputs, config all keys."""
    lp = np.asarray(lp, np.float64)
    if name == "cross_entropy":
        return -lp * x["weights"], -x["weights"]
    q, A = x["logprobs"], x["advantages"]
    r = np.exp(lp - q)
    if name == "importance_sampling":
        return -r * A, -r * A
    if name == "dro":
        return -(lp * A - 0.5 * config["beta"] * (lp - q) ** 2), -(A - config["beta"] * (lp - q))
    hi = x.get("clip_high_threshold", config["clip_high_threshold"])
    if name == "stable_reinforce":
        counted = (q != 0) | (A != 0)
        weight, beta = np.minimum(r, hi), config["kl_coeff"] * counted
        return -weight * lp * A + beta * (r - 1 - (lp - q)), -weight * A + beta * (r - 1)
    lo = x.get("clip_low_threshold", config["clip_low_threshold"])
    if name == "cispo":
        weight = np.clip(r, lo, hi)
        return -weight * lp * A, -weight * A
    if name == "gspo":
        m = x["sequence_ratio_mask"] != 0
        if not m.any():
            return np.zeros_like(lp), np.zeros_like(lp)
        r = np.full_like(lp, np.exp(np.mean((lp - q)[m])))
    free, bounded = r * A, np.clip(r, lo, hi) * A
    return -np.minimum(free, bounded), np.where(free <= bounded, -r * A, 0.0)


# ---- Random packed micro-batches ----


@st.composite
def micro_batches(draw, name, targets=None):
    """(logprobs, inputs, config overrides, lengths) of up to `SEQUENCES` sequences that leave some padding."""
    seed = draw(st.integers(0, 2**32 - 1))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    spread = draw(st.sampled_from([0.01, 0.5, 3.0]))
    rng = np.random.default_rng(seed)
    shape = (sum(lengths),) if targets is None else (sum(lengths), targets)
    spec = LOSS_SPECS[name]
    lp = -rng.exponential(2.0, shape)
    prompt = rng.random(shape) < 0.3
    values = {
        "weights": lambda: rng.normal(size=shape),
        "logprobs": lambda: np.where(prompt, 0.0, lp + spread * rng.normal(size=shape)),
        "advantages": lambda: np.where(prompt, 0.0, rng.normal(size=shape) * rng.integers(0, 2, shape)),
        "sequence_ratio_mask": lambda: np.where(prompt, 0.0, rng.integers(0, 3, shape)),
        "clip_low_threshold": lambda: rng.uniform(0.2, 0.99, shape),
        "clip_high_threshold": lambda: rng.uniform(1.01, 3.0, shape),
    }
    optional = [key for key, declared in spec.inputs.items() if not declared.required]
    chosen = draw(st.lists(st.sampled_from(optional), unique=True)) if optional else []
    inputs = {
        key: values[key]().astype(np.float32)
        for key, declared in spec.inputs.items()
        if key != "target_tokens" and (declared.required or key in chosen)
    }
    ranges = {"beta": (0.0, 2.0), "kl_coeff": (0.0, 1.0), "clip_low_threshold": (0.0, 0.95)}
    ranges["clip_high_threshold"] = (1.05, 5.0)
    overrides = {
        key: draw(st.floats(*ranges[key]))
        for key in draw(st.lists(st.sampled_from(sorted(spec.config)), unique=True) if spec.config else st.just([]))
    }
    return lp.astype(np.float32), inputs, overrides, lengths


def packed(lp, inputs, lengths, padding=0.0):
    """The arrays padded to `ROWS` with `padding`, and the packing."""

    def pad(x, value) -> Any:
        return np.concatenate([x, np.full((ROWS - len(x), *x.shape[1:]), value, x.dtype)])

    sequence_M = pad(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), len(lengths))
    packing = Packing(pad(np.ones(len(lp), bool), False), sequence_M, SEQUENCES)
    return pad(lp, padding), {key: pad(x, padding) for key, x in inputs.items()}, packing


def _run(name, lp, inputs, config, mask_M, sequence_M, entropy_M):
    def total(lp):
        out = evaluate(name, lp, inputs, config, Packing(mask_M, sequence_M, SEQUENCES), entropy_M)
        return jnp.sum(out.per_token_loss), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(lp)
    return out, gradient


_run = jax.jit(_run, static_argnames="name")


def run(name, lp, inputs, lengths, overrides=None, padding=0.0, entropy=None):
    """(LossOutput, gradient in lp) of packed sequences, jitted as in the engine; the packing adds the padding."""
    lp_M, inputs_M, packing = packed(lp, inputs, lengths, padding)
    entropy_M = None if entropy is None else np.concatenate([entropy, np.full(ROWS - len(entropy), padding, np.float32)])
    out, gradient = _run(name, lp_M, inputs_M, default_config(name, overrides), *packing[:2], entropy_M)
    return jax.tree.map(np.asarray, (out, gradient))


def expected(name, lp, inputs, overrides, lengths):
    config = {key: float(value) for key, value in default_config(name, overrides).items()}
    inputs = {"weights": np.ones_like(lp), **inputs} if name == "cross_entropy" else inputs
    ends = np.cumsum(lengths)
    parts = []
    for start, end in zip(ends - lengths, ends, strict=True):
        x = {key: value[start:end].astype(np.float64) for key, value in inputs.items()}
        parts.append(numpy_loss(name, lp[start:end], x, config))
    return (np.concatenate(part) for part in zip(*parts, strict=True))


def check_against_numpy(name, batch):
    lp, inputs, overrides, lengths = batch
    out, gradient = run(name, lp, inputs, lengths, overrides)
    want_loss, want_gradient = expected(name, lp, inputs, overrides, lengths)
    n = len(lp)
    np.testing.assert_allclose(out.per_token_loss[:n], want_loss, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradient[:n], want_gradient, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(out.per_token_loss[n:], 0.0)
    np.testing.assert_array_equal(gradient[n:], 0.0)
    total = combine_metrics([out.metrics])["loss:sum"]
    np.testing.assert_allclose(total, want_loss.sum(), rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", LOSS_SPECS)
def test_value_and_gradient_equal_the_formula_in_float64(name):
    @settings(max_examples=50, deadline=None)
    @given(batch=micro_batches(name))
    def check(batch):
        check_against_numpy(name, batch)

    check()


@settings(max_examples=25, deadline=None)
@given(batch=micro_batches("cross_entropy", targets=3))
def test_cross_entropy_of_several_targets_a_position_sums_each_with_its_weight(batch):
    check_against_numpy("cross_entropy", batch)


@pytest.mark.parametrize("name", LOSS_SPECS)
def test_the_hand_derived_gradients_are_those_of_the_formulas(name):
    """Central differences in float64, with what the loss stops held fixed, guard the reference itself."""
    rng = np.random.default_rng(7)
    lp = -rng.exponential(1.0, 6)
    x = {key: rng.normal(size=6) for key in ("weights", "advantages")}
    x |= {"logprobs": lp - 0.3 * rng.normal(size=6), "sequence_ratio_mask": np.ones(6)}
    config = {"beta": 0.3, "kl_coeff": 0.2, "clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    _, gradient = numpy_loss(name, lp, x, config)
    if name in ("cispo", "stable_reinforce"):
        frozen = numpy_loss(name, lp, x, {**config, "kl_coeff": 0.0})[1]  # −sg(weight)·A, the coefficient of lp
        drift = config["kl_coeff"] if name == "stable_reinforce" else 0.0
        loss = lambda lp: frozen * lp + drift * (np.exp(lp - x["logprobs"]) - (lp - x["logprobs"]))  # noqa: E731
    elif name == "gspo":
        loss = lambda shifted: _gspo_with_fixed_mean(lp, shifted, x, config)  # noqa: E731
    else:
        loss = lambda lp: numpy_loss(name, lp, x, config)[0]  # noqa: E731
    step = 1e-6
    numeric = (loss(lp + step) - loss(lp - step)) / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


def _gspo_with_fixed_mean(lp, shifted, x, config):
    r, A = np.exp(np.mean(lp - x["logprobs"]) + shifted - lp), x["advantages"]
    return -np.minimum(r * A, np.clip(r, config["clip_low_threshold"], config["clip_high_threshold"]) * A)


# ---- Padding, extremes ----


@pytest.mark.parametrize("garbage", [123.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", LOSS_SPECS)
def test_whatever_padding_holds_changes_nothing(name, garbage):
    rng = np.random.default_rng(3)
    lp = -rng.exponential(1.0, 11).astype(np.float32)
    inputs = {key: rng.uniform(0.5, 1.5, 11).astype(np.float32) for key in LOSS_SPECS[name].inputs}
    inputs.pop("target_tokens")
    entropy = np.ones(11, np.float32)
    clean, dirty = (run(name, lp, inputs, [5, 6], padding=value, entropy=entropy) for value in (0.0, garbage))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(dirty))


@pytest.mark.parametrize("gap", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_extreme_log_ratios_give_finite_losses_and_gradients(name, gap):
    lp = np.full(8, -1.0, np.float32)
    A = np.array([0, 0, 1, -1, 2, -2, 0, 1], np.float32)
    inputs = {"logprobs": lp - np.float32(gap), "advantages": A, "sequence_ratio_mask": np.ones(8, np.float32)}
    inputs = {key: inputs[key] for key in inputs if key in LOSS_SPECS[name].inputs}
    out, gradient = run(name, lp, inputs, [8])
    assert np.isfinite(out.per_token_loss).all() and np.isfinite(gradient).all()
    assert all(np.isfinite(value) for value in combine_metrics([out.metrics]).values())
    if name != "dro":
        np.testing.assert_array_equal(gradient[:8][A == 0], 0.0)


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_advantages_of_zero_give_no_policy_gradient(name):
    lp = np.linspace(-3, -1, 8, dtype=np.float32)
    inputs = {"logprobs": lp + 1, "advantages": np.zeros(8, np.float32), "sequence_ratio_mask": np.ones(8, np.float32)}
    inputs = {key: inputs[key] for key in inputs if key in LOSS_SPECS[name].inputs}
    _, gradient = run(name, lp, inputs, [8], {"beta": 0.0} if name == "dro" else None)
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_sequence_with_an_empty_ratio_mask_contributes_nothing_to_gspo():
    lp = np.full(6, -1.0, np.float32)
    inputs = {
        "logprobs": lp - 0.1,
        "advantages": np.ones(6, np.float32),
        "sequence_ratio_mask": np.array([0, 0, 0, 1, 1, 1], np.float32),
    }
    out, gradient = run("gspo", lp, inputs, [3, 3])
    np.testing.assert_array_equal(out.per_token_loss[:3], 0.0)
    np.testing.assert_array_equal(gradient[:3], 0.0)
    np.testing.assert_allclose(out.per_token_loss[3:6], -(1 + 4e-4), rtol=1e-6)


# ---- Clipping and configuration ----


def test_thresholds_at_a_position_override_those_of_the_configuration():
    lp = np.log(np.array([2.0, 2.0, 0.5, 0.5], np.float32))
    inputs = {
        "logprobs": np.zeros(4, np.float32),
        "advantages": np.array([1, 1, -1, -1], np.float32),
        "clip_high_threshold": np.array([1.5, 3.0, 1.5, 1.5], np.float32),
        "clip_low_threshold": np.array([0.9, 0.9, 0.7, 0.1], np.float32),
    }
    out, gradient = run("ppo", lp, inputs, [4], {"clip_low_threshold": 0.0, "clip_high_threshold": 9.0})
    np.testing.assert_allclose(out.per_token_loss[:4], [-1.5, -2.0, 0.7, 0.5], rtol=1e-6)
    np.testing.assert_allclose(gradient[:4], [0.0, -2.0, 0.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSS_SPECS if LOSS_SPECS[name].config])
def test_new_configuration_values_compile_nothing(name):
    traces = []

    @jax.jit
    def loss(lp, inputs, config, mask_M, sequence_M):
        traces.append(None)
        return evaluate(name, lp, inputs, config, Packing(mask_M, sequence_M, SEQUENCES)).per_token_loss

    lp, x = np.full(8, -1.0, np.float32), np.ones(8, np.float32)
    inputs = {key: x for key in ("logprobs", "advantages", "sequence_ratio_mask") if key in LOSS_SPECS[name].inputs}
    lp, inputs, packing = packed(lp, inputs, [8])
    for scale in (1.0, 0.5):
        config = {key: scale * value for key, value in LOSS_SPECS[name].config.items()}
        loss(lp, inputs, default_config(name, config), *packing[:2])
    assert len(traces) == 1


def test_defaults_are_overlaid_and_unknown_keys_refused():
    assert default_config("ppo", {"clip_high_threshold": 3}) == {
        "clip_low_threshold": np.float32(0.8),
        "clip_high_threshold": np.float32(3),
    }
    assert default_config("cross_entropy") == {}
    with pytest.raises(KeyError):
        default_config("ppo", {"epsilon": 0.2})


# ---- Metrics ----


def test_ratio_metrics_are_those_of_the_sampled_positions():
    ratio = np.array([7.0, 2.0, 1.0, 0.25], np.float64)
    q = np.array([0.0, -1.0, -2.0, -0.5])
    inputs = {"logprobs": q, "advantages": np.array([0.0, 1.0, 0.0, -1.0])}  # the first position is a prompt's
    inputs = {key: value.astype(np.float32) for key, value in inputs.items()}
    entropy = np.array([9.0, 1.0, 2.0, 3.0], np.float32)
    out, _ = run("ppo", (q + np.log(ratio)).astype(np.float32), inputs, [4], entropy=entropy)
    metrics = combine_metrics([out.metrics])
    log_ratio = np.log(ratio[1:])
    want = {
        "loss:sum": -1.2 + 0.8,
        "ratio:mean": np.mean(ratio[1:]),
        "ratio:min": 0.25,
        "ratio:max": 2.0,
        "kl_sampler_k1:mean": np.mean(-log_ratio),
        "kl_sampler_k3:mean": np.mean(ratio[1:] - 1 - log_ratio),
        "clip_fraction:mean": 2 / 3,
        "entropy:mean": 2.0,
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_entropy_of_cross_entropy_is_that_of_the_weighted_positions():
    weights = np.array([0.0, 1.0, -2.0], np.float32)
    out, _ = run(
        "cross_entropy", np.full(3, -1.0, np.float32), {"weights": weights}, [3], entropy=np.arange(3, dtype=np.float32)
    )
    assert combine_metrics([out.metrics]) == {"loss:sum": -1.0, "entropy:mean": 1.5}


@pytest.mark.parametrize("name", LOSS_SPECS)
def test_metrics_of_two_micro_batches_combine_to_those_of_one(name):
    rng = np.random.default_rng(11)
    lp = -rng.exponential(1.0, 12).astype(np.float32)
    inputs = {key: rng.uniform(0.2, 1.5, 12).astype(np.float32) for key in LOSS_SPECS[name].inputs if key != "target_tokens"}
    if "clip_low_threshold" in inputs:
        inputs["clip_high_threshold"] = inputs["clip_low_threshold"] + 0.5
    both, _ = run(name, lp, inputs, [5, 7])
    parts = [
        run(name, lp[at], {k: x[at] for k, x in inputs.items()}, [n])[0].metrics for at, n in ((slice(5), 5), (slice(5, 12), 7))
    ]
    one, two = combine_metrics([both.metrics]), combine_metrics(parts)
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5, err_msg=key)


def test_metrics_over_no_position_are_left_out():
    zeros = np.zeros(4, np.float32)
    out, _ = run("ppo", zeros - 1, {"logprobs": zeros, "advantages": zeros}, [4])
    assert combine_metrics([out.metrics]) == {"loss:sum": 0.0}
    assert combine_metrics([]) == {}


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="metric 'x:median' must end in :sum, :mean, :min or :max"):
        combine_metrics([{"x:median": (np.float32(1), np.float32(1))}])
