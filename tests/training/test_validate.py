"""Bad input is refused at the door, by name; good input of our types and of the SDK's passes."""

import subprocess
import sys

import numpy as np
import pytest
import tinker as sdk
import torch

from tinker_jax import types as ours
from tinker_jax.training.validate import check_data, check_loss
from tinker_jax.types.errors import BadRequestError, UnsupportedError
from tinker_jax.types.loss_specs import LOSS_SPECS

N = 4


def datum(package=ours, tokens=(1, 2, 3, 4), **inputs):
    inputs.setdefault("target_tokens", [2, 3, 4, 5])
    inputs = {key: value for key, value in inputs.items() if value is not None}
    return package.Datum(model_input=package.ModelInput.from_ints(list(tokens)), loss_fn_inputs=inputs)


def policy_datum(package=ours, **changes):
    return datum(package, **{"logprobs": [0.0, 0.0, -1.0, -2.0], "advantages": [0.0, 0.0, 1.0, -1.0], **changes})


def i64(array):
    return ours.TensorData.from_numpy(np.asarray(array, np.int64))


def f32(array):
    return ours.TensorData.from_numpy(np.asarray(array, np.float32))


@pytest.mark.parametrize("package", [ours, sdk], ids=["ours", "sdk"])
@pytest.mark.parametrize("loss_fn", LOSS_SPECS)
def test_complete_data_pass_for_every_loss(package, loss_fn):
    values = {"target_tokens": [2, 3, 4, 5]}
    values |= {key: [0.5] * N for key in LOSS_SPECS[loss_fn].inputs if key != "target_tokens"}
    required = {key: values[key] for key, declared in LOSS_SPECS[loss_fn].inputs.items() if declared.required}
    check_data([datum(package, **values), datum(package, **required)], loss_fn, vocab_size=6, context_length=N)
    check_data([datum(package, **values)], loss_fn, dict(LOSS_SPECS[loss_fn].config))


@pytest.mark.parametrize("package", [ours, sdk], ids=["ours", "sdk"])
def test_several_targets_a_position_pass_dense_and_sparse(package):
    targets = torch.zeros(N, 9, dtype=torch.int64)
    targets[:, 0] = 3
    sparse = datum(package, target_tokens=targets, weights=targets.float())
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = datum(package, target_tokens=np.ones((N, 2), np.int64), weights=-np.ones((N, 2), np.float32))
    check_data([sparse, dense], "cross_entropy", vocab_size=6)


def test_a_broken_sparse_tensor_of_the_sdk_is_refused():
    broken = sdk.TensorData([1.0], "float32", [N, 9], [0, 1, 1, 1, 1], [12])
    targets = sdk.TensorData.from_numpy(np.zeros((N, 9), np.int64))
    bad = datum(sdk, target_tokens=targets, weights=broken)
    with pytest.raises(BadRequestError, match=r"data\[0\]\.loss_fn_inputs\['weights'\]: the sparse indices do not"):
        check_data([bad], "cross_entropy")


BAD_DATA = {
    "no data": ([], "cross_entropy", "data: expected at least one Datum, got none"),
    "no datum": ([{"a": 1}], "cross_entropy", r"data\[0\]: expected a Datum, got dict"),
    "second datum": ([datum(), datum(target_tokens=[1])], "cross_entropy", r"data\[1\]\.loss_fn_inputs\['target_tokens"),
    "empty sequence": (
        [datum(tokens=(), target_tokens=[])],
        "cross_entropy",
        r"data\[0\]\.model_input: expected at least one token, got an empty sequence",
    ),
    "input id": (
        [datum(tokens=(1, 2, 6, 4))],
        "cross_entropy",
        r"data\[0\]\.model_input\.chunks\[0\]\.tokens: expected ids in \[0, 6\), the model's vocabulary, got 6 at position 2",
    ),
    "target id": (
        [datum(target_tokens=[2, 3, 4, 77])],
        "cross_entropy",
        r"\['target_tokens'\]: expected ids in \[0, 6\), the model's vocabulary, got 77 at position 3",
    ),
    "ignore index": (
        [datum(target_tokens=[-100, 3, 4, 5])],
        "cross_entropy",
        "got -100 at position 0; there is no ignore index, give the position a weight or advantage of 0",
    ),
    "target id of many": (
        [datum(target_tokens=np.full((N, 2), 9))],
        "cross_entropy",
        r"got 9 at position \[0, 0\]",
    ),
    "target length": (
        [datum(target_tokens=[2, 3])],
        "cross_entropy",
        r"expected shape \(4,\) or \(4, K\), one target for each token of model_input, got \(2,\)",
    ),
    "target rank": (
        [policy_datum(target_tokens=np.ones((N, 2), np.int64))],
        "ppo",
        r"expected shape \(4,\), one target for each token of model_input, got \(4, 2\)",
    ),
    "no target column": (
        [datum(target_tokens=np.ones((N, 0), np.int64))],
        "cross_entropy",
        r"expected shape \(4,\) or \(4, K\).*got \(4, 0\)",
    ),
    "target dtype": (
        [datum(target_tokens=f32([2, 3, 4, 5]))],
        "cross_entropy",
        r"\['target_tokens'\]: expected dtype int64, got float32; pass integers",
    ),
    "weights dtype": (
        [datum(weights=i64([1, 1, 1, 1]))],
        "cross_entropy",
        r"\['weights'\]: expected dtype float32, got int64; pass floats",
    ),
    "weights length": (
        [datum(weights=[1.0])],
        "cross_entropy",
        r"\['weights'\]: expected the shape of target_tokens, \(4,\), got \(1,\)",
    ),
    "weights rank": (
        [datum(target_tokens=np.ones((N, 2), np.int64), weights=[1.0] * N)],
        "cross_entropy",
        r"\['weights'\]: expected the shape of target_tokens, \(4, 2\), got \(4,\)",
    ),
    "nan": (
        [policy_datum(advantages=[0.0, float("nan"), 1.0, 1.0])],
        "importance_sampling",
        r"\['advantages'\]: expected finite numbers, got nan at position 1",
    ),
    "inf": (
        [policy_datum(logprobs=[0.0, 0.0, 0.0, float("-inf")])],
        "importance_sampling",
        r"\['logprobs'\]: expected finite numbers, got -inf at position 3",
    ),
    "missing input": (
        [policy_datum(advantages=None)],
        "cispo",
        r"data\[0\]\.loss_fn_inputs: cispo needs 'advantages', got logprobs, target_tokens",
    ),
    "no targets": ([datum(target_tokens=None)], "cross_entropy", "cross_entropy needs 'target_tokens', got nothing"),
    "unknown input": (
        [policy_datum(mask=f32([1, 1, 1, 1]))],
        "ppo",
        "ppo takes no input 'mask'; it takes target_tokens, logprobs, advantages, clip_low_threshold, clip_high_thre",
    ),
    "input of another loss": ([datum(weights=[1.0] * N)], "dro", "dro takes no input 'weights'"),
    "too long": (
        [datum(tokens=[1] * 9, target_tokens=[1] * 9)],
        "cross_entropy",
        r"data\[0\]\.model_input: 9 tokens exceed the model's context of 8; truncate or split the sequence",
    ),
    "crossed bounds": (
        [policy_datum(clip_low_threshold=[0.5, 0.5, 1.5, 0.5])],
        "ppo",
        "expected clip_low_threshold <= clip_high_threshold, got 1.5 and 1.2 at position 2",
    ),
}


@pytest.mark.parametrize(("data", "loss_fn", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_refused_by_name(data, loss_fn, message):
    with pytest.raises(BadRequestError, match=message):
        check_data(data, loss_fn, vocab_size=6, context_length=8)


def test_without_a_model_ids_and_lengths_have_no_upper_bound_but_a_lower_one():
    long = datum(tokens=[10**6] * 9, target_tokens=[10**6] * 9)
    check_data([long], "cross_entropy")
    with pytest.raises(BadRequestError, match="expected ids at least 0, got -1 at position 1"):
        check_data([datum(tokens=(1, -1, 2, 3))], "cross_entropy")


def test_token_ids_beyond_int64_are_refused():
    with pytest.raises(BadRequestError, match="expected integer token ids, got object"):
        check_data([datum(sdk, tokens=(1, 2, 3, 10**30))], "cross_entropy", vocab_size=6)


@pytest.mark.parametrize("package", [ours, sdk], ids=["ours", "sdk"])
def test_images_are_refused_by_a_text_model(package):
    image_chunk = sdk.types.ImageChunk if package is sdk else ours.ImageChunk
    image = image_chunk(data=b"x", format="png", expected_tokens=2)
    model_input = package.ModelInput.from_ints([1]).append(image)
    bad = package.Datum(model_input=model_input, loss_fn_inputs={"target_tokens": [1, 2, 3]})
    with pytest.raises(UnsupportedError, match=r"data\[0\]\.model_input\.chunks\[1\]: ImageChunk needs a model that"):
        check_data([bad], "cross_entropy")


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("reinforce", None, "loss_fn: unknown loss 'reinforce'; known: cross_entropy, importance_sampling, ppo, cispo, dro"),
        (["ppo"], None, r"loss_fn: unknown loss \['ppo'\]"),
        ("ppo", {"epsilon": 0.2}, r"loss_fn_config: ppo has no key 'epsilon'; known: clip_low_threshold \(default 0.8\)"),
        ("cross_entropy", {"beta": 1.0}, "cross_entropy has no key 'beta'; known: none"),
        ("dro", {"beta": "0.1"}, r"loss_fn_config\['beta'\]: expected a finite number, got '0.1'"),
        ("dro", {"beta": True}, r"loss_fn_config\['beta'\]: expected a finite number, got True"),
        ("dro", {"beta": float("inf")}, r"loss_fn_config\['beta'\]: expected a finite number, got inf"),
        ("dro", {"beta": 1e39}, r"loss_fn_config\['beta'\]: expected a finite number, got 1e\+39"),
        ("dro", {"beta": 10**400}, r"loss_fn_config\['beta'\]: expected a finite number, got 1000"),
        ("dro", 0.1, "loss_fn_config: expected a dict or None, got float"),
        ("ppo", {"clip_low_threshold": 1.5}, "expected clip_low_threshold <= clip_high_threshold, got 1.5 and 1.2"),
    ],
)
def test_a_wrong_loss_or_configuration_is_refused_by_name(loss_fn, config, message):
    with pytest.raises(BadRequestError, match=message):
        check_loss(loss_fn, config)


def test_checking_loads_no_jax():
    code = "import sys, tinker_jax.training.validate; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
