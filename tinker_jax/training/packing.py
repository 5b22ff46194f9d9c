"""Packing: sequences of any length → micro-batches of few shapes. Pure NumPy.

A micro-batch is one long row for each device that shares the rows, filled first-fit decreasing (Johnson et al., 1974). Its
length comes from a short list, so that a long run with random lengths compiles a small, fixed number of programs, and is
chosen anew for every micro-batch, so that the last one is not mostly padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_ROW = 128
LONG_ROW = 8192
"""Beyond it, lengths are also 1.5 times a power of two: such rows hold one sequence, whose padding nothing can fill."""

_MOST_PADDING = 0.2  # of a row; half of it, and the rest in another micro-batch, costs less


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

    @property
    def shape(self) -> str:
        """Names the number of rows and their length."""
        return "rows={} length={}".format(*self.tokens.shape)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What a program gets, by name."""
        names = ("tokens", "positions", "segments", "sequences")
        return {name: getattr(self, name) for name in names} | self.inputs


def bucket(n: int) -> int:
    """The smallest row length that holds n tokens: a power of two from `MIN_ROW`, or 1.5 times one from `LONG_ROW`."""
    size = MIN_ROW
    while size < n:
        if size >= LONG_ROW and size + size // 2 >= n:
            return size + size // 2
        size *= 2
    return size


def first_fit_decreasing(lengths: Sequence[int], capacity: int, rows: int, most: int) -> list[list[int]]:
    """Indices of `lengths` that go into `rows` rows: longest first, each into the first row with room, if there is one.

    Args:
        lengths: of the sequences. Equal lengths keep their order, so packing is reproducible.
        capacity: tokens a row may hold.
        rows: number of rows.
        most: sequences a row may hold.
    """
    out: list[list[int]] = [[] for _ in range(rows)]
    room = [capacity] * rows
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((r for r in range(rows) if room[r] >= lengths[i] and len(out[r]) < most), None)
        if at is not None:
            out[at].append(i)
            room[at] -= lengths[i]
    return out


def pack(
    tokens: Sequence[np.ndarray],
    inputs: Sequence[Mapping[str, np.ndarray]],
    *,
    token_budget: int,
    rows: int = 1,
    most_sequences: int | None = None,
) -> list[MicroBatch]:
    """Packs sequences into micro-batches.

    Args:
        tokens: token ids of each sequence, [N_i].
        inputs: per sequence the same keys, arrays [N_i] or [N_i, K]; K is padded with zeros to a power of two that holds
            the widest of the call.
        token_budget: most positions a micro-batch may hold, except that a row always holds the longest sequence.
        rows: of every micro-batch: devices that share the rows.
        most_sequences: in a row; None: any number.

    Returns:
        Micro-batches whose `places` cover every sequence exactly once.
    """
    todo = list(range(len(tokens)))
    most_sequences = most_sequences or len(todo)
    batches = []
    while todo:
        lengths = [len(tokens[i]) for i in todo]
        T = _row_length(lengths, token_budget, rows)
        picked = [[todo[i] for i in row] for row in first_fit_decreasing(lengths, T, rows, most_sequences)]
        # Fewer sequences than the tokens would allow need less of a row.
        T = min(T, bucket(max(sum(len(tokens[i]) for i in row) for row in picked)))
        batches.append(_fill(tokens, inputs, picked, (rows, T)))
        gone = {i for row in picked for i in row}
        todo = [i for i in todo if i not in gone]
    return batches


def _row_length(lengths: Sequence[int], token_budget: int, rows: int) -> int:
    """The longest row within the budget that would not be mostly padding, yet holds the longest sequence."""
    share = -(-sum(lengths) // rows)
    T = min(_power_of_two(share), _power_of_two(token_budget // rows + 1) // 2)
    if share < (1 - _MOST_PADDING) * T:
        T //= 2
    return max(T, bucket(max(lengths)))


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _fill(tokens, inputs, rows, shape: tuple[int, int]) -> MicroBatch:
    out_tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    sequences = np.full(shape, sum(len(row) for row in rows), np.int32)
    packed: dict[str, np.ndarray] = {}
    for key in inputs[0]:
        first = inputs[0][key]
        wide = (_power_of_two(max(x[key].shape[1] for x in inputs)),) if first.ndim == 2 else ()
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
