"""Datum and ModelInput: the SDK's conversions, and objects of the SDK in place of ours."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax import types
from tinker_jax.types import Datum, EncodedTextChunk, ModelInput, TensorData
from tinker_jax.types.errors import BadRequestError

KEYS = [
    "target_tokens",
    "weights",
    "advantages",
    "logprobs",
    "clip_low_threshold",
    "clip_high_threshold",
    "sequence_ratio_mask",
]

numbers = st.one_of(st.integers(-5, 5), st.sampled_from([0.5, -1.25, 2.0]))
values = st.one_of(
    st.lists(st.integers(0, 9), max_size=6),
    st.lists(st.booleans(), max_size=6),
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=6).map(np.array),
    st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=1, max_size=6).map(lambda x: np.array(x, np.float64)),
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 2.0]), min_size=12, max_size=12).map(lambda x: torch.tensor(x).reshape(4, 3)),
    st.lists(st.integers(0, 9), min_size=1, max_size=6).map(torch.tensor),
    st.lists(st.sampled_from([0.5, 2.0]), min_size=1, max_size=6).map(lambda x: torch.tensor(x, dtype=torch.bfloat16)),
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KEYS), values)
def test_loss_fn_inputs_convert_as_in_the_sdk(key, value):
    ours = Datum(ModelInput.from_ints([1, 2]), {key: value}).loss_fn_inputs[key]
    theirs = tinker.Datum(tinker.ModelInput.from_ints([1, 2]), {key: value}).loss_fn_inputs[key]
    assert (ours.dtype, ours.shape, ours.data) == (theirs.dtype, theirs.shape, theirs.data)
    assert ours.sparse_crow_indices == theirs.sparse_crow_indices
    assert ours.sparse_col_indices == theirs.sparse_col_indices


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([k for k in KEYS if k != "target_tokens"]), st.lists(numbers, min_size=1, max_size=6))
def test_lists_of_mixed_numbers_take_the_dtype_of_their_key(key, value):
    assert Datum(ModelInput.empty(), {key: value}).loss_fn_inputs[key].dtype == "float32"


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("target_tokens", (1, 2), TypeError),
        ("target_tokens", 3, TypeError),
        ("target_tokens", None, TypeError),
        ("mask", [1, 0], KeyError),
        ("weights", [[1.0], [1.0, 2.0]], ValueError),
        ("weights", np.array([True]), ValueError),
        ("weights", torch.tensor([True]), ValueError),
        ("weights", ["a"], ValueError),
    ],
)
def test_values_the_sdk_refuses_are_refused_with_the_same_type(key, value, error):
    with pytest.raises(error):
        tinker.Datum(tinker.ModelInput.empty(), {key: value})
    with pytest.raises(error, match=key):
        Datum(ModelInput.empty(), {key: value})


def test_non_integral_target_tokens_are_refused_where_the_sdk_truncates():
    with pytest.raises(BadRequestError, match=r"loss_fn_inputs\['target_tokens'\]: .*got 1.5"):
        Datum(ModelInput.empty(), {"target_tokens": [1.5, 2.0]})


def test_the_dict_is_the_datums_own_and_can_be_changed():
    given_dict = {"weights": [1.0]}
    datum = Datum(ModelInput.from_ints([1]), given_dict)
    datum.loss_fn_inputs["advantages"] = TensorData([1.0], "float32")
    assert list(given_dict) == ["weights"]
    stripped = dataclasses.replace(datum, loss_fn_inputs={"weights": datum.loss_fn_inputs["weights"]})
    assert list(stripped.loss_fn_inputs) == ["weights"]


def test_a_copy_shares_no_memory():
    weights = np.ones(2, np.float32)
    datum = Datum(ModelInput.from_ints([1, 2]), {"weights": weights})
    copy = datum.copy()
    weights[:] = 5
    assert copy.loss_fn_inputs["weights"].data == [1, 1]
    assert datum.loss_fn_inputs["weights"].data == [5, 5]


def spans(length):
    return [
        types.PromptProvenanceSpan(sequence_id="a", length=1),
        types.SampledProvenanceSpan(sequence_id="a", length=length - 1),
    ]


def test_provenance_tiles_both_fields_or_is_refused():
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    done = datum.with_provenance(model_input=spans(3), loss_fn_inputs=spans(3))
    assert (done.model_input_spans, done.loss_fn_input_spans) == (spans(3), spans(3))
    with pytest.raises(BadRequestError, match="the model_input spans cover 2 positions, the field has 3"):
        datum.with_provenance(model_input=spans(2), loss_fn_inputs=spans(3))
    with pytest.raises(AssertionError, match="as a pair"):
        Datum(ModelInput.empty(), {}, model_input_spans=[])
    with pytest.raises(TypeError, match="got str"):
        Datum(ModelInput.empty(), {}, model_input_spans=["a"], loss_fn_input_spans=[])


@pytest.mark.parametrize("span", [types.PromptProvenanceSpan, types.SampledProvenanceSpan])
@pytest.mark.parametrize("bad", [{"sequence_id": ""}, {"length": -1}, {"offset": -1}])
def test_bad_spans_are_refused_as_in_the_sdk(span, bad):
    arguments = {"sequence_id": "a", "length": 1, **bad}
    with pytest.raises(ValueError):
        getattr(tinker, span.__name__)(**arguments)
    with pytest.raises(BadRequestError, match=f"{span.__name__}.{next(iter(bad))}"):
        span(**arguments)


def test_model_inputs_behave_as_in_the_sdk():
    for module in (tinker, types):
        empty = module.ModelInput.empty()
        grown = empty.append(module.EncodedTextChunk(tokens=[1, 2])).append_int(3)
        assert (empty.length, grown.length, grown.to_ints()) == (0, 3, [1, 2, 3])
        assert module.ModelInput.from_ints((1, 2)).chunks[0].tokens == (1, 2)
        assert module.ModelInput.from_ints([1.0, True]).to_ints() == [1, 1]
        assert module.ModelInput(chunks=[{"type": "encoded_text", "tokens": [4]}]).to_ints() == [4]
        assert module.ModelInput.from_ints([1]) == module.ModelInput.from_ints([1])
        with pytest.raises(TypeError):
            module.ModelInput([1])
    assert repr(types.ModelInput.from_ints([1])) == repr(tinker.ModelInput.from_ints([1]))


def test_numpy_token_ids_are_accepted_and_stored_as_python_ints():
    tokens = ModelInput.from_ints(np.arange(3, dtype=np.int32)).to_ints()
    assert tokens == [0, 1, 2] and all(type(token) is int for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1.5], r"tokens\[0\]: expected an integer, got 1.5"),
        ([1, "a"], r"tokens\[1\]: expected an integer, got str 'a'"),
        ([1, None], r"tokens\[1\]: expected an integer, got NoneType None"),
        ([1, [2]], r"tokens\[1\]: expected an integer, got list \[2\]"),
        ([[1], [2]], r"tokens\[0\]: expected an integer, got list \[1\]"),
        ([2**63], r"tokens\[0\]: expected an integer below 2\*\*63, got int 9223372036854775808"),
        ([1, 2**70], r"tokens\[1\]: expected an integer below 2\*\*63"),
        ([1e300], r"tokens\[0\]: expected an integer below 2\*\*63"),
        (np.ones((1, 2), np.int64), r"tokens: expected one axis, got shape \[1, 2\]"),
        ("12", "a list of token ids"),
        ({"input_ids": [1]}, r"a list of token ids \(of what a tokenizer returns, take \['input_ids'\]\)"),
        (None, "a list of token ids"),
    ],
)
def test_what_is_no_token_id_is_refused(tokens, message):
    with pytest.raises(BadRequestError, match=f"EncodedTextChunk.tokens: expected {message}|EncodedTextChunk.{message}"):
        EncodedTextChunk(tokens=tokens)


def test_chunks_have_the_lengths_of_the_sdk():
    dmel = b"\xfe\x01\x02\x83\x01\x02"  # a constant [131, 2] tensor
    cases = [
        ("ImageChunk", {"data": base64.b64encode(b"abc").decode(), "format": "png", "expected_tokens": 5}),
        ("ImageAssetPointerChunk", {"location": "x", "format": "jpeg", "expected_tokens": 7}),
        ("DmelChunk", {"dmel": dmel}),
    ]
    for name, arguments in cases:
        theirs = getattr(tinker.types, name)(**arguments)
        ours = getattr(types, name)(**arguments)
        assert ours.length == theirs.length
        assert types.ModelInput(chunks=[theirs]).chunks == [ours]
    assert types.DmelChunk(dmel=dmel).length == 131
    with pytest.raises(BadRequestError, match="expected_tokens must be set"):
        _ = types.ImageChunk(data=b"", format="png").length
    with pytest.raises(BadRequestError, match=r"chunks\[0\] is ImageChunk"):
        ModelInput(chunks=[types.ImageChunk(data=b"", format="png")]).to_ints()
    with pytest.raises(BadRequestError, match="cut short"):
        _ = types.DmelChunk(dmel=b"\x01\x02\x83").length


@pytest.mark.parametrize(
    "chunk", [5, {"type": "video"}, {"type": "encoded_text"}, {"type": "encoded_text", "tokens": [], "x": 1}]
)
def test_what_is_no_chunk_is_refused(chunk):
    with pytest.raises(BadRequestError, match=r"ModelInput.chunks\[0\]"):
        ModelInput(chunks=[chunk])


def test_datums_of_the_sdk_become_ours():
    from tinker_jax.types.coerce import coerce

    spans = [tinker.SampledProvenanceSpan(sequence_id="a", length=12)]
    theirs = tinker.Datum(
        tinker.ModelInput.from_ints(list(range(12))),
        {"target_tokens": torch.tensor([[0, 0, 0, 5]] * 12), "weights": np.ones(12)},
        spans,
        spans,
    )
    ours = coerce(Datum, theirs, "datum")
    assert isinstance(ours.model_input, ModelInput) and ours.model_input.length == 12
    assert ours.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    for key, tensor in ours.loss_fn_inputs.items():
        assert isinstance(tensor, TensorData)
        np.testing.assert_array_equal(tensor.to_numpy(), theirs.loss_fn_inputs[key].to_numpy())
    assert ours.model_input_spans == [types.SampledProvenanceSpan(sequence_id="a", length=12)]


def test_parts_of_the_sdk_fit_into_ours():
    datum = Datum(tinker.ModelInput.from_ints([1]), {"weights": tinker.TensorData([1.0], "float32")})
    assert isinstance(datum.loss_fn_inputs["weights"], TensorData)
    assert ModelInput(chunks=[tinker.EncodedTextChunk(tokens=[1])]) == ModelInput.from_ints([1])


def test_subclasses_of_the_sdk_types_are_accepted_and_others_are_not():
    from tinker_jax.types.coerce import coerce

    class Mine(tinker.ModelInput):
        pass

    assert coerce(ModelInput, Mine(chunks=[]), "prompt") == ModelInput.empty()
    with pytest.raises(BadRequestError, match="prompt: expected ModelInput, got list"):
        coerce(ModelInput, [1], "prompt")


def test_a_missing_number_among_the_loss_inputs_is_refused_when_the_datum_is_made():
    with pytest.raises(BadRequestError, match=r"loss_fn_inputs\['logprobs'\]: data: expected numbers, got NoneType None"):
        Datum(ModelInput.empty(), {"logprobs": [None, -1.0]})
