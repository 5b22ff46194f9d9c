"""A user's program. `make lint` checks its types, strictly and against the installed package; nothing runs it."""

from typing import assert_type

import jax
import numpy as np
import torch

import tinker_jax as tinker
from tinker_jax import types

service = tinker.ServiceClient(engine=tinker.EngineConfig(dtype="float32", mesh={"data": 1}))
client = service.create_lora_training_client(base_model="tinker-jax/tiny-qwen3", rank=8, seed=0).result()
assert_type(client, tinker.TrainingClient)

# Data: lists and arrays are taken, tensors are kept.
datum = types.Datum(
    model_input=types.ModelInput.from_ints(tokens=[1, 2]),
    loss_fn_inputs=dict(weights=[0.0, 1.0], target_tokens=[2, 3]),  # noqa: C408  as in the SDK's documentation
)
assert_type(datum.loss_fn_inputs["weights"], tinker.TensorData)
targets = types.TensorData([2, 3], "int64")
data = [
    datum,
    types.Datum(types.ModelInput.from_ints(np.arange(2)), {"target_tokens": targets, "weights": np.ones(2)}),
    types.Datum(types.ModelInput.from_ints(torch.arange(2)), {"target_tokens": [2, 3], "weights": torch.ones(2)}),
    types.Datum(types.ModelInput(chunks=[types.EncodedTextChunk(tokens=np.arange(2))])),
]
types.Datum(types.ModelInput.empty(), 3)  # pyright: ignore[reportArgumentType]


def of_jax(tokens: jax.Array, weights: jax.Array) -> types.Datum:
    return types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": tokens, "weights": weights})


# Training: a future has no metrics, its result has.
future = client.forward_backward(data, "cross_entropy")
_ = future.metrics  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
output = future.result()
assert_type(output, tinker.ForwardBackwardOutput)
assert_type(output.metrics, dict[str, float])
assert_type(output.loss_fn_outputs[0]["logprobs"], tinker.TensorData)
client.forward(data, "ppo", {"clip_low_threshold": 0.8})
client.forward(data, "reinforce")  # pyright: ignore[reportArgumentType]
assert_type(client.optim_step(types.AdamParams(learning_rate=1e-4)).result(), tinker.OptimStepResponse)
assert_type(client.save_state("final").result().path, str)

# Sampling.
sampler = client.save_weights_and_get_sampling_client().result()
assert_type(sampler, tinker.SamplingClient)
params = types.SamplingParams(max_tokens=16, stop=["\n"])
response = sampler.sample(types.ModelInput.from_ints([1]), num_samples=2, sampling_params=params).result()
assert_type(response, tinker.SampleResponse)
assert_type(response.sequences[0].tokens, list[int])
assert_type(sampler.compute_logprobs(types.ModelInput.from_ints([1, 2])).result(), list[float | None])


async def in_an_event_loop() -> None:
    assert_type(await service.create_sampling_client(base_model="tinker-jax/tiny-qwen3"), tinker.SamplingClient)
    assert_type(await client.forward_backward(data, "cross_entropy"), tinker.ForwardBackwardOutput)
    assert_type(await sampler.sample(types.ModelInput.from_ints([1]), 1, params), tinker.SampleResponse)
