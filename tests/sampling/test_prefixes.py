"""Shared prefixes: what is reused is told exactly, is what would have been computed, and never outlives its weights."""

import numpy as np
import pytest
from sampler_cases import (
    BORDERS,
    CONTEXT,
    FEW,
    adapter,
    ask,
    assert_idle,
    check,
    finish,
    merged,
    model,
    next_weights,
    run,
    same,
    shared,
    small,
    spy,
    submit,
    tokens_of,
    whole_pages,
)

from tinker_jax.kernels.decode_attention import PAGE


@pytest.fixture(scope="module")
def sampler():
    return shared()


@pytest.fixture(autouse=True)
def idle(sampler):
    yield
    assert_idle(sampler)
    assert_idle(small())


@pytest.mark.parametrize("length", [1, *BORDERS, CONTEXT])
def test_a_prompt_seen_before_is_reused_up_to_the_last_page_before_its_last_token(sampler, length):
    name, p = next_weights(), tokens_of(length, seed=1)
    request = ask(p, 2, max_tokens=4, seed=1, stop=[], topk_sample_logprobs=2)
    first, second = (run(sampler, request, weights=name)[0] for _ in range(2))
    assert first.prompt_cache_hit_tokens == 0
    assert second.prompt_cache_hit_tokens == whole_pages(length - 1)
    same(first, second)
    check(model()[0], p, second)


def test_a_conversation_reuses_its_own_prompts_and_answers(sampler):
    """Each turn's prompt is the one before, the answer, and something new; all but the newest token of an answer is known."""
    name, prompt = next_weights(), tokens_of(37, seed=2)
    known = 0
    for turn in range(5):
        (response,) = run(sampler, ask(prompt, max_tokens=21, seed=turn, stop=[]), weights=name)
        assert response.prompt_cache_hit_tokens == known
        check(model()[0], prompt, response)
        known = whole_pages(len(prompt) + 20)
        prompt = [*prompt, *response.sequences[0].tokens, *tokens_of(11, seed=turn)]


def test_prompts_that_part_share_what_is_before(sampler):
    name, stem = next_weights(), tokens_of(4 * PAGE + 6, seed=3)
    run(sampler, ask(stem, max_tokens=1), weights=name)
    for prompt, known in [
        ([*stem[: 3 * PAGE + 2], *tokens_of(30)], 3 * PAGE),
        ([*stem[: 3 * PAGE], *tokens_of(30)], 3 * PAGE),
        ([*stem[: 3 * PAGE - 1], *tokens_of(30)], 2 * PAGE),
        ([5, *stem], 0),
        (stem[: 3 * PAGE], 2 * PAGE),
    ]:
        (response,) = run(sampler, ask(prompt, max_tokens=6, stop=[], seed=0), weights=name)
        assert response.prompt_cache_hit_tokens == known
        check(model()[0], prompt, response)


def test_requests_of_one_prompt_that_arrive_together_compute_it_once(sampler, monkeypatch):
    name, p = next_weights(), tokens_of(200, seed=4)
    calls = spy(monkeypatch, sampler._runner, "prefill")
    responses = run(sampler, *(ask(p, max_tokens=6, seed=i, stop=[]) for i in range(5)), weights=name)
    computed = sum(len(chunk.tokens) for _, chunks, *_ in calls for chunk in chunks if chunk)
    assert computed < 1.2 * len(p), "the part of a page at the end is computed by each"
    for response in responses:
        check(model()[0], p, response)
    assert sorted(r.prompt_cache_hit_tokens for r in responses) == [0, *[whole_pages(199)] * 4]


def test_other_weights_reuse_nothing(sampler):
    p = tokens_of(2 * PAGE + 9, seed=5)
    for seed in (1, 2):
        (response,) = run(sampler, ask(p, max_tokens=6, stop=[]), weights=next_weights(), tree=adapter(seed))
        assert response.prompt_cache_hit_tokens == 0
        check(merged(seed), p, response)


def test_changed_weights_reuse_nothing(sampler):
    name, p = next_weights(), tokens_of(2 * PAGE + 9, seed=6)
    request = ask(p, max_tokens=6, stop=[])
    run(sampler, request, weights=name, tree=adapter(1))
    sampler.replace(name, adapter(2))
    (response,) = run(sampler, request, weights=name, tree=adapter(2))
    assert response.prompt_cache_hit_tokens == 0
    check(merged(2), p, response)
    assert run(sampler, request, weights=name, tree=adapter(2))[0].prompt_cache_hit_tokens == 2 * PAGE


@pytest.mark.parametrize("last_n", [None, 1, 20, 100, 130, 199])
def test_a_prompt_that_is_scored_reuses_only_what_lies_before_its_scores(sampler, last_n):
    name, p = next_weights(), tokens_of(200, seed=7)
    run(sampler, ask(p, max_tokens=1), weights=name)
    request = ask(p, max_tokens=4, stop=[], prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=last_n)
    (response,) = run(sampler, request, weights=name)
    assert response.prompt_cache_hit_tokens == whole_pages(199 - (last_n or 199))
    assert np.isfinite(response.prompt_logprobs_np).sum() == (last_n or 199)
    check(model()[0], p, response)


@pytest.mark.parametrize("last_n", [None, 40])
def test_prompts_that_are_scored_are_prefilled_side_by_side_whatever_they_share(sampler, monkeypatch, last_n):
    """Nobody waits for pages that it will not share."""
    calls, stem, counts = spy(monkeypatch, sampler._runner, "prefill"), tokens_of(2 * PAGE, seed=14), []
    scores = {"max_tokens": 1, "prompt_logprobs": True, "prompt_logprobs_last_n": last_n}
    for shares in (False, True):
        prompts = [[*(stem if shares else tokens_of(2 * PAGE, seed=20 + i)), *tokens_of(40, seed=i)] for i in range(16)]
        before = len(calls)
        responses = run(sampler, *(ask(prompt, **scores) for prompt in prompts), weights=next_weights())
        counts.append(len(calls) - before)
        for prompt, response in zip(prompts, responses, strict=True):
            check(model()[0], prompt, response)
    distinct, alike = counts
    assert alike <= distinct


@pytest.mark.parametrize("length", [*range(PAGE, PAGE + 3), 30, 2 * PAGE, 2 * PAGE + 1, 2 * PAGE + 2])
def test_samples_fork_on_and_off_the_border_of_a_page(sampler, length):
    p = tokens_of(length, seed=8)
    (response,) = run(sampler, ask(p, 5, max_tokens=20, seed=3, stop=[], prompt_logprobs=True), weights=next_weights())
    assert len({tuple(s.tokens) for s in response.sequences}) == 5
    check(model()[0], p, response)


def test_samples_that_begin_after_others_ended_are_as_good(sampler):
    """Rows come one by one; by then the first sample has written into its copy of the prompt's last page."""
    p = tokens_of(PAGE + 24, seed=9)
    request = ask(p, 20, max_tokens=90, seed=4, stop=[])
    (response,) = run(small(), request, weights=next_weights())
    check(model()[0], p, response)
    same(response, run(sampler, request)[0])


def test_what_is_used_again_outlives_what_is_not(sampler):
    name = next_weights()
    left, used = tokens_of(3 * PAGE + 4, seed=10), tokens_of(3 * PAGE + 4, seed=11)

    def hits(prompt):
        (response,) = run(small(), ask(prompt, max_tokens=1, stop=[], seed=0), weights=name)
        check(model()[0], prompt, response)
        return response.prompt_cache_hit_tokens

    assert hits(left) == hits(used) == 0
    for i in range(FEW):  # each leaves one page behind
        run(small(), ask(tokens_of(PAGE + 1, seed=100 + i), max_tokens=1), weights=next_weights())
        assert hits(used) == 3 * PAGE
    assert hits(left) == 0


def test_a_failure_forgets_every_page(sampler, monkeypatch):
    name, p = next_weights(), tokens_of(2 * PAGE + 9, seed=13)
    run(sampler, ask(p, max_tokens=1), weights=name)
    failing = submit(sampler, ask(p, max_tokens=1), name)
    sampler.fail(RuntimeError("lost"))
    assert failing.exception(0) is not None
    (response,) = run(sampler, ask(p, max_tokens=5, stop=[]), weights=name)
    assert response.prompt_cache_hit_tokens == 0
    check(model()[0], p, response)
    finish(sampler)
