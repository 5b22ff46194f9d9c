"""Slots of the decode batch: which row belongs to which request, and how large a cache may be.

A cache has S rows ("slots") of C places. Both come from short lists, so that the number of compiled programs is bounded:
S from `SLOTS`, C from the powers of two up to the context. Pure bookkeeping on the host; no device is touched here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinker_jax.engine.sampling import Rows

SLOTS = (1, 4, 8, 16, 32, 64, 128, 256)
MIN_CAPACITY = 128
# A cache that may have to hold long rows starts at a quarter (a sixteenth, …) of that, but no lower than this: attention
# reads the whole capacity at every step, while most answers end long before their budget.
_MIN_LAZY_CAPACITY = 256


class CacheShape(NamedTuple):
    """S rows of C places; without arguments no cache at all."""

    rows: int = 0
    capacity: int = 0


def power_of_two(n: int, smallest: int, largest: int) -> int:
    """The smallest of `smallest` × (1, 2, 4, …) that holds n, `largest` at most."""
    size = smallest
    while size < n:
        size *= 2
    return min(size, largest)


def slots_for(rows: int) -> int:
    """The smallest number of slots for `rows` rows; the largest there is when none suffices."""
    return next((s for s in SLOTS if s >= rows), SLOTS[-1])


@dataclass(frozen=True)
class Budget:
    """How large caches may get.

    Attributes:
        token_bytes: keys and values of one token, all layers, on one device.
        limit: bytes of one device for all caches that exist at one moment.
        context: most tokens of a sequence.
        row_parts: devices that share the rows where their number divides; elsewhere each holds all of them.
    """

    token_bytes: int
    limit: int
    context: int
    row_parts: int = 1

    def bytes(self, shape: CacheShape) -> int:
        """Size of a cache on one device."""
        rows = shape.rows if shape.rows % self.row_parts else shape.rows // self.row_parts
        return rows * shape.capacity * self.token_bytes

    def capacity(self, need: int) -> int:
        """Places of a row that must hold `need` tokens."""
        return power_of_two(need, MIN_CAPACITY, self.context)

    def capacities(self, now: int, reserve: int, current: int = 0) -> list[int]:
        """Capacities that a cache goes through, smallest first.

        Args:
            now: places that are needed at once.
            reserve: places that the longest row may come to need.
            current: capacity of the cache there is; it is never given up for a smaller one.
        """
        sizes = [self.capacity(reserve)]
        while (size := sizes[0] // 4) >= max(now, _MIN_LAZY_CAPACITY):
            sizes.insert(0, power_of_two(size, MIN_CAPACITY, self.context))
        return [current] * (current >= now and current > 0) + [size for size in sizes if size > current]

    def fit(self, current: CacheShape | None, rows: int, now: int, reserve: int, scratch: int) -> CacheShape | None:
        """The cache to use for `rows` rows, or None when memory does not allow it.

        A move to another shape holds both caches for a moment, so each move on the way to the full reserve must fit;
        where growing step by step does not, the reserve is taken at once.

        Args:
            current: the cache whose rows must be kept, or None.
            rows: slots wanted.
            now: places that are needed at once.
            reserve: places that the longest row may come to need.
            scratch: bytes kept for the prefill of prompts.
        """
        S, C = current or (0, 0)
        S = max(S, slots_for(rows))
        sizes = self.capacities(now, reserve, C)
        for path in (sizes, sizes[-1:]):
            shapes = [CacheShape(S, size) for size in path]
            if self._peak(([current] if current else []) + shapes) + scratch <= self.limit:
                return shapes[0]
        return None

    def _peak(self, path: list[CacheShape]) -> int:
        moves = [self.bytes(a) + self.bytes(b) for a, b in itertools.pairwise(path) if a != b]
        return max([self.bytes(path[0]), *moves])


class Slots:
    """Which request each row of the cache belongs to, and the rows' state, mirrored on the host.

    A row that has ended keeps its owner until the slot is given away: its cache still holds that request's prompt.
    """

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.rows = Rows.empty(shape.rows)
        self.owner: list[Any] = [None] * shape.rows

    @property
    def live(self) -> list[int]:
        """Slots in use."""
        return np.flatnonzero(self.rows.live).tolist()

    @property
    def free(self) -> list[int]:
        """Slots that can be given away."""
        return np.flatnonzero(~self.rows.live).tolist()

    def owned_by(self, owner: Any) -> list[int]:
        """Slots whose cache holds the owner's prompt, ended ones too."""
        return [slot for slot, other in enumerate(self.owner) if other is owner]

    def places(self, steps: int) -> tuple[int, int]:
        """Capacity that the live rows need for the next `steps` tokens, and to their very end."""
        live, position, remaining = self.rows.live, self.rows.position, self.rows.remaining
        now, reserve = (position + np.minimum(steps, remaining))[live], (position + remaining)[live]
        return int(now.max(initial=0)), int(reserve.max(initial=0))

    def seat(self, slot: int, owner: Any, **state: Any) -> None:
        """Gives a slot away; `state` are the fields of `Rows`."""
        self.owner[slot] = owner
        for name, value in state.items():
            getattr(self.rows, name)[slot] = value
        self.rows.live[slot] = True

    def release(self, slot: int) -> None:
        """Ends a row."""
        self.rows.live[slot] = False

    def moved(self, shape: CacheShape) -> tuple[Slots, list[int]]:
        """The live rows, moved to the first slots of a cache of another shape, and where each of them was."""
        other, live = Slots(shape), self.live
        for new, old in enumerate(live):
            other.owner[new] = self.owner[old]
            for ours, theirs in zip(self.rows, other.rows, strict=True):
                theirs[new] = ours[old]
        return other, live
