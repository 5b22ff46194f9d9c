"""Packing loses nothing, keeps the caller's order and wastes little."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax.engine.packing import bucket, first_fit_decreasing, pack, unpack


@given(st.integers(1, 100_000))
def test_a_bucket_holds_its_length_and_wastes_less_than_half(n):
    assert n <= bucket(n) < max(2 * n, 65)


def test_lengths_up_to_32k_share_few_buckets():
    assert len({bucket(n) for n in range(1, 32_769)}) <= 16


def test_batches_of_short_sequences_share_few_shapes_and_fill_them():
    rng = np.random.default_rng(0)
    shapes, real, computed = set(), 0, 0
    for _ in range(300):
        lengths = rng.integers(5, 60, rng.integers(30, 200))
        batches = pack([np.zeros(n, np.int32) for n in lengths], [{}] * len(lengths), token_budget=8192)
        shapes |= {batch.tokens.shape for batch in batches}
        real, computed = real + lengths.sum(), computed + sum(batch.tokens.size for batch in batches)
    assert shapes <= {(1, 512), (4, 512), (16, 512)}
    assert real / computed > 0.85


def test_a_single_short_sequence_gets_a_short_row():
    (batch,) = pack([np.zeros(20, np.int32)], [{}], token_budget=8192)
    assert batch.tokens.shape == (1, 64)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_rows_hold_every_sequence_once_and_never_overflow(lengths):
    rows = first_fit_decreasing(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(1, 1000), st.sampled_from([1, 2, 4]))
def test_unpack_inverts_pack(lengths, budget, multiple):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 99, n).astype(np.int32) for n in lengths]
    inputs = [{"w": rng.normal(size=n).astype(np.float32), "k": rng.integers(0, 9, (n, 1 + n % 3))} for n in lengths]
    batches = pack(tokens, inputs, token_budget=budget, row_multiple=multiple)
    for batch in batches:
        B, T = batch.tokens.shape
        assert B % multiple == 0 and (B * T <= budget or B == multiple)
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


def test_mixed_lengths_pack_densely():
    lengths = np.random.default_rng(1).lognormal(5.5, 0.8, 200).clip(64, 2048).astype(int)
    batches = pack([np.zeros(n, np.int32) for n in lengths], [{}] * len(lengths), token_budget=16_384)
    assert lengths.sum() / sum(b.tokens.size for b in batches) > 0.8
