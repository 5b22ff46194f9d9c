"""Stop rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jax.sampling.stops import StopRule, first_stop, stop_rule
from tinker_jax.types.errors import BadRequestError

# A byte-level vocabulary as real tokenizers have it: single bytes, whole words, pieces of characters, silent tokens.
PIECES = [b"a", b"b", b"ab", b" ", b"\n", b"stop", b"st", b"op", b"\xc3", b"\xa9", "é".encode(), b"\xf0\x9f", b"\x98\x80", b""]


def text(tokens):
    return b"".join(PIECES[t] for t in tokens).decode("utf-8", errors="replace")


def shortest(tokens, strings):
    """The definition, word for word."""
    return next((n for n in range(1, len(tokens) + 1) if any(s in text(tokens[:n]) for s in strings)), None)


def in_chunks(tokens, rule, size):
    """As the sampler calls it: some tokens at a time, until it stops."""
    for start in range(0, len(tokens), size):
        found = first_stop(tokens[: start + size], start, rule, text)
        if found is not None:
            return found
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=60),
    st.lists(st.sampled_from(["stop", "ab", "é", "😀", "b a", "\n\n", "aba", "op é", "é😀"]), min_size=1, max_size=3),
    st.sampled_from([1, 3, 16]),
)
def test_a_string_stops_at_the_first_token_whose_prefix_contains_it(tokens, strings, size):
    assert in_chunks(tokens, StopRule(strings=tuple(strings)), size) == shortest(tokens, strings)


def test_a_string_that_spans_tokens_and_chunks_is_found_after_silent_tokens():
    tokens = [PIECES.index(b"st")] + [PIECES.index(b"")] * 200 + [PIECES.index(b"op"), 0]
    assert in_chunks(tokens, StopRule(strings=("stop",)), 16) == 202


def test_a_character_whose_bytes_are_split_stops_at_its_last_byte():
    tokens = [0, PIECES.index(b"\xc3"), PIECES.index(b"\xa9"), 0]
    assert in_chunks(tokens, StopRule(strings=("é",)), 2) == 3


def test_token_ids_stop_at_the_first_of_them():
    assert first_stop([4, 5, 6, 5], 0, StopRule(ids=(5, 6)), text) == 2
    assert first_stop([4, 5, 6, 5], 2, StopRule(ids=(5,)), text) == 4
    assert first_stop([4, 5], 0, StopRule(), text) is None


def test_decoding_stays_linear_in_the_length_of_the_answer():
    decoded = 0

    def counting(tokens):
        nonlocal decoded
        decoded += len(tokens)
        return "x" * len(tokens)

    for start in range(0, 4096, 16):
        assert first_stop(range(start + 16), start, StopRule(strings=("needle",)), counting) is None
    assert decoded < 4096 * 6


@pytest.mark.parametrize(
    ("stop", "rule"),
    [
        (None, StopRule(ids=(1, 2))),
        ([], StopRule()),
        ("x", StopRule(strings=("x",))),
        (["x", "yz"], StopRule(strings=("x", "yz"))),
        ([3, 4], StopRule(ids=(3, 4))),
    ],
)
def test_the_forms_of_stop(stop, rule):
    assert stop_rule(stop, eos_ids=[1, 2], vocab_size=10) == rule


def test_a_stop_id_outside_the_vocabulary_is_refused():
    with pytest.raises(BadRequestError, match=r"stop\[1\]: token id 10 is outside the model's vocabulary of 10"):
        stop_rule([3, 10], [1], 10)
