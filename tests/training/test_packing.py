"""Packing loses nothing, keeps the caller's order and wastes little."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax.training.packing import bucket, by_length, first_fit_decreasing, pack, unpack


@given(st.integers(1, 100_000))
def test_a_bucket_holds_its_length_and_wastes_less_than_half(n):
    assert n <= bucket(n) < max(2 * n, 129)


def test_lengths_up_to_32k_share_few_buckets():
    assert len({bucket(n) for n in range(1, 32_769)}) <= 12


def shapes_and_density(batches):
    return {batch.tokens.shape for batch in batches}, sum(batch.tokens.size for batch in batches)


def log_normal(rng, count, low=64, high=4096):
    return rng.lognormal(np.log(400), 1.0, count).clip(low, high).astype(int)


def test_a_thousand_random_batches_share_eight_shapes_and_are_nine_tenths_real():
    rng = np.random.default_rng(0)
    shapes, real, computed = set(), 0, 0
    for _ in range(1000):
        lengths = log_normal(rng, rng.integers(1, 129))
        batches = pack([np.zeros(n, np.int32) for n in lengths], [{}] * len(lengths), token_budget=8192)
        new, size = shapes_and_density(batches)
        shapes |= new
        real, computed = real + lengths.sum(), computed + size
    assert len(shapes) <= 8
    assert real / computed > 0.95


@pytest.mark.parametrize("count", [8, 32, 128])
@pytest.mark.parametrize(("rows", "budget"), [(1, 8192), (1, 4096), (4, 32_768)])
def test_batches_of_a_usual_size_are_nine_tenths_real(count, rows, budget):
    rng = np.random.default_rng(1)
    real = computed = 0
    for _ in range(30):
        lengths = log_normal(rng, count * rows)
        batches = pack([np.zeros(n, np.int32) for n in lengths], [{}] * len(lengths), token_budget=budget, rows=rows)
        real, computed = real + lengths.sum(), computed + shapes_and_density(batches)[1]
    assert real / computed > 0.9


def test_a_single_short_sequence_gets_a_short_row():
    (batch,) = pack([np.zeros(20, np.int32)], [{}], token_budget=8192)
    assert batch.tokens.shape == (1, 128)


def test_a_sequence_beyond_the_budget_gets_a_row_of_its_own_length():
    batches = pack([np.zeros(n, np.int32) for n in (5000, 100)], [{}] * 2, token_budget=1024)
    assert [batch.tokens.shape for batch in batches] == [(1, 8192)]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 9))
def test_no_row_holds_more_sequences_than_allowed(lengths, most):
    batches = pack([np.zeros(n, np.int32) for n in lengths], [{}] * len(lengths), token_budget=4096, most_sequences=most)
    assert max(batch.segments.max() for batch in batches) <= most
    assert sorted(place[0] for batch in batches for place in batch.places) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 80), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 6))
def test_each_sequence_goes_longest_first_into_the_first_row_with_room(lengths, count, most):
    waiting = by_length(lengths)
    rows = first_fit_decreasing(waiting, 64, count, most)
    expected = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r in expected if sum(lengths[j] for j in r) + lengths[i] <= 64 and len(r) < most), None)
        if row is not None:
            row.append(i)
    assert rows == expected
    placed = {i for row in rows for i in row}
    assert sorted(-i for _, i in waiting) == [i for i in range(len(lengths)) if i not in placed]


def test_results_keep_no_neighbours_arrays_alive():
    batches = pack([np.zeros(n, np.int32) for n in (40, 50)], [{}] * 2, token_budget=256)
    values = [np.zeros(batch.tokens.shape, np.float32) for batch in batches]
    assert all(result.base is None for result in unpack(batches, values, 2))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 1000), st.sampled_from([1, 2, 4]))
def test_unpack_inverts_pack(lengths, budget, multiple):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 99, n).astype(np.int32) for n in lengths]
    inputs = [{"w": rng.normal(size=n).astype(np.float32), "k": rng.integers(0, 9, (n, 1 + n % 3))} for n in lengths]
    batches = pack(tokens, inputs, token_budget=budget, rows=multiple)
    for batch in batches:
        B, T = batch.tokens.shape
        assert B == multiple and (B * T <= budget or T <= bucket(max(lengths)))
        assert ((batch.segments == 0) == (batch.sequences == len(batch.places))).all()
    for want, got in zip(tokens, unpack(batches, [b.tokens for b in batches], len(tokens)), strict=True):
        np.testing.assert_array_equal(want, got)
    for x, got in zip(inputs, unpack(batches, [b.inputs["w"] for b in batches], len(tokens)), strict=True):
        np.testing.assert_array_equal(x["w"], got)
    for x, got in zip(inputs, unpack(batches, [b.inputs["k"] for b in batches], len(tokens)), strict=True):
        np.testing.assert_array_equal(x["k"], got[:, : x["k"].shape[1]])
        assert not got[:, x["k"].shape[1] :].any()
    for n, got in zip(lengths, unpack(batches, [b.positions for b in batches], len(tokens)), strict=True):
        np.testing.assert_array_equal(got, np.arange(n))
