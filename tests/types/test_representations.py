"""Objects show what they are in a line or two, however much they hold."""

from __future__ import annotations

import numpy as np
import pytest

from tinker_jax import types
from tinker_jax.types import Datum, EncodedTextChunk, ModelInput, TensorData

MANY = list(range(5000))
LONG = ModelInput.from_ints(MANY)
TENSOR = TensorData(np.arange(6000, dtype=np.float32).reshape(60, 100), "float32")
SEQUENCE = types.SampledSequence("stop", "s-1", np.arange(5000, dtype=np.int32), np.zeros(5000, np.float32))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (TensorData([1, 2], "int64"), "TensorData(dtype='int64', shape=[2], data=[1, 2])"),
        (TENSOR, "TensorData(dtype='float32', shape=[60, 100], data=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, … 6,000 in all])"),
        (TensorData([0.1], "float32", [2, 9], [0, 1, 1], [4]), "TensorData(dtype='float32', shape=[2, 9], sparse, data=[0.1])"),
        (EncodedTextChunk(tokens=(1, 2)), "EncodedTextChunk(tokens=(1, 2), type='encoded_text')"),
        (
            LONG,
            "ModelInput(chunks=[EncodedTextChunk(tokens=[0, 1, 2, 3, 4, 5, 6, 7, … 5,000 in all], type='encoded_text')])",
        ),
        (
            SEQUENCE,
            "SampledSequence(stop_reason='stop', sequence_id='s-1', tokens=[0, 1, 2, 3, 4, 5, 6, 7, … 5,000 in all])",
        ),
        (
            Datum(ModelInput.from_ints([1]), {"weights": [1.0]}),
            "Datum(model_input=ModelInput(chunks=[EncodedTextChunk(tokens=[1], type='encoded_text')]), "
            "loss_fn_inputs={'weights': TensorData(dtype='float32', shape=[1], data=[1.0])})",
        ),
        (
            types.TopkLogprobs(np.zeros((9, 3), np.int32), np.zeros((9, 3), np.float32)),
            "TopkLogprobs(token_ids=int32 [9, 3], logprobs=float32 [9, 3])",
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_representation_shows_sizes_and_the_first_values(value, text):
    assert repr(value) == text


@pytest.mark.parametrize(
    "value",
    [
        ModelInput(chunks=[EncodedTextChunk(tokens=MANY)] * 1000),
        Datum(LONG, {"target_tokens": MANY, "weights": TENSOR}),
        Datum(LONG).with_provenance([types.PromptProvenanceSpan(sequence_id="s", length=1)] * 5000, []),
        types.SampleResponse([SEQUENCE] * 1000, np.zeros(5000, np.float32)),
        types.SampleRequest(prompt=LONG, sampling_params=types.SamplingParams()),
        types.ForwardBackwardInput([Datum(LONG, {"target_tokens": MANY})] * 1000, "cross_entropy"),
        types.ForwardBackwardOutput("ArrayRecord", [{"logprobs": TENSOR}] * 1000, {"loss:sum": 1.0}),
        types.PromptAltTokens(TENSOR, TENSOR),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_representation_is_never_long(value):
    assert len(repr(value)) < 1500
