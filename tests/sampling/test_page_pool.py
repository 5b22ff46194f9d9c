"""The pool of pages: no page is held and free at once, what is remembered is found, the oldest is forgotten first."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax.sampling.page_pool import PagePool


def chain(pool, pages, *contents, root="weights"):
    """Remembers pages as the beginning of a sequence; the pages that are known for it."""
    parent, known = root, []
    for page, content in zip(pages, contents, strict=True):
        known.append(pool.remember(page, (parent, content)))
        parent = pool.identity(known[-1])
    return known


def follow(pool, *contents, root="weights"):
    """The pages that a sequence finds."""
    parent, found = root, []
    for content in contents:
        if (page := pool.find((parent, content))) is None:
            break
        found.append(page)
        parent = pool.identity(page)
    return found


def test_a_page_let_go_is_found_until_its_place_is_needed():
    pool = PagePool(2)
    (page,) = pool.take(1)
    chain(pool, [page], b"a")
    pool.release([page])
    assert pool.held == 0 and pool.available == 2
    assert follow(pool, b"a") == [page]
    pool.take(1)
    assert follow(pool, b"a") == [page]
    assert pool.take(1) == [page] and follow(pool, b"a") == []


def test_the_page_that_was_let_go_first_is_forgotten_first_and_a_sequences_end_before_its_beginning():
    pool = PagePool(4)
    old, new = pool.take(2), pool.take(2)
    chain(pool, old, b"a", b"b")
    chain(pool, new, b"c", b"d")
    pool.release(old)
    pool.release(new)
    pool.hold(follow(pool, b"a"))
    pool.release(follow(pool, b"a"))  # used again, so younger than all others
    assert pool.take(3) == [old[1], new[1], new[0]]
    assert follow(pool, b"a") == [old[0]]


def test_a_page_nobody_knows_is_taken_before_one_that_is_remembered():
    pool = PagePool(2)
    known, unknown = pool.take(2)
    chain(pool, [known], b"a")
    pool.release([known])
    pool.release([unknown])
    assert pool.take(1) == [unknown]


def test_equal_content_stays_with_the_page_that_had_it_first():
    pool = PagePool(3)
    first, second, third = pool.take(3)
    assert chain(pool, [first], b"a") == chain(pool, [second], b"a") == [first]
    pool.release([second])
    assert pool.take(1) == [second], "a copy that nobody can find is free at once"
    assert chain(pool, [first, third], b"a", b"b") == [first, third]


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(1)
    (page,) = pool.take(1)
    chain(pool, [page], b"a")
    pool.hold([page])
    pool.release([page])
    assert pool.held == 1 and pool.available == 0
    pool.release([page])
    assert pool.held == 0 and pool.available == 1


def test_the_children_of_a_forgotten_page_are_out_of_reach():
    """Also when another page gets the same content: it is another page, with another past."""
    pool = PagePool(3)
    parent, child = pool.take(2)
    chain(pool, [parent, child], b"a", b"b")
    pool.release([parent])  # alone: its child is still held
    taken = pool.take(2)
    assert parent in taken and follow(pool, b"a", b"b") == []
    chain(pool, [parent], b"a")
    assert follow(pool, b"a", b"b") == [parent]


def test_weights_never_meet_each_others_pages():
    pool = PagePool(2)
    pages = pool.take(2)
    chain(pool, pages, b"a", b"b", root="one")
    assert follow(pool, b"a", root="two") == [] and follow(pool, b"a", b"b", root="one") == pages


def test_more_pages_than_there_are_cannot_be_taken():
    pool = PagePool(2)
    pool.take(1)
    with pytest.raises(AssertionError):
        pool.take(2)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_happens_pages_add_up_and_a_found_chain_holds_what_it_says(data):
    """Sequences of random content over a small alphabet come, share, grow and go."""
    pool, sequences, content = PagePool(8), [], {}
    for _ in range(data.draw(st.integers(1, 40))):
        if sequences and data.draw(st.booleans()):
            pages, _ = sequences.pop(data.draw(st.integers(0, len(sequences) - 1)))
            pool.release(pages)
        else:
            wanted = data.draw(st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=4))
            shared = follow(pool, *wanted)
            pool.hold(shared)
            if pool.available < len(wanted) - len(shared):
                pool.release(shared)
                continue
            assert [content[page] for page in shared] == [tuple(wanted[: i + 1]) for i in range(len(shared))]
            own = pool.take(len(wanted) - len(shared))
            pages = [*shared, *own]
            for i, page in enumerate(own, len(shared)):
                content[page] = tuple(wanted[: i + 1])
            told = data.draw(st.integers(len(shared), len(wanted)))
            chain(pool, pages[:told], *wanted[:told])
            sequences.append((pages, wanted))
        holders = collections.Counter(page for pages, _ in sequences for page in pages)
        assert pool.held == len(holders) and pool.held + pool.available == pool.size
        assert set(holders) <= set(range(1, pool.size + 1)), "page 0 is nobody's"
        for pages, wanted in sequences:
            assert [content[page] for page in pages] == [tuple(wanted[: i + 1]) for i in range(len(pages))]
