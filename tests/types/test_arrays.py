"""Arrays of NumPy, JAX and PyTorch are taken alike, wherever one of them is."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tinker_jax.types import AdamParams, Datum, EncodedTextChunk, ModelInput, SamplingParams, TensorData
from tinker_jax.types.errors import BadRequestError

FLOATS = [
    np.array([0.5, 2.0], np.float16),
    jnp.array([0.5, 2.0]),
    jnp.array([0.5, 2.0], jnp.bfloat16),
    torch.tensor([0.5, 2.0], dtype=torch.float64),
    torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
    torch.tensor([[0.5, 1.0], [2.0, 1.0]])[:, 0],
]
INTEGERS = [np.array([3, 4], np.int8), jnp.array([3, 4]), torch.tensor([3, 4], dtype=torch.int16)]


def kind(array) -> str:
    return f"{type(array).__module__}-{array.dtype}"


@pytest.mark.parametrize("array", FLOATS, ids=kind)
def test_floats_of_any_library_become_float32(array):
    made = [
        TensorData(array, "float32"),
        TensorData([array, array], "float32", [2, 2]) if array.dtype != torch.bfloat16 else TensorData(array, "float32"),
        Datum(ModelInput.empty(), {"advantages": array}).loss_fn_inputs["advantages"],
        Datum(ModelInput.empty(), {"anything": array}).loss_fn_inputs["anything"],
    ]
    for tensor in made:
        assert tensor.dtype == "float32" and tensor.data[:2] == [0.5, 2.0]


@pytest.mark.parametrize("array", INTEGERS, ids=kind)
def test_integers_of_any_library_become_tokens_and_targets(array):
    assert ModelInput.from_ints(array).to_ints() == EncodedTextChunk(tokens=array).tokens == [3, 4]
    assert SamplingParams(stop=array).stop == [3, 4]
    targets = Datum(ModelInput.empty(), {"target_tokens": array}).loss_fn_inputs["target_tokens"]
    assert (targets.dtype, targets.shape, targets.data) == ("int64", [2], [3, 4])
    assert TensorData([1.0, 2.0], "float32", [1, 5], [0, 2], array).to_numpy().tolist() == [[0, 0, 0, 1, 2]]


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.array(0.5), torch.tensor(0.5)], ids=kind)
def test_arrays_without_axes_are_numbers(number):
    assert AdamParams(learning_rate=number).learning_rate == SamplingParams(top_p=number).top_p == 0.5


def test_a_tensor_that_requires_gradients_is_refused_as_in_the_sdk():
    needy = torch.ones(2, requires_grad=True)
    for refused in (
        lambda: TensorData(needy, "float32"),
        lambda: TensorData.from_torch(needy),
        lambda: Datum(ModelInput.empty(), {"weights": needy}),
        lambda: AdamParams(learning_rate=needy[0]),
    ):
        with pytest.raises(BadRequestError, match=r"no gradient flows through this tensor.*; pass tensor.detach\(\)"):
            refused()
    assert TensorData.from_torch(needy.detach()).data == [1, 1]


def test_what_cannot_be_read_says_why():
    deleted = jnp.ones(2)
    deleted.delete()
    with pytest.raises(BadRequestError, match=r"data: this ArrayImpl cannot be read: .*deleted"):
        TensorData(deleted, "float32")
    with pytest.raises(BadRequestError, match=r"loss_fn_inputs\['weights'\]: .*cannot be read"):
        jax.jit(lambda x: Datum(ModelInput.empty(), {"weights": x}) and x)(jnp.ones(2))
    with pytest.raises(BadRequestError, match="this Tensor cannot be read"):
        TensorData(torch.eye(2).to_sparse(), "float32")


def test_arrays_are_converted_without_loading_the_other_libraries():
    code = (
        "import sys, numpy as np, tinker_jax as t\n"
        "t.Datum(t.ModelInput.from_ints(np.arange(3)), {'weights': np.ones(3)})\n"
        "print([m for m in ('jax', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
