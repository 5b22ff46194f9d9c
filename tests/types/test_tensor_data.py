"""TensorData against the SDK's, value by value."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinker_jax.types import TensorData
from tinker_jax.types.errors import BadRequestError

SPARSE = {
    "data": [1.0, 2.0, 3.0],
    "dtype": "float32",
    "shape": [2, 4],
    "sparse_crow_indices": [0, 2, 3],
    "sparse_col_indices": [0, 3, 1],
}


def same(ours: TensorData, theirs: tinker.TensorData) -> None:
    assert (ours.dtype, ours.shape, ours.data) == (theirs.dtype, theirs.shape, theirs.data)
    assert ours.sparse_crow_indices == theirs.sparse_crow_indices
    assert ours.sparse_col_indices == theirs.sparse_col_indices
    np.testing.assert_array_equal(ours.to_numpy(), theirs.to_numpy())
    assert ours.to_numpy().dtype == theirs.to_numpy().dtype


small = st.integers(-1000, 1000)
arrays = st.one_of(
    hnp.arrays(
        st.sampled_from([np.int8, np.int32, np.int64]), hnp.array_shapes(max_dims=3, max_side=4), elements=st.integers(-9, 9)
    ),
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(max_dims=3, max_side=4),
        elements=st.floats(-9, 9, width=16),
    ),
)


@settings(max_examples=50, deadline=None)
@given(arrays)
def test_numpy_arrays_convert_as_in_the_sdk(array):
    same(TensorData.from_numpy(array), tinker.TensorData.from_numpy(array))


@settings(max_examples=50, deadline=None)
@given(arrays)
def test_torch_tensors_convert_as_in_the_sdk(array):
    tensor = torch.from_numpy(array)
    same(TensorData.from_torch(tensor), tinker.TensorData.from_torch(tensor))


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.sampled_from([0, 0, 0, 0, 3, -1])),
    st.sampled_from([0, -1, 3]),
    st.booleans(),
)
def test_sparse_encoding_matches_the_sdk(array, pad, floating):
    tensor = torch.from_numpy(array.astype(np.float32 if floating else np.int64))
    ours = TensorData.from_torch_sparse(tensor, pad)
    theirs = tinker.TensorData.from_torch_sparse(tensor, pad)
    assert ours.sparse_crow_indices == theirs.sparse_crow_indices
    assert ours.sparse_col_indices == theirs.sparse_col_indices
    assert (ours.dtype, ours.shape, ours.data) == (theirs.dtype, theirs.shape, theirs.data)
    np.testing.assert_array_equal(ours.to_numpy(pad), tensor.numpy())


def test_bfloat16_widens_to_float32():
    assert TensorData.from_torch(torch.tensor([1.5], dtype=torch.bfloat16)).dtype == "float32"


@pytest.mark.parametrize("array", [np.array([True]), np.array([1], np.uint8), np.array(["a"])])
def test_dtypes_the_sdk_refuses_are_refused(array):
    with pytest.raises(ValueError):
        tinker.TensorData.from_numpy(array)
    with pytest.raises(BadRequestError, match=r"Unsupported numpy dtype: .*cast it first"):
        TensorData.from_numpy(array)


def test_torch_bool_is_refused():
    with pytest.raises(BadRequestError, match="Unsupported numpy dtype: bool"):
        TensorData.from_torch(torch.tensor([True]))


def test_dtype_is_required_as_in_the_sdk():
    with pytest.raises(TypeError, match="TensorData requires `dtype`"):
        TensorData([1])
    with pytest.raises(TypeError):
        tinker.TensorData([1])


def test_data_is_reshaped_and_stored_flat_as_in_the_sdk():
    for cls in (TensorData, tinker.TensorData):
        made = cls([1, 2, 3, 4], "int64", [2, 2])
        assert made.tolist() == [[1, 2], [3, 4]]
        assert made.data == [1, 2, 3, 4]
        assert cls(dtype="float32").data == []
        assert cls([1, 2], "float32").shape is None


def test_sparse_tensors_densify_as_in_the_sdk():
    ours, theirs = TensorData(**SPARSE), tinker.TensorData(**SPARSE)
    same(ours, theirs)
    np.testing.assert_array_equal(ours.to_numpy(-1), theirs.to_numpy(-1))
    assert ours.to_torch(-1).equal(theirs.to_torch(-1))


@pytest.mark.parametrize("pad", [True, 1.0, "0"])
def test_pad_value_is_an_integer(pad):
    with pytest.raises(TypeError, match="pad_value must be an integer"):
        TensorData(**SPARSE).to_numpy(pad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int32"}, "dtype: expected 'int64' or 'float32', got 'int32'"),
        ({"sparse_col_indices": None}, "come together"),
        ({"shape": None}, "a sparse tensor needs"),
        ({"sparse_crow_indices": [0, 1]}, "expected 3 ascending pointers from 0 to 3"),
        ({"sparse_crow_indices": [0, 4, 3]}, "ascending pointers"),
        ({"sparse_col_indices": [0, 4, 1]}, r"expected 3 columns in \[0, 4\)"),
        ({"sparse_col_indices": [3, 0, 1]}, "must ascend and not repeat"),
    ],
)
def test_broken_tensors_are_refused_by_name(change, message):
    with pytest.raises(BadRequestError, match=message):
        TensorData(**{**SPARSE, **change})


@pytest.mark.parametrize(
    ("data", "message"), [([1.5], "expected integers for dtype 'int64', got 1.5"), ([float("nan")], "got nan")]
)
def test_int64_refuses_what_a_cast_would_change(data, message):
    with pytest.raises(BadRequestError, match=message):
        TensorData(data, "int64")


def test_int64_accepts_integral_floats_and_refuses_overflow():
    assert TensorData([1.0, 2.0], "int64").data == [1, 2]
    with pytest.raises(BadRequestError, match="does not fit"):
        TensorData(np.array([2**63], np.uint64), "int64")


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(BadRequestError, match=r"shape: 3 values cannot take the shape \[2, 2\]"):
        TensorData([1, 2, 3], "int64", [2, 2])


def test_replace_keeps_the_values():
    assert dataclasses.replace(TensorData([1, 2], "int64"), shape=[1, 2]).tolist() == [[1, 2]]
    assert dataclasses.replace(TensorData(**SPARSE)).to_numpy().tolist() == TensorData(**SPARSE).tolist()


def test_tensors_are_frozen_and_compare_by_identity():
    tensor = TensorData([1], "int64")
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensor.dtype = "float32"
    assert tensor != TensorData([1], "int64")
    assert len({tensor, tensor}) == 1


def test_read_only_memory_is_copied_and_a_copy_is_a_copy():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    tensor = TensorData.from_numpy(array)
    assert tensor.to_numpy().flags.writeable
    copy = tensor.copy()
    copy.to_numpy()[0] = 5
    assert tensor.data == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["1", "2"], "float32"), "data: expected numbers, got str '1'"),
        ((["1", "2"], "int64"), "data: expected numbers, got str '1'"),
        (([1.0, None], "float32"), "data: expected numbers, got NoneType None"),
        (([1, None], "int64"), "data: expected numbers, got NoneType None"),
        (([1j], "float32"), "data: expected numbers, got complex 1j"),
        (([[1, 2], [3]], "int64"), "data: expected numbers in a rectangular list, got rows of different lengths"),
        (([2**70], "int64"), f"data: {2**70} does not fit dtype 'int64'"),
        (([1e20], "int64"), r"data: 1e\+20 does not fit dtype 'int64'"),
        (([1, 2], "int64", [-1, 2]), r"shape\[0\]: expected an integer >= 0, got int -1"),
        (([1, 2], "int64", ["a"]), r"shape\[0\]: expected an integer >= 0, got str 'a'"),
        (([1, 2], "int64", 2), "shape: expected a list of sizes, got int 2"),
        (([1], "int64", [1, 1], ["a"], [0]), "sparse_crow_indices: expected integers"),
        (([1], "int64", [1, 1], [0, 1], [None]), "sparse_col_indices: expected integers"),
    ],
)
def test_what_is_not_a_tensor_is_refused_by_name(arguments, message):
    with pytest.raises(BadRequestError, match=message):
        TensorData(*arguments)


def test_what_float32_cannot_hold_becomes_infinite_without_a_warning(recwarn):
    assert TensorData([1e300, -1e300], "float32").data == [float("inf"), -float("inf")]
    assert not recwarn.list


def test_only_arrays_come_from_numpy():
    with pytest.raises(TypeError, match="from_numpy: expected a numpy array, got list"):
        TensorData.from_numpy([1])  # type: ignore[arg-type]
