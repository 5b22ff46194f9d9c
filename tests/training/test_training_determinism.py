"""Under `deterministic` a datum's numbers are the same bit for bit in any call. See also `test_determinism_table.py`."""

import jax
import numpy as np
import pytest
import tiny

from tinker_jax import sharding
from tinker_jax.memory import Plan
from tinker_jax.models.weights import weights
from tinker_jax.training.packing import bucket, pack_apart
from tinker_jax.training.pending import complete
from tinker_jax.training.trainer import Trainer
from tinker_jax.types import Datum, LoraConfig, ModelInput

LORA = LoraConfig(rank=4, seed=0)


def datum(seed, length, wide=None, loss_fn="cross_entropy"):
    rng = np.random.default_rng([seed, length])
    shape = (length,) if wide is None else (length, wide)
    inputs = {"target_tokens": rng.integers(2, 90, shape)}
    if loss_fn == "cross_entropy":
        inputs["weights"] = rng.normal(size=shape).astype(np.float32)
    else:
        inputs |= {k: rng.normal(size=shape).astype(np.float32) for k in ("logprobs", "advantages")}
    return Datum(ModelInput.from_ints(rng.integers(2, 90, length).tolist()), inputs)


def others(seed, count=63):
    rng = np.random.default_rng(seed)
    return [datum(seed * 1000 + i, int(n)) for i, n in enumerate(rng.integers(3, 300, count))]


class Run:
    """A deterministic trainer and an adapter far from zero; each call has its own gradients."""

    def __init__(self, mesh=None):
        cfg, params = tiny.base_params("qwen3", tiny.model("qwen3"))
        mesh = sharding.make_mesh(mesh)
        placed = {w.name: jax.device_put(params[w.name], sharding.named(mesh, w.full_axes)) for w in weights(cfg)}
        self.trainer = Trainer(cfg, placed, mesh, Plan(512, "none", 1 << 20, at_once=1024), deterministic=True)
        self.state = self.trainer.new_adapter(LORA, 0)
        rng = np.random.default_rng(0)
        noisy = lambda x: jax.device_put(x + 0.05 * rng.normal(size=x.shape).astype(np.float32), x.sharding)  # noqa: E731
        self.state.params = jax.tree.map(noisy, self.state.params)

    def __call__(self, data, loss_fn="cross_entropy", backward=True):
        self.state.grads = None
        logprobs, metrics = complete(self.trainer.forward_backward(self.state, data, loss_fn, None, backward=backward)).finish()
        grads = None if self.state.grads is None else [np.asarray(x) for x in jax.tree.leaves(self.state.grads)]
        return logprobs, grads, metrics


@pytest.fixture(scope="module")
def run():
    return Run()


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_with_any_loss_and_with_or_without_gradients_log_probabilities_are_the_same(run, mesh):
    run = run if mesh is None else Run(mesh)
    targets, policy = datum(2, 60), datum(3, 60, loss_fn="importance_sampling")
    inputs = policy.loss_fn_inputs | {"target_tokens": targets.loss_fn_inputs["target_tokens"]}
    policy = Datum(targets.model_input, inputs)
    ((expected,), _, _) = run([targets], backward=False)
    for loss_fn in ("cross_entropy", "importance_sampling", "ppo"):
        for backward in (False, True):
            ((logprobs,), _, _) = run([targets if loss_fn == "cross_entropy" else policy], loss_fn, backward)
            np.testing.assert_array_equal(logprobs, expected)


def test_identical_datums_agree_bit_for_bit(run):
    one = datum(3, 77)
    logprobs, _, _ = run([one, *others(2, 9), one, one])
    assert all(np.array_equal(logprobs[0], logprobs[i]) for i in (10, 11))


def test_a_datums_gradient_is_the_same_in_any_company(run):
    """A call's gradient is the sum, in the order of its data, of what each has alone."""
    data = [datum(5, n) for n in (20, 140, 61, 61)]
    alone = [run([one])[1] for one in data]
    _, together, _ = run(data)
    _, reordered, _ = run(data[::-1])
    for i, (sums, backwards) in enumerate(zip(together, reordered, strict=True)):
        expected, other = alone[0][i].copy(), alone[3][i].copy()
        for at in (1, 2, 3):
            expected += alone[at][i]
            other += alone[3 - at][i]
        np.testing.assert_array_equal(sums, expected)
        np.testing.assert_array_equal(backwards, other)


def test_neither_wider_targets_nor_optional_inputs_of_others_change_anything(run):
    one = datum(4, 50)
    ((alone,), _, _) = run([one])
    logprobs, _, _ = run([datum(1, 50, wide=3), one, datum(2, 50, wide=1)])
    np.testing.assert_array_equal(logprobs[1], alone)
    policy = datum(4, 50, loss_fn="importance_sampling")
    ((alone,), grads, _) = run([policy], "importance_sampling")
    logprobs, _, _ = run([datum(6, 90, loss_fn="importance_sampling"), policy], "importance_sampling")
    np.testing.assert_array_equal(logprobs[1], alone)
    assert any(np.abs(x).max() > 0 for x in grads)


def test_rows_of_several_devices_hold_one_sequence_each_and_it_is_the_same_on_any_of_them():
    run = Run({"data": 2, "fsdp": 2, "tensor": 2})
    one, company = datum(7, 60), others(3, 6)
    ((alone,), _, _) = run([one])
    for at in (0, 1, 2, 3, 6):
        logprobs, _, _ = run([*company[:at], one, *company[at:]])
        np.testing.assert_array_equal(logprobs[at], alone)


def test_every_sequence_is_packed_once_into_a_row_of_its_own_bucket():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 700, 40)
    tokens = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]
    inputs = [{"w": np.zeros((n, 1 + i % 3)) if i % 2 else np.zeros(n)} for i, n in enumerate(lengths)]
    for rows in (1, 4):
        batches = pack_apart(tokens, inputs, rows=rows)
        assert sorted(place[0] for batch in batches for place in batch.places) == list(range(40))
        for batch in batches:
            assert {bucket(n) for _, _, _, n in batch.places} == {batch.tokens.shape[1]}
            assert len({row for _, row, _, _ in batch.places}) == len(batch.places)
            assert len({inputs[i]["w"].ndim for i, *_ in batch.places}) == 1
    assert [place[0] for batch in pack_apart(tokens, inputs) for place in batch.places] == list(range(40))
