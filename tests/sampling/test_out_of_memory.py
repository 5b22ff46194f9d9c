"""A device with too little memory while sampling: fewer rows at once, then a smaller cache; nobody fails for another's size."""

import itertools
import logging

import jax
import pytest
from sampler_cases import (
    CONTEXT,
    OUT_OF_MEMORY,
    adapter,
    ask,
    device_alone,
    failing,
    finish,
    make,
    next_weights,
    run,
    same,
    shared,
    submit,
    tokens_of,
)

from tinker_jax.sampling.page_pool import pages_for
from tinker_jax.types.errors import BadRequestError, RequestFailedError, UnprocessableEntityError

OFTEN = ("embedding", "layers", "draw", "adapter slots")
ONCE = (*OFTEN, "cache", "cache copy", "final norm", "prompt logprobs", "prompt top-k", "prompt alternatives")


def requests():
    """(request, weights' number): shared and scored prompts, several samples, two adapters and none."""
    scored = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_alt_tokens_k": 1}
    return [
        (ask(tokens_of(40), 3, max_tokens=40, seed=1, stop=[]), 0),
        (ask(tokens_of(200), max_tokens=5, seed=2, stop=[], **scored), 1),
        (ask(tokens_of(70), 2, max_tokens=30, seed=3, stop=[], top_k=9), 2),
        (ask(tokens_of(9), max_tokens=20, seed=4, stop=[]), 0),
    ]


def submit_all(sampler):
    names = [next_weights() for _ in range(3)]
    trees = [None, adapter(1), adapter(2, 16)]
    return [submit(sampler, request, names[i], trees[i]) for request, i in requests()]


@pytest.fixture(scope="module")
def calm():
    return finish(shared(), *submit_all(shared()))


@pytest.fixture
def sampler(monkeypatch):
    return frugal(shared(), monkeypatch)


@pytest.fixture(scope="module")
def accelerator():
    return device_alone()


@pytest.fixture
def on_device(accelerator, monkeypatch):
    return frugal(accelerator, monkeypatch)


def frugal(sampler, monkeypatch):
    """With sizes whose halves compile little; what it learns about its device is forgotten after the test."""
    for owner, name, value in (
        (sampler, "_rows", [8, 16]),
        (sampler, "_chunks", {64: [4, 8]}),
        (sampler._scheduler, "most_rows", 16),
    ):
        monkeypatch.setattr(owner, name, value)
    return sampler


def pool_pages(sampler):
    """Of each layer, as they are on the device."""
    return sampler._runner._pages[0].k.shape[0] // sampler._cfg.L


@pytest.mark.parametrize(("name", "calls"), [*((name, {0}) for name in ONCE), *((name, {1}) for name in OFTEN)])
def test_whatever_program_finds_no_room_every_result_is_what_it_would_have_been(sampler, calm, monkeypatch, name, calls):
    sampler._runner.release()  # the cache is made again
    with monkeypatch.context() as patch:
        count = failing(patch, name, calls)
        responses = finish(sampler, *submit_all(sampler))
    assert count[0] > max(calls)
    for response, expected in zip(responses, calm, strict=True):
        same(response, expected)


@pytest.mark.parametrize(("name", "calls"), [("prefill", {0}), ("decode", {0}), ("decode", {1}), ("decode", {2})])
def test_a_program_over_the_whole_model_that_finds_no_room_changes_no_result(on_device, calm, monkeypatch, name, calls):
    on_device._runner.release()
    with monkeypatch.context() as patch:
        count = failing(patch, name, calls)
        responses = finish(on_device, *submit_all(on_device))
    assert count[0] > max(calls)
    for response, expected in zip(responses, calm, strict=True):
        same(response, expected)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_room_that_is_missed_when_a_chunk_is_read_changes_no_result(on_device, calm, monkeypatch, at):
    read, count = on_device._runner.read, itertools.count()

    def fail(decoding):
        if next(count) == at:
            raise OUT_OF_MEMORY
        return read(decoding)

    with monkeypatch.context() as patch:
        patch.setattr(on_device._runner, "read", fail)
        responses = finish(on_device, *submit_all(on_device))
    assert next(count) > at
    for response, expected in zip(responses, calm, strict=True):
        same(response, expected)


def test_rows_and_prompt_tokens_are_halved_before_the_cache_is(calm, monkeypatch, caplog):
    sampler, (request, _) = make(pages=64), requests()[0]
    sampler._rows, sampler._chunks = [1, 4, 8], {64: [1, 4, 8], 256: [1]}
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="tinker_jax"):
        failing(patch, "draw", set(range(3)))
        (response,) = run(sampler, request)
    same(response, calm[0])
    told = [record.getMessage().partition("at most ")[2] for record in caplog.records]
    assert [line.rpartition(" at once")[0] for line in told] == [
        *("4 rows and 256 prompt tokens", "1 rows and 64 prompt tokens", "1 rows and 64 prompt tokens"),
    ]
    assert sampler._pages == 32 and pool_pages(sampler) == 33


def test_what_no_longer_fits_is_refused_with_the_numbers_and_the_others_go_on(monkeypatch):
    sampler = make(pages=pages_for(CONTEXT))
    small = ask(tokens_of(9), max_tokens=20, seed=4, stop=[])
    (expected,) = run(sampler, small)
    monkeypatch.setattr(sampler, "_rows", [1])
    monkeypatch.setattr(sampler, "_chunks", {64: [1]})
    with monkeypatch.context() as patch:
        failing(patch, "layers", {0})
        large, other = submit(sampler, ask(tokens_of(300), max_tokens=9), next_weights()), submit(sampler, small)
        while sampler.step():
            pass
    with pytest.raises(UnprocessableEntityError, match=r"A prompt of 300 tokens with max_tokens=9 needs .* but the engine has"):
        large.result(0)
    same(other.result(0), expected)
    with pytest.raises(BadRequestError, match=r"needs .* bytes of key/value cache"):
        sampler.parse(ask(tokens_of(300), max_tokens=9))


def test_when_nothing_is_left_to_save_requests_fail_and_the_sampler_stays_usable(sampler, monkeypatch):
    sampler = make(pages=4)
    sampler._rows, sampler._chunks = [1], {64: [1]}
    with monkeypatch.context() as patch:
        failing(patch, "layers", range(10**6))
        futures = [submit(sampler, ask(tokens_of(9), max_tokens=20), next_weights()) for _ in range(2)]
        for _ in range(100):
            if not sampler.step():
                break
    assert not sampler.running and not sampler.waiting
    for future in futures:
        assert isinstance(future.exception(0), (RequestFailedError, UnprocessableEntityError))
    assert run(sampler, ask(tokens_of(3), max_tokens=2, stop=[]))[0].sequences[0].tokens


def test_a_cache_that_does_not_fit_when_the_model_loads_is_made_smaller(monkeypatch):
    sampler = make(pages=64)
    with monkeypatch.context() as patch:
        failing(patch, "cache", {0, 1})
        sampler.allocate()
    assert sampler._pages == 16 and sampler.cache_bytes == 17 * sampler._page_bytes
    assert pool_pages(sampler) == 17
    assert sampler._runner._pools is not None and sampler._rows[-1] == 256
    assert run(sampler, ask(tokens_of(3), max_tokens=2, stop=[]))[0].sequences[0].tokens
    with monkeypatch.context() as patch, pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        sampler._runner.release()
        failing(patch, "cache", range(100))
        sampler.allocate()


def test_samples_of_a_prompt_copy_its_last_page_in_a_smaller_cache_too(calm, monkeypatch):
    sampler, (request, _) = make(pages=64), requests()[0]
    run(sampler, ask(tokens_of(9), max_tokens=2, stop=[]))
    sampler._rows, sampler._chunks = [4], {64: [1]}
    with monkeypatch.context() as patch:
        failing(patch, "cache copy", {0})
        (response,) = run(sampler, request)
    assert pool_pages(sampler) == 33
    same(response, calm[0])
