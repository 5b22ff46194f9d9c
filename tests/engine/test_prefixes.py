"""Shared prefixes: what is reused is told exactly, is what would have been computed, and never outlives its weights."""

import numpy as np
import pytest
from sampler_cases import (
    CHUNK,
    CONTEXT,
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


def whole_pages(tokens):
    return tokens // PAGE * PAGE


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, CHUNK, CHUNK + 1, 128, 129, 200, CONTEXT])
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
    name, stem = next_weights(), tokens_of(70, seed=3)
    run(sampler, ask(stem, max_tokens=1), weights=name)
    for prompt, known in [
        ([*stem[:50], *tokens_of(30)], 48),
        ([*stem[:48], *tokens_of(30)], 48),
        ([*stem[:47], *tokens_of(30)], 32),
        ([5, *stem], 0),
        (stem[:48], 32),
    ]:
        (response,) = run(sampler, ask(prompt, max_tokens=6, stop=[], seed=0), weights=name)
        assert response.prompt_cache_hit_tokens == known
        check(model()[0], prompt, response)


def test_requests_of_one_prompt_that_arrive_together_compute_it_once(sampler, monkeypatch):
    name, p = next_weights(), tokens_of(200, seed=4)
    calls = spy(monkeypatch, sampler._batch, "prefill")
    responses = run(sampler, *(ask(p, max_tokens=6, seed=i, stop=[]) for i in range(5)), weights=name)
    computed = sum(len(chunk.tokens) for _, chunks, _ in calls for chunk in chunks if chunk)
    assert computed < 1.2 * len(p), "the part of a page at the end is computed by each"
    for response in responses:
        check(model()[0], p, response)
    assert sorted(r.prompt_cache_hit_tokens for r in responses) == [0, *[whole_pages(199)] * 4]


def test_other_weights_reuse_nothing(sampler):
    p = tokens_of(60, seed=5)
    for seed in (1, 2):
        (response,) = run(sampler, ask(p, max_tokens=6, stop=[]), weights=next_weights(), tree=adapter(seed))
        assert response.prompt_cache_hit_tokens == 0
        check(merged(seed), p, response)


def test_changed_weights_reuse_nothing(sampler):
    name, p = next_weights(), tokens_of(60, seed=6)
    request = ask(p, max_tokens=6, stop=[])
    run(sampler, request, weights=name, tree=adapter(1))
    sampler.replace(name, adapter(2))
    (response,) = run(sampler, request, weights=name, tree=adapter(2))
    assert response.prompt_cache_hit_tokens == 0
    check(merged(2), p, response)
    assert run(sampler, request, weights=name, tree=adapter(2))[0].prompt_cache_hit_tokens == 48


@pytest.mark.parametrize(("last_n", "hits"), [(None, 0), (150, 48), (1, 192), (20, 176), (199, 0)])
def test_a_prompt_that_is_scored_reuses_only_what_lies_before_its_scores(sampler, last_n, hits):
    name, p = next_weights(), tokens_of(200, seed=7)
    run(sampler, ask(p, max_tokens=1), weights=name)
    request = ask(p, max_tokens=4, stop=[], prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=last_n)
    (response,) = run(sampler, request, weights=name)
    assert response.prompt_cache_hit_tokens == hits
    assert np.isfinite(response.prompt_logprobs_np).sum() == (last_n or 199)
    check(model()[0], p, response)


@pytest.mark.parametrize("length", [16, 17, 18, 30, 32, 33, 129])
def test_samples_fork_on_and_off_the_border_of_a_page(sampler, length):
    p = tokens_of(length, seed=8)
    (response,) = run(sampler, ask(p, 5, max_tokens=20, seed=3, stop=[], prompt_logprobs=True), weights=next_weights())
    assert len({tuple(s.tokens) for s in response.sequences}) == 5
    check(model()[0], p, response)


def test_samples_that_begin_after_others_ended_are_as_good(sampler):
    """Rows come one by one; by then the first sample has written into its copy of the prompt's last page."""
    p = tokens_of(40, seed=9)
    request = ask(p, 7, max_tokens=90, seed=4, stop=[])
    (response,) = run(small(), request, weights=next_weights())
    check(model()[0], p, response)
    same(response, run(sampler, request)[0])


def test_what_is_needed_pushes_the_oldest_of_what_is_only_remembered_out(sampler):
    name = next_weights()
    old, new = tokens_of(100, seed=10), tokens_of(100, seed=11)
    for p in (old, new):
        run(small(), ask(p, max_tokens=1), weights=name)
    run(small(), ask(tokens_of(250, seed=12), max_tokens=1), weights=next_weights())
    hits = {}
    for key, p in (("new", new), ("old", old)):
        (response,) = run(small(), ask(p, max_tokens=6, stop=[], seed=0), weights=name)
        hits[key] = response.prompt_cache_hit_tokens
        check(model()[0], p, response)
    assert hits == {"new": 96, "old": 32}  # 12 of 24 pages were free, 16 were needed


def test_a_failure_forgets_every_page(sampler, monkeypatch):
    name, p = next_weights(), tokens_of(60, seed=13)
    run(sampler, ask(p, max_tokens=1), weights=name)
    failing = submit(sampler, ask(p, max_tokens=1), name)
    sampler.fail(RuntimeError("lost"))
    assert failing.exception(0) is not None
    (response,) = run(sampler, ask(p, max_tokens=5, stop=[]), weights=name)
    assert response.prompt_cache_hit_tokens == 0
    check(model()[0], p, response)
    finish(sampler)
