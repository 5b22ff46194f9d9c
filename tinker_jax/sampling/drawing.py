"""The mathematics of drawing tokens: pure functions of logits and of the rows' settings.

Letters as elsewhere: S rows of a decode batch, V vocabulary, W pages of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STOP_IDS = 8
"""Stop ids that the device checks for each row; a longer list is checked on the host after each chunk."""

_MANY_LOGITS = 1 << 20
"""Of these, 4 MiB, a draw makes several arrays; what a program needs beyond 32 MiB, Linux clears anew at every call."""


class Rows(NamedTuple):
    """What differs between the rows of a decode batch. Arrays, so that no value of theirs compiles anything.

    Attributes:
        token: int32 [S], the newest token, whose key and value are not in the cache yet.
        position: int32 [S], where that token stands.
        remaining: int32 [S], how many tokens may still be drawn.
        live: bool [S]; the other rows are computed and ignored.
        temperature: float32 [S]; 0 is greedy.
        top_k: int32 [S]; below 1 is off.
        top_p: float32 [S]; 1 is off.
        seed: uint32 [S, 2], see `seed_words`.
        sample: int32 [S], number of the sample within its request.
        stop_ids: int32 [S, STOP_IDS]; -1 fills up.
        slots: int32 [S, 2], first column of the row's adapter slot and its end (`tinker_jax.sampling.adapter_slots`).
        table: int32 [S, W], the row's pages.
    """

    token: Any
    position: Any
    remaining: Any
    live: Any
    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    sample: Any
    stop_ids: Any
    slots: Any
    table: Any

    @classmethod
    def empty(cls, S: int, W: int) -> Rows:
        """Dead rows, as numpy arrays."""
        i32, f32 = np.int32, np.float32
        return cls(
            token=np.zeros(S, i32),
            position=np.zeros(S, i32),
            remaining=np.zeros(S, i32),
            live=np.zeros(S, bool),
            temperature=np.ones(S, f32),
            top_k=np.zeros(S, i32),
            top_p=np.ones(S, f32),
            seed=np.zeros((S, 2), np.uint32),
            sample=np.zeros(S, i32),
            stop_ids=np.full((S, STOP_IDS), -1, i32),
            slots=np.zeros((S, 2), i32),
            table=np.zeros((S, W), i32),
        )


class DrawOptions(NamedTuple):
    """What a decode program can do besides drawing tokens by temperature. Other options are another program.

    Attributes:
        top: how many of the likeliest tokens it reports with each.
        filters: whether it minds `top_k` and `top_p`.
    """

    top: int = 0
    filters: bool = False


class Drawn(NamedTuple):
    """What a chunk of decode steps drew; row s drew `count[s]` tokens, the rest of its columns is filler.

    Attributes:
        count: int32 [S].
        tokens: int32 [S, steps].
        logprobs: float32 [S, steps], see `tempered_logprobs`.
        top_ids: int32 [S, steps, top], likeliest first.
        top_logprobs: float32 [S, steps, top].
    """

    count: Any
    tokens: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any


def seed_words(seed: int) -> np.ndarray:
    """uint32 [2]: any Python int, modulo 2**64, as key data of the threefry generator."""
    low = seed & (2**64 - 1)
    return np.array([low >> 32, low & 0xFFFFFFFF], np.uint32)


def device_temperature(temperature: float) -> np.float32:
    """Nearest temperature the device can divide by; 0 stays 0, which means greedy."""
    limits = np.finfo(np.float32)
    return np.float32(min(max(temperature, float(limits.tiny)), float(limits.max))) if temperature > 0 else np.float32(0)


def tempered_logprobs(logits_SV: jax.Array, temperature_S: jax.Array) -> jax.Array:
    """log p_τ = log softmax(logits / τ) over the whole vocabulary, float32 [S, V].

    Greedy rows (τ = 0) report the model's own distribution, τ = 1: the limit itself is one-hot and says nothing.
    The maximum is subtracted before the division, so that no temperature overflows.
    """
    tau_S = jnp.where(temperature_S > 0, temperature_S, 1.0)
    shifted_SV = (logits_SV - jnp.max(logits_SV, axis=-1, keepdims=True)) / tau_S[:, None]
    return shifted_SV - jnp.log(jnp.sum(jnp.exp(shifted_SV), axis=-1, keepdims=True))


def kept_tokens(logp_SV: jax.Array, top_k_S: jax.Array, top_p_S: jax.Array) -> jax.Array:
    """bool [S, V]: which tokens the two filters leave.

    Tokens are ranked by log-probability, equal ones by id, so `top_k` leaves exactly k under ties. `top_p` then leaves
    the shortest prefix of what `top_k` left whose share of its mass reaches p; the likeliest token always stays.

    The last token of either is found digit by digit, each by a sum over the vocabulary: a CPU sorts twenty times as long.
    """
    S, V = logp_SV.shape
    ids_SV = jax.lax.broadcasted_iota(jnp.uint32, logp_SV.shape, 1)
    # |log p| falls as p rises, and floats without a sign are in the order of their bits.
    rank_SV = jax.lax.bitcast_convert_type(jnp.abs(logp_SV), jnp.uint32)

    def up_to_the_last(before: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Tokens up to the last one for which `before`(tokens ranked before it) holds; it must hold of none."""
        rank_S1 = _greatest(32, lambda rank_S1: before(rank_SV < rank_S1), S)
        less_SV, equal_SV = rank_SV < rank_S1, rank_SV == rank_S1
        id_S1 = jax.lax.cond(
            jnp.any(jnp.sum(equal_SV, axis=1) > 1),
            lambda: _greatest(V.bit_length(), lambda id_S1: before(less_SV | (equal_SV & (ids_SV < id_S1))), S),
            lambda: jnp.full((S, 1), V, jnp.uint32),
        )
        return less_SV | (equal_SV & (ids_SV <= id_S1))

    k_S1 = jnp.where((top_k_S < 1) | (top_k_S > V), V, top_k_S)[:, None]
    kept_SV = jax.lax.cond(
        jnp.any(k_S1 < V),
        lambda: up_to_the_last(lambda some_SV: jnp.sum(some_SV, axis=1, keepdims=True, dtype=jnp.int32) < k_S1),
        lambda: jnp.ones((S, V), bool),
    )
    mass_SV = jnp.where(kept_SV, jnp.exp(logp_SV), 0.0)
    enough_S1 = top_p_S[:, None] * jnp.sum(mass_SV, axis=1, keepdims=True)

    def is_short(some_SV: jax.Array) -> jax.Array:
        mass_S1 = jnp.sum(jnp.where(some_SV, mass_SV, 0.0), axis=1, keepdims=True)
        return (mass_S1 < enough_S1) | (mass_S1 == 0)  # where p is so small that it rounds to zero, one stays

    whole_S1 = (top_p_S >= 1)[:, None]
    within_SV = jax.lax.cond(jnp.all(whole_S1), lambda: jnp.ones((S, V), bool), lambda: up_to_the_last(is_short))
    return kept_SV & (within_SV | whole_S1)


def _greatest(bits: int, holds: Callable[[jax.Array], jax.Array], S: int) -> jax.Array:
    """uint32 [S, 1]: the greatest number of so many bits for which `holds`, which it does from 0 up to some number."""

    def digit(i: jax.Array, x_S1: jax.Array) -> jax.Array:
        more_S1 = x_S1 | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(more_S1), more_S1, x_S1)

    return jax.lax.fori_loop(0, bits, digit, jnp.zeros((S, 1), jnp.uint32))


def noise(seed_S: jax.Array, sample_S: jax.Array, position_S: jax.Array, V: int) -> jax.Array:
    """Gumbel noise [S, V], a function of (seed, sample, position, token id) alone.

    Threefry twice: under the seed it makes a key of (sample, position), under that key two words of each token id, of which
    `jax.random` would use one.
    """
    first_S, second_S = threefry(seed_S[:, 0], seed_S[:, 1], sample_S, position_S)
    token_1V = jnp.arange(V, dtype=jnp.uint32)[None]
    return gumbel(*threefry(first_S[:, None], second_S[:, None], token_1V, token_1V + jnp.uint32(V)))


def threefry(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al., 2011): two uint32 words of a counter of two words under a key of two.

    The numbers of `jax.extend.random.threefry_2x32`, whose rounds are a loop on a CPU and go through memory each.
    """
    keys = key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA)
    x0, x1 = x0.astype(jnp.uint32) + keys[0], x1.astype(jnp.uint32) + keys[1]
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << turn) | (x1 >> (32 - turn)))
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def gumbel(high: jax.Array, low: jax.Array) -> jax.Array:
    """Gumbel noise -log E, E = -log(1 - u) of a uniform u whose first 64 binary digits are two uint32 words; float32.

    A large noise is a small u, which a float keeps all its digits of: tokens of any probability can be drawn, while the 23
    random bits of `jax.random.gumbel` never draw one less likely than about 1e-7.
    """
    u = (high.astype(jnp.float32) + (low.astype(jnp.float32) + 0.5) * 2.0**-32) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def draw(logits_SV: jax.Array, rows: Rows, position_S: jax.Array, filters: bool = True) -> tuple[jax.Array, jax.Array]:
    """One token for each row, by the Gumbel-max trick (argmax of log p + noise is distributed as p).

    The noise belongs to the token id, so neither the filters nor the other rows change which noise a token meets. Filters are
    skipped when no live row needs them; noise costs less than a branch around it.

    Args:
        logits_SV: float32.
        rows: settings of the rows.
        position_S: where the drawn tokens will stand.
        filters: whether some row may have a filter; they are a good part of what there is to compile.

    Returns:
        Token ids int32 [S], and log p_τ of every token [S, V].
    """
    V = logits_SV.shape[1]
    logp_SV = tempered_logprobs(logits_SV, rows.temperature)
    random_S = rows.live & (rows.temperature > 0)
    filtered_S = random_S & ((rows.top_p < 1) | ((rows.top_k > 0) & (rows.top_k < V)))

    def filtered(logp_SV):
        keep_SV = kept_tokens(logp_SV, rows.top_k, rows.top_p) | ~filtered_S[:, None]
        return jnp.where(keep_SV, logp_SV, -jnp.inf)

    allowed_SV = jax.lax.cond(jnp.any(filtered_S), filtered, lambda x: x, logp_SV) if filters else logp_SV
    noisy_SV = allowed_SV + noise(rows.seed, rows.sample, position_S, V)
    # Greedy rows compare logits: rounding in the softmax can make two different ones equal.
    return first_largest(jnp.where(random_S[:, None], noisy_SV, logits_SV)), logp_SV


def first_largest(x_SV: jax.Array) -> jax.Array:
    """int32 [S]: where each row's largest number first stands; the last place if there is none, as of NaN.

    A CPU takes a third of the time of `jnp.argmax`, whose reduction of pairs XLA does not vectorise.
    """
    ids_SV = jax.lax.broadcasted_iota(jnp.int32, x_SV.shape, 1)
    largest_S1 = jnp.max(x_SV, axis=1, keepdims=True)
    return jnp.min(jnp.where(x_SV == largest_S1, ids_SV, x_SV.shape[1] - 1), axis=1)


def own_slots(slots_R2: jax.Array, rank: int | None) -> jax.Array | None:
    """bool [R, rank], see `tinker_jax.lora.updates`; None without an adapter."""
    if rank is None:
        return None
    column_1R = jnp.arange(rank, dtype=jnp.int32)[None]
    return (column_1R >= slots_R2[:, :1]) & (column_1R < slots_R2[:, 1:])


def nothing_drawn(S: int, steps: int, top: int) -> Drawn:
    """Room for what a chunk of `steps` decode steps draws, as numpy arrays."""
    return Drawn(
        count=np.zeros(S, np.int32),
        tokens=np.zeros((S, steps), np.int32),
        logprobs=np.zeros((S, steps), np.float32),
        top_ids=np.zeros((S, steps, top), np.int32),
        top_logprobs=np.zeros((S, steps, top), np.float32),
    )


def advance(
    logits_SV: jax.Array, rows: Rows, drawn: Drawn, step: jax.Array, filters: bool = True, rows_at_once: int | None = None
) -> tuple[Rows, Drawn]:
    """Draws each live row's next token.

    Args:
        logits_SV: float32.
        rows: state and settings of the rows.
        drawn: what the chunk drew so far.
        step: int32, column of `drawn` that the tokens go to.
        filters: see `draw`.
        rows_at_once: of large vocabularies, so that what is made of their logits stays small; None: all.

    Returns:
        The rows as they stand after it, those that are done no longer live, and what is drawn now.
    """
    S, V = logits_SV.shape
    top = drawn.top_ids.shape[-1]

    def some(logits_SV: jax.Array, rows: Rows) -> tuple[jax.Array, ...]:
        token_S, logp_SV = draw(logits_SV, rows, rows.position + 1, filters)
        logprob_S = jnp.take_along_axis(logp_SV, token_S[:, None], axis=1)[:, 0]
        return token_S, logprob_S, *(jax.lax.top_k(logp_SV, top) if top else ())

    if rows_at_once is None or S * V < _MANY_LOGITS:
        token_S, logprob_S, *best = some(logits_SV, rows)
    else:
        each = math.gcd(S, rows_at_once)
        groups = jax.tree.map(lambda x: jnp.reshape(x, (S // each, each, *x.shape[1:])), (logits_SV, rows))
        token_S, logprob_S, *best = (x.reshape(S, *x.shape[2:]) for x in jax.lax.map(lambda group: some(*group), groups))

    def put(x: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, values, step, 1)

    drawn = drawn._replace(
        count=drawn.count + rows.live, tokens=put(drawn.tokens, token_S), logprobs=put(drawn.logprobs, logprob_S)
    )
    if best:
        values, ids = best
        drawn = drawn._replace(top_ids=put(drawn.top_ids, ids), top_logprobs=put(drawn.top_logprobs, values))
    remaining_S = rows.remaining - rows.live
    stopped_S = jnp.any(rows.stop_ids == token_S[:, None], axis=1)
    rows = rows._replace(
        token=jnp.where(rows.live, token_S, rows.token),
        position=rows.position + rows.live,
        remaining=remaining_S,
        live=rows.live & ~stopped_S & (remaining_S > 0),
    )
    return rows, drawn
