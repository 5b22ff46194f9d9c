"""The sampler on several devices: rows in parts with pages of their own, heads cut."""

import pytest
from sampler_cases import (
    FEW,
    adapter,
    ask,
    assert_idle,
    check,
    finish,
    make,
    merged,
    model,
    next_weights,
    placed,
    run,
    same,
    shared,
    spy,
    submit,
    tokens_of,
    whole_pages,
)

from tinker_jax.kernels.decode_attention import PAGE

CUBE = (("data", 2), ("fsdp", 2), ("tensor", 2))
PARTS = 4


@pytest.fixture(scope="module")
def spread():
    return shared(mesh=CUBE, pages=64)


def test_eight_devices_draw_what_one_draws(spread):
    requests = [ask(tokens_of(n), 4, max_tokens=20, seed=n, stop=[], prompt_logprobs=True) for n in (3, 20, 130)]
    futures = []
    for name, reference in [("base", model()[0]), ("1", merged(1))]:
        tree = None if name == "base" else adapter(1)
        expected = run(shared(), *requests, weights=name, tree=tree)
        for request, response in zip(requests, expected, strict=True):
            futures.append((submit(spread, request, name, tree and placed(spread, tree)), request, response, reference))
    finish(spread)
    for future, request, response, reference in futures:
        same(future.result(0), response)
        check(reference, request.prompt.to_ints(), future.result(0))
    pool = spread._runner._pools[0].k
    assert pool.addressable_shards[0].data.shape[:2] == (pool.shape[0] // 4, 1)  # pages over 4, 2 key heads over 2


def test_a_prompt_goes_to_the_part_of_the_rows_that_knows_it(spread):
    name, prompts = next_weights(), [tokens_of(n, seed=7) for n in (PAGE + 1, 150, 200, 300)]
    requests = [ask(prompt, 2, max_tokens=5, seed=1, stop=[]) for prompt in prompts]
    fresh = run(spread, *requests, weights=name)
    assert {response.prompt_cache_hit_tokens for response in fresh} == {0}
    for request, prompt, response in zip(requests[::-1], prompts[::-1], fresh[::-1], strict=True):
        (again,) = run(spread, request, weights=name)
        assert again.prompt_cache_hit_tokens == whole_pages(len(prompt) - 1)
        same(again, response)
        check(model()[0], prompt, again)


def test_a_part_without_pages_is_no_reason_to_wait():
    tight = make(mesh=CUBE, pages=FEW)
    name, stem = next_weights(), tokens_of(PAGE + 1, seed=8)
    run(tight, ask(stem, max_tokens=1), weights=name)
    long = [[*stem, *tokens_of(4 * PAGE, seed=seed)] for seed in range(3)]  # the part that knows the stem has room for two
    futures = [submit(tight, ask(prompt, max_tokens=3, seed=1, stop=[]), name) for prompt in long]
    tight._admit()
    assert tight.running == 3 and tight.waiting == 0 and len({s.part for s in tight._scheduler.running}) == 2
    finish(tight)
    for prompt, future in zip(long, futures, strict=True):
        check(model()[0], prompt, future.result(0))


def test_sequences_that_lost_their_pages_go_on_in_any_part(monkeypatch):
    tight = make(mesh=CUBE, pages=FEW)
    preemptions = spy(monkeypatch, tight._scheduler, "preempt")
    prompts = [tokens_of(PAGE + n, seed=9) for n in range(6 * PARTS)]
    requests = [ask(prompt, max_tokens=200, seed=n, stop=[]) for n, prompt in enumerate(prompts)]
    responses = run(tight, *requests, weights=next_weights())
    assert len(preemptions) >= PARTS
    for prompt, response in zip(prompts, responses, strict=True):
        check(model()[0], prompt, response)


def test_deterministic_results_are_the_same_on_any_part_and_in_any_company():
    exact = make(mesh=CUBE, pages=64, deterministic=True)
    requests = [ask(tokens_of(n, seed=1), 2, max_tokens=20, seed=n, stop=[], prompt_logprobs=n == 70) for n in (1, 70, 200)]
    alone = [run(exact, request, weights=next_weights())[0] for request in requests]
    for cut in (1, 5, 11):
        name = next_weights()
        others = [submit(exact, ask(tokens_of(9 * n + 2), max_tokens=3 * n + 1, stop=[]), name) for n in range(cut)]
        exact.step()
        futures = [submit(exact, request, name) for request in requests[::-1]][::-1]
        finish(exact, *others)
        for future, response in zip(futures, alone, strict=True):
            same(future.result(0), response, atol=0)
    cached = run(exact, *requests, weights=name)
    assert cached[2].prompt_cache_hit_tokens == 3 * PAGE
    for response, expected in zip(cached, alone, strict=True):
        same(response, expected, atol=0)
    assert_idle(exact)
