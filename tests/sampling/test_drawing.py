"""The pure functions behind the sampler: distributions, filters, noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from tinker_jax.sampling import drawing

V = 12


def rows_of(S, **state):
    rows = drawing.Rows.empty(S, 1)._replace(live=np.ones(S, bool), sample=np.arange(S, dtype=np.int32))
    return rows._replace(**{name: np.full(S, value, getattr(rows, name).dtype) for name, value in state.items()})


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def filtered(p, top_k, top_p):
    """The kept set, one token at a time, in float64."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    order = order[: top_k if 0 < top_k < len(p) else len(p)]
    total, reached, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if kept and top_p < 1 and reached >= top_p * total:
            break
        kept.append(i)
        reached += p[i]
    return set(kept)


keep = jax.jit(drawing.kept_tokens)
draw = jax.jit(drawing.draw)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_logprobs_are_the_softmax_of_logits_over_temperature(temperature):
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32) * 4
    got = drawing.tempered_logprobs(logits, jnp.full(3, temperature))
    np.testing.assert_allclose(got, log_softmax(logits / temperature), atol=2e-6)


def test_greedy_reports_the_distribution_at_temperature_one():
    logits = np.random.default_rng(1).normal(size=(2, V)).astype(np.float32)
    np.testing.assert_allclose(drawing.tempered_logprobs(logits, jnp.zeros(2)), log_softmax(logits), atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1e30, 1e300])
def test_extreme_temperatures_neither_overflow_nor_give_nan(temperature):
    logits = np.array([[1e4, -1e4, 1e4, 0.0]], np.float32)
    rows = rows_of(1, temperature=drawing.device_temperature(temperature))
    assert rows.temperature[0] > 0
    token, logp = draw(logits, rows, np.zeros(1, np.int32))
    assert np.isfinite(logp[0, token[0]]) and not np.isnan(logp).any()
    assert token[0] in ((0, 2) if temperature < 1 else range(4))


def test_top_k_keeps_exactly_k_under_ties_the_lowest_ids_first():
    logits = np.zeros((V, V), np.float32)
    kept = keep(log_softmax(logits).astype(np.float32), np.arange(1, V + 1, dtype=np.int32), np.ones(V, np.float32))
    np.testing.assert_array_equal(kept, np.tri(V, dtype=bool))


def test_top_p_keeps_the_shortest_prefix_under_ties():
    logp = log_softmax(np.zeros((1, 4))).astype(np.float32)
    for top_p, count in [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4)]:
        assert keep(logp, np.zeros(1, np.int32), np.float32([top_p])).sum() == count, top_p


@pytest.mark.parametrize("top_p", [1e-30, 1e-50])
def test_the_likeliest_token_stays_under_the_smallest_top_p(top_p):
    logits = jax.nn.log_softmax(jnp.asarray([[1.0, 3.0, 3.0, 0.0]]))
    assert keep(logits, jnp.asarray([-1]), jnp.asarray([top_p], jnp.float32)).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (2, 0.5), (0, 0.5)])
def test_a_certain_token_stays(top_k, top_p):
    logp = drawing.tempered_logprobs(jnp.array([[0.0, 1e4, 0.0]]), jnp.ones(1))
    assert logp[0, 1] == 0
    np.testing.assert_array_equal(keep(logp, jnp.array([top_k]), jnp.array([top_p])), [[False, True, False]])


def test_top_p_applies_to_what_top_k_left():
    logp = np.log(np.float32([[0.4, 0.3, 0.2, 0.1]]))
    assert keep(logp, np.int32([2]), np.float32([0.57])).sum() == 1  # 0.4 / 0.7 = 0.571
    assert keep(logp, np.int32([2]), np.float32([0.58])).sum() == 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]) | st.floats(-8, 8, width=32), min_size=V, max_size=V),
    st.integers(-1, V + 2),
    st.floats(0.0625, 1.0, width=32),
)
def test_filters_match_a_plain_loop(logits, top_k, top_p):
    logp = log_softmax(logits).astype(np.float32)
    kept = np.asarray(keep(logp[None], np.int32([top_k]), np.float32([top_p])))[0]
    # Where p falls on the border of a token's mass, rounding may decide either way.
    allowed = [
        filtered(np.exp(logp.astype(np.float64)), top_k, p) for p in (top_p - 1e-5, top_p, top_p + 1e-5 if top_p < 1 else top_p)
    ]
    assert set(np.flatnonzero(kept)) in allowed


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (50, 1.0), (700, 0.5), (4999, 0.999), (1, 0.1)])
def test_filters_match_a_plain_loop_over_a_large_vocabulary_with_many_ties(top_k, top_p):
    logits = np.round(np.random.default_rng(top_k).normal(size=5003) * 8) / 4
    logits[::7] = -np.inf
    logp = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
    kept = keep(logp[None], jnp.array([top_k]), jnp.array([top_p], jnp.float32))
    assert set(np.flatnonzero(kept[0])) == filtered(np.exp(logp.astype(np.float64)), top_k, np.float32(top_p))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, -1, 1.0), (0.5, -1, 1.0), (1.7, 5, 1.0), (1.0, -1, 0.6), (0.8, 6, 0.8)]
)
def test_frequencies_are_the_models_probabilities(temperature, top_k, top_p):
    S = 8192
    logits = np.random.default_rng(3).normal(size=V).astype(np.float32) * 0.7
    rows = rows_of(S, temperature=temperature, top_k=top_k, top_p=top_p)._replace(seed=np.full((S, 2), 7, np.uint32))
    tokens, _ = draw(np.tile(logits, (S, 1)), rows, np.full(S, 5, np.int32))
    p = np.exp(log_softmax(logits / temperature))
    kept = sorted(filtered(p, top_k, top_p))
    expected = S * p[kept] / p[kept].sum()
    counts = np.bincount(tokens, minlength=V)
    assert counts[kept].sum() == S, "a token outside the filter was drawn"
    chi2, freedom = ((counts[kept] - expected) ** 2 / expected).sum(), len(kept) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_draws_the_same_token_whatever_the_other_rows_do():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4, V)).astype(np.float32)
    position = np.int32([3, 9, 9, 2])
    rows = rows_of(4)._replace(seed=rng.integers(0, 2**32, (4, 2), np.uint32))
    alone = [draw(logits[i : i + 1], drawing.Rows(*(x[i : i + 1] for x in rows)), position[i : i + 1])[0][0] for i in range(4)]
    mixed = rows._replace(temperature=np.float32([1, 0, 3, 1]), top_k=np.int32([0, 0, 2, 0]))
    beside, _ = draw(logits, mixed, position)
    assert beside[0] == alone[0] and beside[3] == alone[3]
    assert beside[1] == logits[1].argmax()


def test_noise_depends_on_seed_sample_and_position_each():
    def of(seed, sample, position):
        return drawing.noise(drawing.seed_words(seed)[None], jnp.int32([sample]), jnp.int32([position]), V)

    base = of(1, 2, 3)
    np.testing.assert_array_equal(base, of(1, 2, 3))
    for other in [of(2, 2, 3), of(1, 3, 3), of(1, 2, 4), of(1 + 2**32, 2, 3), of(-1, 2, 3)]:
        assert np.abs(base - other).max() > 0.1


def test_threefry_is_that_of_jax():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 30), np.uint32)
    got = drawing.threefry(jnp.uint32(7), jnp.uint32(2**32 - 3), *jnp.asarray(words))
    np.testing.assert_array_equal(got, threefry_2x32(jnp.uint32([7, 2**32 - 3]), jnp.asarray(words.ravel())).reshape(2, 30))


def test_noise_is_distributed_as_gumbel():
    """Kolmogorov's distance of a million draws: 1e-4 of all samples are farther away than 2.2 / sqrt(n)."""
    rows, size = 256, 4096
    words = np.random.default_rng(0).integers(0, 2**32, (rows, 2), np.uint32)
    drawn = np.sort(np.asarray(drawing.noise(words, jnp.zeros(rows, jnp.int32), jnp.arange(rows), size)).ravel().astype(float))
    expected, n = np.exp(-np.exp(-drawn)), drawn.size
    distance = max(np.abs(expected - np.arange(n) / n).max(), np.abs(expected - np.arange(1, n + 1) / n).max())
    assert distance < 2.2 / np.sqrt(n)


@pytest.mark.parametrize(("high", "low"), [(0, 0), (0, 7), (1, 0), (5, 2**31), (2**20 + 1, 3), (2**31, 1), (2**32 - 2**10, 0)])
def test_noise_is_exact_to_the_rarest_words(high, low):
    u = (high + (low + 0.5) / 2**32) / 2**32
    expected = -np.log(-np.log1p(-u))
    np.testing.assert_allclose(drawing.gumbel(jnp.uint32(high), jnp.uint32(low)), expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(drawing.gumbel(jnp.uint32(2**32 - 1), jnp.uint32(2**32 - 1)))


@pytest.mark.parametrize(("seed", "words"), [(5, (0, 5)), (2**32 + 7, (1, 7)), (-1, (2**32 - 1,) * 2), (2**64 + 3, (0, 3))])
def test_any_integer_is_a_seed(seed, words):
    assert tuple(drawing.seed_words(seed)) == words


def test_greedy_takes_the_larger_of_two_logits_that_the_softmax_cannot_tell_apart():
    logits = np.full((1, V), 0.0, np.float32)
    logits[0, 4], logits[0, 7] = 1.0, np.nextafter(np.float32(1), np.float32(2))
    token, _ = draw(logits, rows_of(1, temperature=0), np.zeros(1, np.int32))
    assert token[0] == 7


@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.parametrize("S", [8, 12, 16])
def test_rows_are_drawn_alike_all_at_once_or_a_few_at_a_time(monkeypatch, S, top):
    rng = np.random.default_rng(S)
    rows = rows_of(S, remaining=5)._replace(
        live=rng.random(S) < 0.8,
        temperature=np.where(rng.random(S) < 0.3, 0, 1).astype(np.float32),
        top_k=rng.integers(0, 6, S).astype(np.int32),
        seed=rng.integers(0, 2**32, (S, 2)).astype(np.uint32),
    )
    logits, nothing = jnp.asarray(rng.normal(size=(S, 40)), jnp.float32), drawing.nothing_drawn(S, 4, top)
    at_once = drawing.advance(logits, rows, nothing, jnp.int32(1))
    monkeypatch.setattr(drawing, "_MANY_LOGITS", 0)
    a_few = drawing.advance(logits, rows, nothing, jnp.int32(1), rows_at_once=8)
    jax.tree.map(np.testing.assert_array_equal, at_once, a_few)


def test_the_first_of_the_largest_is_taken_and_nan_takes_the_last_place():
    rows = np.random.default_rng(0).integers(0, 5, (50, 40)).astype(np.float32)
    rows[0], rows[1] = -np.inf, np.nan
    rows[0, 7] = 1.0
    expected = rows.argmax(1)
    expected[1] = 39
    np.testing.assert_array_equal(jax.jit(drawing.first_largest)(rows), expected)
