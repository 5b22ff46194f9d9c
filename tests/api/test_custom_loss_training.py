"""Custom losses through the real engine: a custom cross-entropy must train exactly as the built-in one."""

from __future__ import annotations

import numpy as np
import pytest

import tinker_jax
from tinker_jax import AdamParams, Datum, EngineConfig, ModelInput, ServiceClient


@pytest.fixture(scope="module")
def service(checkpoint, tmp_path_factory):
    with ServiceClient(engine=EngineConfig(home=tmp_path_factory.mktemp("home"))) as service:
        yield service, str(checkpoint("qwen3"))


def batch() -> list[Datum]:
    rng = np.random.default_rng(0)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 300, n).tolist()),
            {"target_tokens": rng.integers(0, 300, n), "weights": rng.random(n, np.float32)},
        )
        for n in (5, 9)
    ]


def cross_entropy(data, logprobs):
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in data]
    if hasattr(logprobs[0], "requires_grad"):
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    loss = -sum((w * lp).sum() for w, lp in zip(weights, logprobs, strict=True))
    return loss, {"custom/datums:sum": len(data)}


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_custom_cross_entropy_trains_as_the_built_in_one(service, backend):
    client_of, data = service[0].create_lora_training_client, batch()
    outputs, losses = [], []
    for custom in (False, True):
        client = client_of(service[1], rank=4, seed=0).result()
        for _ in range(2):
            if custom:
                output = client.forward_backward_custom(data, cross_entropy, backend=backend)
            else:
                output = client.forward_backward(data, "cross_entropy")
            step = client.optim_step(AdamParams(learning_rate=1e-2))
            outputs.append((output.result(), step.result().metrics))
        losses.append(client.forward(data, "cross_entropy").result().metrics["loss:sum"])
    for (built_in, step), (custom, custom_step) in zip(outputs[:2], outputs[2:], strict=True):
        np.testing.assert_allclose(custom.metrics["loss:sum"], built_in.metrics["loss:sum"], rtol=1e-5)
        assert custom.metrics["custom/datums:sum"] == 2
        assert "surrogate_loss:sum" in custom.metrics
        for ours, theirs in zip(custom.loss_fn_outputs, built_in.loss_fn_outputs, strict=True):
            np.testing.assert_allclose(ours["logprobs"].to_numpy(), theirs["logprobs"].to_numpy(), atol=1e-5)
        assert custom_step.keys() == step.keys()
        np.testing.assert_allclose(list(custom_step.values()), list(step.values()), rtol=1e-5)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_calls_queued_behind_a_failing_custom_loss_see_weights_and_gradient_unchanged(service):
    data, results = batch(), []

    def broken(data, logprobs):
        raise KeyError("mine")

    for fail in (False, True):
        client = service[0].create_lora_training_client(service[1], rank=4, seed=0).result()
        client.forward_backward(data, "cross_entropy")
        failing = client.forward_backward_custom(data, broken) if fail else None
        step = client.optim_step(AdamParams(learning_rate=1e-2))
        after = client.forward(data, "cross_entropy")
        results.append((step.result().metrics, after.result().metrics))
        if failing is not None:
            with pytest.raises(KeyError, match="mine"):
                failing.result()
    assert results[0] == results[1]


def test_data_that_only_the_model_can_judge_is_refused_and_the_client_goes_on(service):
    client = service[0].create_lora_training_client(service[1], rank=4, seed=0).result()
    wrong = Datum(ModelInput.from_ints([1]), {"target_tokens": [10**6]})
    with pytest.raises(tinker_jax.BadRequestError, match=r"data\[0\].*target_tokens"):
        client.forward_backward_custom([wrong], cross_entropy)
    assert "loss:sum" in client.forward(batch(), "cross_entropy").result().metrics
