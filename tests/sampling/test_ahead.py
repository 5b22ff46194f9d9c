"""A device that works through a chunk by itself is given the next one before the host reads the last."""

import jax
import pytest
from sampler_cases import FEW, adapter, ask, check, device_alone, finish, model, same, shared, submit, tokens_of

from tinker_jax.sampling.model_runner import STEPS


@pytest.fixture(scope="module")
def ahead():
    return device_alone()


def watch(monkeypatch, sampler):
    """Names of the runner's calls, in order."""
    calls = []
    for name in ("prefill", "decode", "read"):
        call = getattr(sampler._runner, name)
        monkeypatch.setattr(
            sampler._runner, name, lambda *args, name=name, call=call, **more: calls.append(name) or call(*args, **more)
        )
    return calls


def test_the_next_chunk_is_given_before_the_last_is_read_and_takes_the_same_program(ahead, monkeypatch, caplog):
    calls, request = watch(monkeypatch, ahead), ask(tokens_of(20), max_tokens=3 * STEPS + 2, seed=0, stop=[])
    with jax.log_compiles():
        (response,) = finish(ahead, submit(ahead, request))
    assert calls == ["prefill", "decode", "decode", "read", "decode", "read", "decode", "read", "read"]
    # Compiled once, by another thread, which does not log: this one had nothing to compile for the rows that came back.
    assert not [record for record in caplog.records if "decode_program" in record.message]
    check(model()[0], tokens_of(20), response)


def test_who_waits_comes_before_the_next_chunk(ahead, monkeypatch):
    first = submit(ahead, ask(tokens_of(20), max_tokens=5 * STEPS, seed=0, stop=[]))
    ahead.step()
    calls = watch(monkeypatch, ahead)
    second = submit(ahead, ask(tokens_of(30), max_tokens=5, seed=1, stop=[]))
    ahead.step()
    assert calls == ["prefill", "read"], "what was on its way is read, nothing goes ahead of the new sequence"
    ahead.step()
    assert calls[2] == "decode"
    for prompt, future in ((tokens_of(20), first), (tokens_of(30), second)):
        finish(ahead)
        check(model()[0], prompt, future.result(0))


def requests():
    """Sequences that end at their budget, by stop ids and by text that the host alone sees, at different moments."""
    stops = ([], None, "ab", ["c", "xyz"], [5, 9, 11], [])
    return [
        ask(
            tokens_of(5 + 37 * n),
            2,
            max_tokens=20 + 7 * n,
            seed=n,
            stop=stop,
            top_p=1 - n % 2 / 10,
            prompt_logprobs=True,
        )
        for n, stop in enumerate(stops)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="roomy", marks=pytest.mark.slow),  # few pages hold all of it, and sequences that wait
        pytest.param({"pages": FEW}, id="few pages"),
        pytest.param({"deterministic": True}, id="deterministic"),
    ],
)
def test_results_are_those_without(settings):
    expected = finish(plain := shared(**settings), *[submit(plain, request) for request in requests()])
    sampler, futures = device_alone(**settings), []
    for request in requests():
        futures.append(submit(sampler, request))
        sampler.step()
    for ours, theirs in zip(finish(sampler, *futures), expected, strict=True):
        same(ours, theirs)


def test_pages_of_a_cancelled_sequence_may_go_to_another_while_it_is_drawn():
    sampler = device_alone(pages=FEW)
    kept = submit(sampler, ask(tokens_of(40), max_tokens=100, seed=0, stop=[]))
    gone = submit(sampler, ask(tokens_of(41), max_tokens=200, seed=1, stop=[]))
    sampler.step()
    assert sampler._ahead is not None and len(sampler._ahead.places) == 2
    gone.cancel()
    long = submit(sampler, ask(tokens_of(300), max_tokens=20, seed=2, stop=[], prompt_logprobs=True))
    finish(sampler)
    check(model()[0], tokens_of(40), kept.result(0))
    check(model()[0], tokens_of(300), long.result(0))


def test_new_weights_under_way_reach_the_chunk_after_the_one_on_its_way(ahead):
    changed = submit(ahead, ask(tokens_of(20), max_tokens=4 * STEPS, temperature=0, stop=[]), "follower", adapter(1, 8))
    ahead.step()
    on_its_way = ahead._ahead.decoding.adapter
    ahead.replace("follower", adapter(2, 8))
    ahead.step()
    assert ahead._ahead is None
    ahead.step()
    assert ahead._ahead.decoding.adapter is not on_its_way
    finish(ahead)
    assert len(changed.result(0).sequences[0].tokens) == 4 * STEPS


def test_a_failure_of_a_chunk_fails_its_requests_and_no_later_one(ahead, monkeypatch):
    lost = submit(ahead, ask(tokens_of(20), max_tokens=4 * STEPS, seed=0, stop=[]))
    ahead.step()

    def fail(decoding):
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(ahead._runner, "read", fail)
        ahead.step()
    assert isinstance(lost.exception(0), Exception) and ahead._ahead is None
    (response,) = finish(ahead, submit(ahead, ask(tokens_of(20), max_tokens=4, seed=0, stop=[])))
    check(model()[0], tokens_of(20), response)
