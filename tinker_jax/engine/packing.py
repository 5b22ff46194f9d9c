"""Packing: sequences of any length → rows of few lengths, in micro-batches of bounded size. Pure NumPy.

Rows come from first-fit decreasing (Johnson et al., 1974). Shapes come from short lists of buckets, so that a long run with
random lengths compiles a small, fixed number of programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_ROW = 64
FULL_ROW = 512
"""Rows are made at least so long while there are tokens to fill them: short sequences then share few shapes."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one program call computes. Padding has segment id 0, position 0 and zero inputs.

    Attributes:
        tokens: int32 [B, T].
        positions: int32 [B, T], from 0 within each sequence.
        segments: int32 [B, T], from 1 within each row.
        sequences: int32 [B, T], number of the sequence within the micro-batch; padding shares one number past the last.
        inputs: what the loss reads, [B, T] or [B, T, K].
        places: (datum, row, first column, length) of each sequence.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    sequences: np.ndarray
    inputs: dict[str, np.ndarray]
    places: tuple[tuple[int, int, int, int], ...]


def bucket(n: int) -> int:
    """The smallest row length that holds n tokens: a power of two from `MIN_ROW`, or 1.5 times one from `FULL_ROW`."""
    size = MIN_ROW
    while size < n:
        if size >= FULL_ROW and size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows whose sums stay within `capacity`.

    Longest first, each into the first row with room. Equal lengths keep their order, so packing is reproducible.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room.append(capacity)
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def pack(
    tokens: Sequence[np.ndarray],
    inputs: Sequence[Mapping[str, np.ndarray]],
    *,
    token_budget: int,
    row_multiple: int = 1,
) -> list[MicroBatch]:
    """Packs sequences into micro-batches.

    Args:
        tokens: token ids of each sequence, [N_i].
        inputs: per sequence the same keys, arrays [N_i] or [N_i, K]; K is padded with zeros to a power of two that holds
            the widest of the call.
        token_budget: most positions a micro-batch may hold; one row is always allowed.
        row_multiple: number of rows is a multiple of this (devices that share the rows).

    Returns:
        Micro-batches whose `places` cover every sequence exactly once.
    """
    lengths = [len(t) for t in tokens]
    share = -(-sum(lengths) // row_multiple)
    T = bucket(max(max(lengths), min(FULL_ROW, share)))
    rows = first_fit_decreasing(lengths, T)
    most = max(row_multiple, token_budget // T)
    batches = []
    while rows:
        # Powers of four: few shapes, and no padded rows beyond what `row_multiple` asks for.
        B = row_multiple
        while 4 * B <= min(most, len(rows)):
            B *= 4
        batches.append(_fill(tokens, inputs, rows[:B], (B, T)))
        rows = rows[B:]
    return batches


def _fill(tokens, inputs, rows, shape: tuple[int, int]) -> MicroBatch:
    out_tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    sequences = np.full(shape, sum(len(row) for row in rows), np.int32)
    packed: dict[str, np.ndarray] = {}
    for key in inputs[0]:
        first = inputs[0][key]
        wide = (1 << (max(x[key].shape[1] for x in inputs) - 1).bit_length(),) if first.ndim == 2 else ()
        packed[key] = np.zeros(shape + wide, first.dtype)
    places = []
    for r, row in enumerate(rows):
        at = 0
        for s, datum in enumerate(row):
            n = len(tokens[datum])
            span = (r, slice(at, at + n))
            out_tokens[span] = tokens[datum]
            positions[span] = np.arange(n)
            segments[span] = s + 1
            sequences[span] = len(places)
            for key, array in packed.items():
                value = inputs[datum][key]
                array[span + ((slice(0, value.shape[1]),) if value.ndim == 2 else ())] = value
            places.append((datum, r, at, n))
            at += n
    return MicroBatch(out_tokens, positions, segments, sequences, packed, tuple(places))


def unpack(batches: Sequence[MicroBatch], values: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Per-sequence slices of packed results, in the caller's order.

    Args:
        batches: what `pack` returned.
        values: one array [B, T] or [B, T, K] for each micro-batch.
        count: number of sequences.
    """
    out: list[np.ndarray] = [np.empty(0)] * count
    for batch, value in zip(batches, values, strict=True):
        for datum, row, at, n in batch.places:
            out[datum] = value[row, at : at + n]
    return out
