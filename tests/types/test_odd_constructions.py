"""Thousands of constructions from odd values: refused by a `TinkerError` that names the field, or accepted where right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from odd_values import (
    BY_NAME,
    ODD,
    Rule,
    either,
    named,
    none,
    nothing,
    odd_list,
    outcome,
    real,
    string,
    text,
    truth,
    whole,
)
from odd_values import (
    SCALARS as ALL_SCALARS,
)

import tinker_jax
from tinker_jax import types
from tinker_jax.types import Datum, ModelInput, SamplingParams, TensorData

SCALARS = [odd for odd in ALL_SCALARS if odd.name != "-2**63"]  # beside a float NumPy rounds it, to the border
SEED = whole(-(2**63), 2**64 - 1)
TOKENS = named(
    *("np.arange(3)", "np.array([1])", "np.zeros(0)", "np.uint8([1, 2])", "jnp.arange(3)", "jnp.ones(2, jnp.bfloat16)"),
    *("torch.arange(3)", "torch.ones(2, dtype=torch.bfloat16)", "[]", "[1]", "[0] * 100_000", "[-1]", "(1, 2)", "()"),
    *("range(3)", "UserList([1])", "deque([1])"),
)
IDS = named(
    *("np.arange(3)", "np.array([1])", "np.zeros(0)", "np.uint8([1, 2])", "jnp.arange(3)", "jnp.ones(2, jnp.bfloat16)"),
    *("torch.arange(3)", "torch.ones(2, dtype=torch.bfloat16)", "[]", "[1]", "[0] * 100_000", "(1, 2)", "()", "range(3)"),
    *("UserList([1])", "deque([1])"),
)
STRINGS = named("['a']", "np.array(['a'])")
NUMBERS = named(
    *("np.array(True)", "torch.tensor(True)", "jnp.array(True)", "np.arange(3)", "np.array([0.5])", "np.array([1])"),
    *("np.zeros((2, 2))", "np.zeros(0)", "np.array([True])", "np.uint8([1, 2])", "jnp.arange(3)", "jnp.ones((2, 2))"),
    *("jnp.ones(2, jnp.bfloat16)", "torch.arange(3)", "torch.ones(2, dtype=torch.bfloat16)", "torch.ones(2, 2)"),
    *("torch.ones(2) > 0", "[]", "[1]", "[1.5]", "[[1, 2], [3, 4]]", "nested(50)", "[0] * 100_000", "[2**63]"),
    *("[-1]", "(1, 2)", "()", "range(3)", "deque([1])", "UserList([1])"),
)

#: By class: arguments that are right, and for each other argument the rule that says which odd values are right.
FIELDS: dict[Callable[..., Any], tuple[Mapping[str, Any], Mapping[str, Rule]]] = {
    types.AdamParams: (
        {},
        {
            "learning_rate": real(0),
            "beta1": real(0, 1, without=[1]),
            "beta2": real(0, 1, without=[1]),
            "eps": real(0, without=[0]),
            "weight_decay": real(0),
            "grad_clip_norm": real(0),
        },
    ),
    types.DimuonParams: (
        {"learning_rate": 0.1},
        {"learning_rate": real(0), "beta1": real(0, 1, without=[1]), "grad_clip_norm": real(), "type": nothing},
    ),
    types.AdamOptimizerConfig: ({}, {"type": nothing}),
    types.DimuonOptimizerConfig: ({}, {"type": nothing, "version": named("1")}),
    types.LoraConfig: (
        {"rank": 4},
        {
            "rank": whole(1),
            "seed": either(none, SEED),
            "train_unembed": truth,
            "train_mlp": truth,
            "train_attn": truth,
        },
    ),
    types.SamplingParams: (
        {},
        {
            "max_tokens": either(none, whole(1)),
            "seed": either(none, SEED),
            "stop": either(none, text, IDS, STRINGS),
            "temperature": real(0),
            "top_k": lambda odd: whole(-1)(odd) and odd.number != 0,
            "top_p": real(0, 1, without=[0]),
        },
    ),
    types.SampleRequest: (
        {"prompt": ModelInput.from_ints([1, 2]), "sampling_params": SamplingParams()},
        {
            "num_samples": whole(1),
            "prompt": nothing,
            "sampling_params": nothing,
            "base_model": either(none, string),
            "model_path": either(none, string),
            "sampling_session_id": either(none, string),
            "seq_id": either(none, whole(0)),
            "prompt_logprobs": either(none, truth),
            "topk_prompt_logprobs": whole(0),
            "topk_sample_logprobs": whole(0),
            "target_prompt_logprobs": none,
            "prompt_alt_tokens_k": whole(0),
            "record_stability_info": either(none, truth),
            "type": named("'sample'"),
        },
    ),
    types.TensorData: (
        {"data": [1.0, 2.0], "dtype": "float32"},
        {
            "data": lambda odd: none(odd) or odd.truth or _float(odd) or NUMBERS(odd),
            "dtype": named("'float32'"),
            "shape": either(none, named("(1, 2)", "np.uint8([1, 2])")),
            "sparse_crow_indices": none,
        },
    ),
    types.EncodedTextChunk: ({"tokens": [1]}, {"tokens": TOKENS, "type": nothing}),
    types.ImageChunk: (
        {"data": b"x", "format": "png"},
        {
            "data": named("b'a'", "memoryview(b'a')", "bytearray(b'ab')", "''", "'x' * 20_000", "'~\\0'"),
            "format": nothing,
            "expected_tokens": either(none, whole(0)),
            "type": nothing,
        },
    ),
    types.ImageAssetPointerChunk: (
        {"location": "x", "format": "png"},
        {"location": text, "format": nothing, "expected_tokens": either(none, whole(0)), "type": nothing},
    ),
    types.DmelChunk: ({"dmel": b"x"}, {"type": nothing}),
    types.PromptProvenanceSpan: (
        {"sequence_id": "a", "length": 1},
        {"sequence_id": text, "offset": whole(0), "length": whole(0)},
    ),
    types.SampledProvenanceSpan: (
        {"sequence_id": "a", "length": 1},
        {"sequence_id": text, "offset": whole(0), "length": whole(0)},
    ),
    types.ModelInput: ({"chunks": []}, {"chunks": named("[]", "()")}),
    types.ForwardBackwardInput: (
        {"data": [], "loss_fn": "ppo"},
        {
            "data": named("[]", "()"),
            "loss_fn": text,
            "loss_fn_config": either(none, named("{}", "{'a': 1}", "{'a': 'b'}", "{1: 2}")),
        },
    ),
    types.ForwardBackwardRequest: (
        {"forward_backward_input": types.ForwardBackwardInput([], "ppo"), "model_id": "m"},
        {"forward_backward_input": nothing, "model_id": text, "seq_id": either(none, whole(0))},
    ),
    types.ForwardRequest: (
        {"forward_input": types.ForwardBackwardInput([], "ppo"), "model_id": "m"},
        {"forward_input": nothing, "model_id": text, "seq_id": either(none, whole(0))},
    ),
    types.OptimStepRequest: (
        {"optim_params": types.AdamParams(), "model_id": "m"},
        {"optim_params": nothing, "model_id": text, "seq_id": either(none, whole(0)), "type": nothing},
    ),
    types.CustomLossInput: (
        {"name": "a", "rank": 1},
        {"name": text, "rank": named("0", "1", "2")},
    ),
    types.Datum: (
        {"model_input": ModelInput.from_ints([1, 2])},
        {
            "model_input": nothing,
            "loss_fn_inputs": named("{}"),
            "model_input_spans": none,
            "loss_fn_input_spans": none,
        },
    ),
    tinker_jax.EngineConfig: (
        {},
        {
            "dtype": either(none, named("'float32'")),
            "mesh": either(none, named("{}")),
            "memory": either(none, whole(1)),
            "home": lambda odd: none(odd) or named("Path('.')")(odd) or (text(odd) and odd.name != "'~\\0'"),
            "deterministic": named("True", "False"),
        },
    ),
    types.ParsedCheckpointTinkerPath.from_tinker_path: ({}, {"tinker_path": nothing}),
}
CASES = [(make, field) for make, (_, fields) in FIELDS.items() for field in fields]


def _one_field(rng: random.Random) -> None:
    make, field = rng.choice(CASES)
    right, rules = FIELDS[make]
    odd = rng.choice(ODD)
    arguments = {**right, field: odd.value}
    _compare(f"{make.__qualname__}({field}={odd.name})", rules[field](odd), lambda: make(**arguments), field)


def _token_list(rng: random.Random) -> None:
    """Integers, whole floats and truth values below 2**63."""
    good = [odd for odd in SCALARS if odd.truth or whole()(odd)]
    odds = odd_list(rng, good, SCALARS)
    values = [odd.value for odd in odds]
    right = all(odd.truth or (whole()(odd) and abs(odd.number) < 2**63) for odd in odds)
    wrapped = rng.choice([list, tuple])(values)
    _compare(
        f"from_ints({[odd.name for odd in odds]})", right, lambda: ModelInput.from_ints(wrapped), "EncodedTextChunk.tokens"
    )
    if right:
        assert ModelInput.from_ints(wrapped).to_ints() == [int(value) for value in values]


def _tensor_data(rng: random.Random) -> None:
    """Real numbers and truth values; for int64 whole ones below 2**63."""
    dtype = rng.choice(["int64", "float32"])
    fits = (lambda odd: whole()(odd) and abs(odd.number) < 2**63) if dtype == "int64" else _float
    odds = odd_list(rng, [odd for odd in SCALARS if odd.truth or fits(odd)], SCALARS)
    values = [odd.value for odd in odds]
    right = all(odd.truth or fits(odd) for odd in odds)
    if rng.random() < 0.5:
        name, call = f"TensorData({[o.name for o in odds]}, {dtype})", lambda: TensorData(values, dtype)
        field = "data"
    else:
        key = "target_tokens" if dtype == "int64" else rng.choice(["weights", "advantages", "logprobs", "sequence_ratio_mask"])
        name, field = f"Datum({key}={[o.name for o in odds]})", f"loss_fn_inputs['{key}']"
        call = lambda: Datum(ModelInput.from_ints([1]), {key: values}).loss_fn_inputs[key]  # noqa: E731
    _compare(name, right, call, field)
    if right:
        expected = np.array([float(value) for value in values])
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(call().to_numpy(), expected.astype(dtype))


def _float(odd: Any) -> bool:
    return odd.number is not None and odd.name not in ("10**400", "10**5000", "-10**400")


ARRAYS = {
    "int64": (
        *("np.arange(3)", "np.array([1])", "jnp.arange(3)", "torch.arange(3)", "jnp.array(2)", "torch.tensor(2)"),
        "np.array(2)",
    ),
    "float32": (
        *("np.array([0.5])", "np.zeros((2, 2))", "np.zeros(0)", "jnp.ones(2, jnp.bfloat16)", "jnp.ones((2, 2))"),
        *("torch.ones(2, dtype=torch.bfloat16)", "torch.ones(2, 2)", "np.array(0.5)", "np.array(2.0)", "jnp.array(0.5)"),
        *("torch.tensor(0.5)", "torch.tensor(2.0)", "jnp.bfloat16(2)", "torch.tensor(2, dtype=torch.bfloat16)"),
    ),
}


def _loss_fn_input(rng: random.Random) -> None:
    """Arrays of floats and of signed integers under any name; lists of numbers under the names of the API."""
    key = rng.choice(["target_tokens", "weights", "logprobs", "mask", "mask"])
    odd = rng.choice([*ODD, *(BY_NAME[name] for names in ARRAYS.values() for name in names)])
    lists = {"target_tokens": ("[]", "[1]", "[-1]", "[0] * 100_000", "[[1, 2], [3, 4]]", "nested(50)"), "mask": ()}
    floats = ("[]", "[1]", "[-1]", "[1.5]", "[0] * 100_000", "[2**63]", "[[1, 2], [3, 4]]", "nested(50)")
    right = odd.name in (*ARRAYS["int64"], *ARRAYS["float32"], *lists.get(key, floats))
    _compare(
        f"Datum({key}={odd.name})",
        right,
        lambda: Datum(ModelInput.from_ints([1]), {key: odd.value}),
        f"loss_fn_inputs['{key}']",
    )


def _sparse(rng: random.Random) -> None:
    """CSR indices of a random matrix, sometimes broken; the rule is spelled out in plain Python."""
    rows, width = rng.randint(0, 3), rng.randint(1, 4)
    cells = sorted({(rng.randrange(rows), rng.randrange(width)) for _ in range(rng.randint(0, 6))}) if rows else []
    crow = [sum(row < r for row, _ in cells) for r in range(rows + 1)]
    col = [column for _, column in cells]
    shape: list[Any] = [rows, width]
    for _ in range(rng.choice([0, 0, 1, 2])):
        which, place = rng.choice([crow, col, shape]), rng.random()
        if which:
            at = int(place * len(which))
            near = [which[at] + 1, which[at] - 1] if isinstance(which[at], int) else []
            which[at] = rng.choice([*near, 10**15, 2**63, 0.5, None, "1"])
    listed = len(cells)
    right = (
        all(type(value) is int for value in [*crow, *col, *shape])
        and 0 <= shape[0] < 10**9
        and 0 <= shape[1] < 10**9
        and len(crow) == shape[0] + 1
        and [crow[0], crow[-1]] == [0, listed]
        and crow == sorted(crow)
        and all(0 <= column < shape[1] for column in col)
        and all(col[i] < col[i + 1] for a, b in itertools.pairwise(crow) for i in range(a, b - 1))
    )
    call = lambda: TensorData([1.0] * listed, "float32", shape, crow, col)  # noqa: E731
    _compare(f"TensorData({shape}, {crow}, {col})", right, call, ("sparse_c", "shape"))
    if right:
        assert call().to_numpy().sum() == listed


def _compare(name: str, right: bool, call: Callable[[], Any], field: str | tuple[str, ...]) -> None:
    error = outcome(call)
    assert (error is None) == right, f"{name}: {'should pass' if right else 'should be refused'}, got {error!r}"
    fields = field if isinstance(field, tuple) else (field,)
    said = str(error).replace("tinker path", "tinker_path")
    assert error is None or any(part in said for part in fields), f"{name}: {error} does not name {field}"
    if error is None:
        assert len(repr(call())) < 2000 or "_000" in name  # what was given was long


FUZZERS = [_one_field, _one_field, _token_list, _tensor_data, _loss_fn_input, _sparse]


@pytest.mark.parametrize("count", [1_500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_odd_constructions_are_refused_by_name_or_accepted_as_the_labels_say(count):
    rng = random.Random(count)
    for i in range(count):
        FUZZERS[i % len(FUZZERS)](rng)


@pytest.mark.parametrize(("make", "field"), CASES, ids=lambda x: x if isinstance(x, str) else x.__qualname__)
def test_every_field_takes_every_odd_value_or_refuses_it_by_name(make, field):
    right, rules = FIELDS[make]
    for odd in ODD:
        arguments = {**right, field: odd.value}
        _compare(f"{make.__qualname__}({field}={odd.name})", rules[field](odd), lambda a=arguments: make(**a), field)


def test_a_pad_value_is_an_integer_of_python_or_numpy():
    sparse = TensorData([5.0], "float32", [1, 3], [0, 1], [1])
    for odd in ODD:
        value = odd.value
        right = whole()(odd) and isinstance(value, (int, np.integer))
        _compare(f"to_numpy({odd.name})", right, lambda value=value: sparse.to_numpy(value), "pad_value")
