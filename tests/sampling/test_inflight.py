"""Sampling clients that follow training, and those that do not."""

from concurrent.futures import Future

import numpy as np
import pytest

import tinker_jax as tinker
from tinker_jax.engine.config import EngineConfig

PROMPT = tinker.ModelInput.from_ints(list(range(2, 40)))
DATA = [tinker.Datum(model_input=PROMPT, loss_fn_inputs={"target_tokens": list(range(3, 41))})]


@pytest.fixture
def training(checkpoint, tmp_path):
    service = tinker.ServiceClient(engine=EngineConfig(home=tmp_path))
    return service.create_lora_training_client(str(checkpoint("qwen3")), rank=8, seed=0).result(120)


def step(training):
    training.forward_backward(DATA, "cross_entropy")
    training.optim_step(tinker.AdamParams(learning_rate=0.05)).result(120)


def scores(client):
    return np.array(client.compute_logprobs(PROMPT).result(120)[1:])


def test_inflight_clients_follow_each_other_and_snapshots_stay(training):
    first = training.save_weights_and_get_sampling_client(kind="inflight").result(120)
    fixed = training.save_weights_and_get_sampling_client().result(120)
    before = scores(first)
    step(training)
    np.testing.assert_array_equal(scores(first), before)  # training alone moves nobody
    second = training.save_weights_and_get_sampling_client(kind="inflight").result(120)
    after = scores(second)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(scores(first), after, atol=1e-5)
    np.testing.assert_array_equal(scores(fixed), before)


def test_weights_change_in_the_middle_of_a_sequence(training):
    """The chunks drawn before stay, those after come from the new weights on the old keys and values."""
    client = training.save_weights_and_get_sampling_client(kind="inflight").result(120)
    engine = training._engine
    params = tinker.SamplingParams(max_tokens=60, temperature=0, stop=[])
    request = tinker.types.SampleRequest(prompt=PROMPT, num_samples=1, sampling_params=params)
    (old,) = client.sample(PROMPT, 1, params).result(120).sequences
    step(training)
    newer = training.save_weights_and_get_sampling_client().result(120)
    weights = engine._samplers[newer._sampler_id].adapter

    def halfway():
        sampler, future = engine._sampler, Future()
        sampler.submit(request, client._sampler_id, engine._samplers[client._sampler_id].adapter, future)
        for _ in range(2):
            sampler.step()
        (running,) = sampler._scheduler.running
        drawn = len(running.drawn)
        sampler.replace(client._sampler_id, weights)
        while sampler.step():
            pass
        return drawn, future.result(0).sequences[0]

    drawn, mixed = engine._worker.submit("test", halfway).result(120)
    assert 0 < drawn < 60 and len(mixed.tokens) == 60
    assert mixed.tokens[:drawn] == old.tokens[:drawn]
    (new,) = (
        newer.sample(tinker.ModelInput.from_ints([*PROMPT.to_ints(), *old.tokens[:drawn]]), 1, params).result(120).sequences
    )
    # The first token after the change: new weights read the newest token, keys and values before it are the old ones.
    assert abs(mixed.logprobs[drawn] - old.logprobs[drawn]) > 1e-3
    assert mixed.logprobs[drawn] != new.logprobs[0]
