"""A request that brings a `score`: what is computed with it, when, and what is reported."""

from concurrent.futures import Future

import numpy as np
import pytest
from sampler_cases import adapter, ask, finish, next_weights, run, same, small, tokens_of

from tinker_jax.types.errors import RequestFailedError


class Score:
    """Gives −1, −2, … and remembers the tokens."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens):
        self.calls.append(tokens.tolist())
        return -np.arange(1, len(tokens), dtype=np.float32)


def submit(request, score, weights="base", tree=None):
    future = Future()
    small().submit(request, weights, tree, future, score)
    return future


def test_each_sequence_is_scored_once_with_its_prompt_and_without_what_follows_its_stop():
    prompt, score = tokens_of(5), Score()
    (free,) = run(small(), ask(prompt, max_tokens=30, seed=1, stop=[]))
    stop = free.sequences[0].tokens[12]
    (response,) = finish(small(), submit(ask(prompt, 2, max_tokens=30, seed=1, stop=[stop]), score))
    first = response.sequences[0]
    assert first.stop_reason == "stop" and first.tokens[-1] == stop
    assert sorted(score.calls) == sorted([*prompt, *sequence.tokens] for sequence in response.sequences)
    for sequence in response.sequences:
        np.testing.assert_array_equal(sequence.logprobs_np, -np.arange(5, 5 + len(sequence.tokens)))


def test_the_prompt_is_scored_once_and_by_itself():
    prompt, score = tokens_of(5), Score()
    request = ask(prompt, 2, max_tokens=4, stop=[], temperature=0.5, prompt_logprobs=True, prompt_logprobs_last_n=3)
    (response,) = finish(small(), submit(request, score))
    assert score.calls == [prompt]
    np.testing.assert_array_equal(response.prompt_logprobs_np, [np.nan, np.nan, -2, -3, -4])
    (response,) = finish(small(), submit(ask([3], max_tokens=1, stop=[], temperature=0.5, prompt_logprobs=True), score))
    assert score.calls == [prompt] and response.prompt_logprobs_np.shape == (1,)


@pytest.mark.parametrize(("temperature", "scored"), [(0, True), (1, True), (0.99, False), (2, False)])
def test_log_probabilities_of_another_temperature_are_those_of_the_draw(temperature, scored):
    score, request = Score(), ask(tokens_of(5), max_tokens=4, seed=1, stop=[], temperature=temperature)
    (response,) = finish(small(), submit(request, score))
    assert bool(score.calls) == scored
    if not scored:
        same(response, run(small(), request)[0], atol=0)


def test_a_score_that_fails_fails_its_request_alone():
    def fail(tokens):
        raise ValueError("no such luck")

    one, other = submit(ask([3, 4], 2, max_tokens=4, stop=[]), fail), submit(ask([3, 5], max_tokens=4, stop=[]), Score())
    while small().step():
        pass
    with pytest.raises(RequestFailedError, match="sampling failed: ValueError: no such luck"):
        one.result(0)
    assert other.result(0).sequences[0].logprobs[0] == -2


def test_weights_replaced_under_a_request_leave_it_the_log_probabilities_of_its_draws():
    """Those of no single adapter. A request that has not begun is scored under the new weights."""
    old, new, weights = Score(), Score(), next_weights()
    begun = submit(ask(tokens_of(5), max_tokens=40, stop=[]), old, weights, adapter(1))
    small().step()
    waiting = submit(ask(tokens_of(6), max_tokens=4, stop=[]), old, weights, adapter(1))
    small().replace(weights, adapter(2), new)
    finish(small(), begun, waiting)
    assert not old.calls and len(new.calls) == 1 and len(new.calls[0]) == 6 + 4
    assert begun.result(0).sequences[0].logprobs[0] > -5 or begun.result(0).sequences[0].logprobs[0] % 1
