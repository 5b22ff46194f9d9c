"""Sizes of the decode cache, and who sits where in it."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax.engine.slots import SLOTS, Budget, CacheShape, Slots, slots_for

needs = st.integers(1, 4096)


@settings(max_examples=300, deadline=None)
@given(needs, needs, needs, st.integers(0, 300), st.integers(0, 10**6), st.integers(0, 3 * 10**6))
def test_a_cache_that_fits_holds_its_rows_and_never_exceeds_the_limit_on_its_way(now, reserve, held, rows, scratch, limit):
    now, reserve = sorted((now, reserve))
    budget = Budget(token_bytes=3, limit=limit, context=4096)
    current = CacheShape(slots_for(rows), budget.capacity(held)) if rows else None
    shape = budget.fit(current, rows + 1, now, reserve, scratch)
    if shape is None:
        return
    assert shape.rows in SLOTS and shape.rows >= min(rows + 1, SLOTS[-1]) and shape.capacity >= now
    path = [*([current] if current else []), shape]
    while path[-1].capacity < reserve:  # as the sampler grows it, one place at a time
        S, C = path[-1]
        path.append(CacheShape(S, budget.capacities(C + 1, reserve, C)[0]))
    for a, b in itertools.pairwise(path):
        assert b.rows >= a.rows and b.capacity >= a.capacity
        assert a == b or budget.bytes(a) + budget.bytes(b) + scratch <= limit
    assert budget.bytes(path[-1]) + scratch <= limit


@settings(max_examples=100, deadline=None)
@given(needs)
def test_one_row_fits_when_memory_holds_its_bucket_and_nothing_more(need):
    budget = Budget(token_bytes=2, limit=0, context=4096)
    exact = 2 * budget.capacity(need)
    assert Budget(2, exact, 4096).fit(None, 1, 1, need, 0) is not None
    assert Budget(2, exact - 1, 4096).fit(None, 1, 1, need, 0) is None


def test_capacities_are_few_and_end_at_the_context():
    budget = Budget(1, 0, 5000)
    assert {budget.capacity(n) for n in range(1, 5001)} == {128, 256, 512, 1024, 2048, 4096, 5000}
    assert budget.capacities(1, 5000) == [512, 2048, 5000]


def test_rows_that_cannot_be_cut_count_whole_on_every_device():
    budget = Budget(token_bytes=1, limit=1 << 20, context=4096, row_parts=8)
    assert budget.bytes(CacheShape(16, 128)) == 16 * 128 // 8
    assert budget.bytes(CacheShape(4, 128)) == 4 * 128


def test_moving_keeps_live_rows_and_their_owners():
    slots = Slots(CacheShape(4, 128))
    for slot, owner in [(1, "a"), (2, "b"), (3, "c")]:
        slots.seat(slot, owner, token=10 + slot, position=slot, remaining=5, seed=np.uint32([slot, slot]))
    slots.release(2)
    assert (slots.live, slots.free, slots.owned_by("b")) == ([1, 3], [0, 2], [2])
    assert slots.places(16) == (8, 8)
    moved, came_from = slots.moved(CacheShape(16, 256))
    assert came_from == [1, 3] and moved.live == [0, 1] and moved.owner[:2] == ["a", "c"]
    assert moved.rows.token[:2].tolist() == [11, 13] and moved.rows.seed[1].tolist() == [3, 3]
