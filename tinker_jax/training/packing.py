"""Packing: sequences of any length → micro-batches of few shapes. Pure NumPy.

A micro-batch is one long row for each device that shares the rows, filled first-fit decreasing (Johnson et al., 1974). Its
length comes from a short list, so that a long run with random lengths compiles a small, fixed number of programs, and is
chosen anew for every micro-batch, so that the last one is not mostly padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def by_length(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """What `first_fit_decreasing` takes from: (length, −index), rising. Of equal lengths the first is the largest."""
    return sorted((length, -i) for i, length in enumerate(lengths))


def first_fit_decreasing(waiting: list[tuple[int, int]], capacity: int, rows: int, most: int) -> list[list[int]]:
    """Indices that go into `rows` rows: longest first, each into the first row with room, if there is one.

    A row's contents do not depend on the rows after it, so rows are filled one by one, each with the longest that fits until
    none does; the search is by bisection.

    Args:
        waiting: from `by_length`; what is placed is taken out.
        capacity: tokens a row may hold.
        rows: number of rows.
        most: sequences a row may hold.
    """
    out: list[list[int]] = [[] for _ in range(rows)]
    for row in out:
        room = capacity
        while len(row) < most and (at := bisect.bisect_right(waiting, (room, 0))):
            length, number = waiting.pop(at - 1)
            row.append(-number)
            room -= length
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
    waiting = by_length([len(sequence) for sequence in tokens])
    left = sum(length for length, _ in waiting)
    wide = {
        key: (_power_of_two(max(x[key].shape[1] for x in inputs)),) if first.ndim == 2 else ()
        for key, first in inputs[0].items()
    }
    batches = []
    while waiting:
        T = _row_length(left, waiting[-1][0], token_budget, rows)
        picked = first_fit_decreasing(waiting, T, rows, most_sequences or len(tokens))
        filled = [sum(len(tokens[i]) for i in row) for row in picked]
        left -= sum(filled)
        # Fewer sequences than the tokens would allow need less of a row.
        batches.append(_fill(tokens, inputs, wide, picked, (rows, min(T, bucket(max(filled))))))
    return batches


def pack_apart(tokens: Sequence[np.ndarray], inputs: Sequence[Mapping[str, np.ndarray]], *, rows: int = 1) -> list[MicroBatch]:
    """Micro-batches in which the shapes that a sequence is computed in depend on the sequence alone.

    Each has a row of its own, of its bucketed length; on `rows` devices it has others of the same shapes beside it, or none.

    Args:
        tokens: token ids of each sequence, [N_i].
        inputs: per sequence any keys, arrays [N_i] or [N_i, K_i]; K_i is padded with zeros to a power of two.
        rows: of every micro-batch.

    Returns:
        Micro-batches whose `places` cover every sequence exactly once; in order where there is one row.
    """
    open_groups: dict[Any, list[int]] = {}
    groups: list[tuple[list[int], int, dict[str, tuple[int, ...]]]] = []
    for i, sequence in enumerate(tokens):
        wide = {key: (_power_of_two(x.shape[1]),) if x.ndim == 2 else () for key, x in inputs[i].items()}
        kind = bucket(len(sequence)), tuple(sorted(wide.items()))
        if len(open_groups.get(kind, [None] * rows)) == rows:
            open_groups[kind] = []
            groups.append((open_groups[kind], kind[0], wide))
        open_groups[kind].append(i)
    return [
        _fill(tokens, inputs, wide, [[i] for i in group] + [[]] * (rows - len(group)), (rows, T)) for group, T, wide in groups
    ]


def _row_length(tokens: int, longest: int, token_budget: int, rows: int) -> int:
    """The longest row within the budget that would not be mostly padding, yet holds the longest sequence."""
    share = -(-tokens // rows)
    T = min(_power_of_two(share), _power_of_two(token_budget // rows + 1) // 2)
    if share < (1 - _MOST_PADDING) * T:
        T //= 2
    return max(T, bucket(longest))


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _fill(tokens, inputs, wide: Mapping[str, tuple[int, ...]], rows, shape: tuple[int, int]) -> MicroBatch:
    out_tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    sequences = np.full(shape, sum(len(row) for row in rows), np.int32)
    like = inputs[next(i for row in rows for i in row)]
    packed = {key: np.zeros(shape + columns, like[key].dtype) for key, columns in wide.items()}
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
    """Per-sequence copies of packed results, in the caller's order: a result that is kept keeps no neighbour's alive.

    Args:
        batches: what `pack` returned.
        values: one array [B, T] or [B, T, K] for each micro-batch.
        count: number of sequences.
    """
    out: list[np.ndarray] = [np.empty(0)] * count
    for batch, value in zip(batches, values, strict=True):
        for datum, row, at, n in batch.places:
            out[datum] = value[row, at : at + n].copy()
    return out
