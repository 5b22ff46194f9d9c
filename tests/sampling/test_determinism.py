"""`deterministic=True`: a seeded request is the same bit for bit, whatever runs beside it. See also `engine/`."""

import numpy as np
import pytest
from sampler_cases import (
    FEW,
    adapter,
    ask,
    assert_idle,
    check,
    finish,
    model,
    next_weights,
    run,
    same,
    shared,
    spy,
    submit,
    tokens_of,
)

from tinker_jax.kernels.decode_attention import PAGE

REQUESTS = {  # by name: lengths at and beyond the borders of pages, chunks, blocks
    "short": ask(tokens_of(1, seed=1), 2, max_tokens=30, seed=1, stop=[]),
    "page": ask(tokens_of(17, seed=1), 2, max_tokens=40, seed=2, stop=[], temperature=0.7, top_k=20, top_p=0.9),
    "chunk": ask(tokens_of(100, seed=1), 1, max_tokens=60, seed=3, stop=[], prompt_logprobs=True),
    "block": ask(tokens_of(250, seed=1), 3, max_tokens=20, seed=4, stop=[]),
}


@pytest.fixture(scope="module")
def exact():
    return shared(deterministic=True)


@pytest.fixture(scope="module")
def alone(exact):
    return {name: run(exact, request, weights=next_weights())[0] for name, request in REQUESTS.items()}


@pytest.fixture(autouse=True)
def idle(exact):
    yield
    assert_idle(exact)


def others(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        ask(
            tokens_of(int(rng.integers(1, 300)), seed=100 + i),
            max_tokens=int(rng.integers(1, 60)),
            temperature=float(rng.uniform(0, 2)),
            top_p=float(rng.uniform(0.2, 1)),
            stop=[],
        )
        for i in range(n)
    ]


def test_alone_is_what_the_model_says(alone):
    for name, request in REQUESTS.items():
        if request.sampling_params.temperature == 1:
            check(model()[0], request.prompt.to_ints(), alone[name])


@pytest.mark.parametrize("length", [1, PAGE + 1, 2 * PAGE + 9])
def test_with_its_prompt_cached_wholly_or_in_part(exact, alone, length):
    """`length` tokens of each prompt, and an answer to them, were computed before."""
    weights = next_weights()
    run(exact, *(ask(r.prompt.to_ints()[:length], max_tokens=20, stop=[]) for r in REQUESTS.values()), weights=weights)
    for _ in range(2):
        for name, request in REQUESTS.items():
            same(run(exact, request, weights=weights)[0], alone[name], atol=0)


def test_after_a_turn_whose_answer_it_repeats(exact):
    """An answer is computed anew as part of the next prompt: decoding rounds another way than a prefill."""
    prompt = tokens_of(PAGE + 8, seed=5)
    first = run(exact, ask(prompt, max_tokens=2 * PAGE, seed=1, stop=[]), weights="one")[0].sequences[0].tokens
    turn = ask([*prompt, *first, 7, 8], max_tokens=20, seed=2, stop=[])
    cached, fresh = run(exact, turn, weights="one")[0], run(exact, turn, weights="two")[0]
    assert cached.prompt_cache_hit_tokens == PAGE and fresh.prompt_cache_hit_tokens == 0
    same(cached, fresh, atol=0)


def test_admitted_late(exact, alone):
    weights = next_weights()
    for other in others(20):
        submit(exact, other, weights)
    futures = {}
    for name, request in REQUESTS.items():
        exact.step()
        futures[name] = submit(exact, request, weights)
    finish(exact)
    for name, future in futures.items():
        same(future.result(0), alone[name], atol=0)


def test_with_other_adapters_present(exact, alone):
    weights = next_weights()
    expected = run(exact, REQUESTS["page"], weights=next_weights(), tree=adapter(1))[0]
    futures = {}
    for name, request in REQUESTS.items():
        submit(exact, others(1)[0], "other", adapter(2, 16))
        futures[name] = submit(exact, request, weights)
    adapted = submit(exact, REQUESTS["page"], next_weights(), adapter(1))
    finish(exact)
    for name, future in futures.items():
        same(future.result(0), alone[name], atol=0)
    same(adapted.result(0), expected, atol=0)


def test_while_it_waits_for_pages(alone, monkeypatch):
    """Nobody gives pages up: what decoding made would be computed anew by a prefill."""
    tight = shared(deterministic=True, pages=FEW)
    preemptions = spy(monkeypatch, tight._scheduler, "preempt")
    weights = next_weights()
    crowd = [submit(tight, other, weights) for other in others(12)]
    futures = {name: submit(tight, request, weights) for name, request in REQUESTS.items()}
    crowd += [submit(tight, other, weights) for other in others(6, seed=1)]
    tight.step()
    assert tight.waiting > 6
    finish(tight)
    assert not preemptions
    for name, future in futures.items():
        same(future.result(0), alone[name], atol=0)


def test_the_filters_are_always_in_the_program(monkeypatch):
    """Elsewhere a batch without them takes a program without them, which may round another way."""
    for sampler, plain in ((shared(deterministic=True), True), (shared(), False)):
        calls = spy(monkeypatch, sampler._runner, "decode")
        for settings, expected in (
            ({}, plain),
            ({"temperature": 0, "top_k": 3}, plain),
            ({"top_k": 3}, True),
            ({"top_p": 0.9}, True),
        ):
            calls.clear()
            run(sampler, ask([3, 4, 5], max_tokens=2, stop=[], **settings))
            assert {options.filters for _, _, options in calls} == {expected}
