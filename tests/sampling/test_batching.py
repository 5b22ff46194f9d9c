"""Continuous batching: what else runs changes no result; rows, pages and adapters are shared fairly and given back."""

import numpy as np
import pytest
from sampler_cases import (
    CONTEXT,
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
    run,
    same,
    shared,
    small,
    spy,
    submit,
    tokens_of,
)

from tinker_jax.kernels.decode_attention import PAGE
from tinker_jax.sampling import sampler as sampler_module
from tinker_jax.sampling.model_runner import STEPS
from tinker_jax.types.errors import InternalServerError, RequestFailedError

WIDE = (3, 16, ("attn",))  # seed, rank, groups of an adapter
NARROW = (4, 4, ("mlp", "unembed"))


@pytest.fixture(scope="module")
def sampler():
    return shared()


@pytest.fixture(autouse=True)
def idle(sampler):
    yield
    assert_idle(sampler)
    assert_idle(small())


# -- independence ----------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_tokens_alone_among_others_and_admitted_late(sampler):
    request = ask(tokens_of(11), 2, max_tokens=40, seed=42, stop=[])
    (alone,) = run(sampler, request)
    others = [ask(tokens_of(n), 1 + n % 3, max_tokens=10 + 3 * n, temperature=n % 3 / 2, top_k=n) for n in range(1, 14)]
    crowd = [submit(sampler, other) for other in others]
    among = submit(sampler, request)
    sampler.step()
    sampler.step()
    late = submit(sampler, request)
    finish(sampler, *crowd)
    same(alone, among.result(0))
    same(alone, late.result(0))


def test_filters_of_one_row_do_not_touch_another(sampler):
    request = ask(tokens_of(5), max_tokens=20, seed=8, stop=[])
    (alone,) = run(sampler, request)
    beside, _ = run(sampler, request, ask(tokens_of(6), max_tokens=20, top_k=2, top_p=0.5, stop=[]))
    same(alone, beside)


def test_samples_of_a_request_differ_and_unseeded_requests_too(sampler):
    a, b = run(sampler, *(ask(tokens_of(5), 8, max_tokens=12, stop=[]) for _ in range(2)))
    drawn = [tuple(s.tokens) for s in (*a.sequences, *b.sequences)]
    assert len(set(drawn)) == 16
    assert len({s.sequence_id for s in (*a.sequences, *b.sequences)}) == 16


def test_adapters_of_any_shape_and_the_base_model_decode_in_one_batch(sampler, monkeypatch):
    kinds = [("base", None, model()[0]), *((str(x), adapter(*x), merged(*x)) for x in (WIDE, NARROW))]
    draws = spy(monkeypatch, sampler._runner, "decode")
    prompts = [tokens_of(n) for n in (20, 65)]
    futures = [
        (submit(sampler, ask(p, 2, max_tokens=20, seed=1, stop=[], prompt_logprobs=True), name, tree), p, reference)
        for p in prompts
        for name, tree, reference in kinds
    ]
    finish(sampler)
    for future, p, reference in futures:
        check(reference, p, future.result(0))
    assert [int(rows.live.sum()) for _, rows, _ in draws] == [12, 12]  # 20 tokens are two chunks


# -- rows and pages --------------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_once_for_all_its_samples(sampler, monkeypatch):
    chunks = spy(monkeypatch, sampler._runner, "prefill")
    run(sampler, ask(tokens_of(30, seed=5), 40, max_tokens=3), weights=next_weights())
    ((_, rows, *_),) = chunks
    assert sum(row is not None for row in rows) == 1


def test_more_samples_than_pages_wait_and_draw_what_they_draw_side_by_side(sampler, monkeypatch):
    request = ask(tokens_of(30), 40, max_tokens=25, seed=6, stop=[])
    (expected,) = run(sampler, request)
    draws = spy(monkeypatch, small()._runner, "decode")
    same(expected, run(small(), request)[0])
    assert len(draws) > 4


def test_pages_are_reused_without_a_trace(sampler):
    """A dozen sequences fill the small pool several times over."""
    reference = model()[0]
    for n in (20, 200, 90, 17, 300, 64):
        p = tokens_of(n, seed=8)
        (response,) = run(small(), ask(p, 2, max_tokens=30, seed=n, stop=[], prompt_logprobs=True), weights=next_weights())
        check(reference, p, response)


def test_a_sequence_that_gave_its_pages_up_comes_back_to_where_it_was(sampler, monkeypatch):
    requests = [ask(tokens_of(40 + i), max_tokens=120, seed=i, stop=[], prompt_logprobs=True) for i in range(5)]
    preemptions = spy(monkeypatch, small()._scheduler, "preempt")
    responses = run(small(), *requests, weights=next_weights())
    preempted = [sequence.order for (sequence,) in preemptions]
    assert preempted and min(preempted) > 0, "the oldest never gives way"
    for i, (response, expected) in enumerate(zip(responses, run(sampler, *requests), strict=True)):
        same(response, expected)
        check(model()[0], tokens_of(40 + i), response)


def test_requests_begin_in_order_when_pages_are_short(sampler, monkeypatch):
    requests = [ask(tokens_of(1 + 17 * i), 1 + i % 5, max_tokens=20, seed=i) for i in range(12)]
    expected = run(sampler, *requests)
    joins = spy(monkeypatch, small()._scheduler.slots, "join")
    names = [next_weights() for _ in requests]
    futures = [submit(small(), request, name) for request, name in zip(requests, names, strict=True)]
    small().step()
    assert small().waiting > 3
    for a, b in zip(expected, finish(small(), *futures), strict=True):
        same(a, b)
    assert list(dict.fromkeys(name for name, _ in joins)) == names


def test_a_long_prompt_holds_nobody_up(sampler, monkeypatch):
    """Rows decode between the calls of a prefill that takes several."""
    monkeypatch.setattr(sampler, "_chunks", {64: [1]})
    monkeypatch.setattr(sampler_module, "_MOST_PREFILLS", 2)
    short = submit(sampler, ask(tokens_of(5), 2, max_tokens=3 * STEPS, stop=[]))
    sampler.step()
    long = submit(sampler, ask(tokens_of(320, seed=9), max_tokens=2, stop=[]), next_weights())
    calls = spy(monkeypatch, sampler._runner, "prefill")
    steps = 0
    while not short.done():
        sampler.step()
        steps += 1
    assert steps == 2 and len(calls) == 4 and not long.done()
    finish(sampler, long)


def test_of_w_prompts_that_wait_each_has_a_chunk_in_any_w_calls(sampler, monkeypatch):
    rng, real, calls = np.random.default_rng(0), sampler._prefill, []
    monkeypatch.setattr(sampler_module, "_MOST_PREFILLS", 1)

    def record(unready):
        before = {sequence: sequence.computed for sequence in unready}
        real(unready)
        calls.append({sequence: sequence.computed > computed for sequence, computed in before.items()})

    monkeypatch.setattr(sampler, "_prefill", record)
    futures, lengths = [], rng.permutation([320, 310, 300, 290, 280, *rng.integers(2, 80, 25).tolist()]).tolist()
    while lengths or sampler.running or sampler.waiting:
        for _ in range(min(len(lengths), rng.integers(0, 4))):
            futures.append(submit(sampler, ask(tokens_of(lengths.pop()), max_tokens=3, stop=[]), next_weights()))
        sampler.step()
    assert all(len(future.result(0).sequences[0].tokens) == 3 for future in futures)
    waited, most = {}, {}
    for call in calls:
        for sequence, served in call.items():
            most[sequence] = max(most.get(sequence, 0), len(call))
            waited[sequence] = waited.get(sequence, 0) + 1
            assert waited[sequence] <= most[sequence]
            if served:
                waited[sequence] = most[sequence] = 0
    assert len(waited) == 30


def test_the_first_that_finds_no_room_is_not_overtaken(sampler):
    first = submit(small(), ask(tokens_of(CONTEXT - 30), max_tokens=30, stop=[], seed=0))
    second = submit(small(), ask(tokens_of(CONTEXT - 31), max_tokens=30, stop=[], seed=0))
    small().step()
    assert small().running == 2
    large = submit(small(), ask(tokens_of(CONTEXT - 32), max_tokens=2, stop=[], seed=0))
    little = submit(small(), ask(tokens_of(3), max_tokens=2, stop=[], seed=0))
    small().step()
    assert first.done() and second.done() and not large.done() and not little.done()
    finish(small(), large, little)


def test_an_idle_sampler_holds_no_page_and_keeps_what_it_computed(sampler):
    name, p = next_weights(), tokens_of(2 * PAGE + 9)
    run(sampler, ask(p, max_tokens=2), weights=name)
    assert_idle(sampler)
    assert run(sampler, ask(p, max_tokens=2), weights=name)[0].prompt_cache_hit_tokens == 2 * PAGE


# -- cancellation ----------------------------------------------------------------------------------------------------


def test_cancelling_frees_rows_at_the_next_step(sampler):
    stays = submit(sampler, ask(tokens_of(5), max_tokens=60, stop=[]))
    goes = submit(sampler, ask(tokens_of(6), 3, max_tokens=140, stop=[]))
    sampler.step()
    assert sampler.running == 4
    never = submit(sampler, ask(tokens_of(7), 300, max_tokens=60))
    assert goes.cancel() and never.cancel()
    sampler.step()
    assert sampler.running == 1 and sampler.waiting == 0
    finish(sampler, stays)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))])
def test_random_cancellation_leaks_nothing_and_disturbs_no_neighbour(sampler, seed):
    """Few pages, several adapters, more samples than fit, cancelled at any moment."""
    rng = np.random.default_rng(seed)
    trees = {"base": None, "1": adapter(1), "2": adapter(2)}
    lengths = {1: 130, 14: 20, 33: 110, 97: 60}

    def request(length, samples):
        return ask(tokens_of(length), samples, max_tokens=lengths[length], seed=length, stop=[])

    futures = {(w, n): submit(sampler, request(n, 5), w, tree) for w, tree in trees.items() for n in lengths}
    finish(sampler)
    whole = {key: [s.tokens for s in future.result(0).sequences] for key, future in futures.items()}
    open_requests, finished, cancelled, preempted = [], 0, 0, 0
    for _ in range(120):
        if len(open_requests) < 8:
            key = list(whole)[rng.integers(len(whole))]
            samples = int(rng.integers(1, 6))
            open_requests.append((submit(small(), request(key[1], samples), key[0], trees[key[0]]), key, samples))
        if rng.random() < 0.2:
            open_requests[rng.integers(len(open_requests))][0].cancel()
        small().step()
        preempted += bool(small()._scheduler.preempted)
        at_work = [sequence.group for sequence in (*small()._scheduler.running, *small()._scheduler.preempted)]
        for group in set(at_work):
            assert at_work.count(group) + len(group.done) + group.pending == group.request.num_samples
        for item in [item for item in open_requests if item[0].done()]:
            open_requests.remove(item)
            future, key, samples = item
            cancelled += future.cancelled()
            if not future.cancelled():
                finished += 1
                assert [s.tokens for s in future.result().sequences] == whole[key][:samples]
    finish(small())
    assert all(future.done() for future, *_ in open_requests)
    assert finished > 15 and cancelled > 10 and preempted > 3


# -- failure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_a_failing_program_fails_what_it_served_and_the_others_come_back(sampler, monkeypatch, program):
    """At the failure one request decodes, another is in the middle of its prompt, a third waits."""
    monkeypatch.setattr(sampler, "_chunks", {64: [1]})
    monkeypatch.setattr(sampler_module, "_MOST_PREFILLS", 1)
    requests = [
        ask(tokens_of(5), 4, max_tokens=60, stop=[], seed=3),
        ask(tokens_of(200, seed=3), max_tokens=4, stop=[], seed=4, prompt_logprobs=True),
        ask(tokens_of(9), max_tokens=5, stop=[], seed=5),
    ]
    expected = run(sampler, *requests, weights=next_weights())
    name = next_weights()
    decoding = submit(sampler, requests[0], name)
    sampler.step()
    filling = submit(sampler, requests[1], name)
    sampler.step()
    waiting = submit(sampler, requests[2], name)
    with monkeypatch.context() as patch:

        def explode(*_, **__):
            patch.undo()
            raise RuntimeError("out of device memory")

        patch.setattr(sampler._runner, program, explode)
        sampler.step()
    finish(sampler)
    failed = decoding if program == "decode" else filling
    for future, response in zip((decoding, filling, waiting), expected, strict=True):
        if future is not failed:
            same(future.result(0), response)
    with pytest.raises(RequestFailedError, match="sampling failed: RuntimeError: out of device memory") as caught:
        failed.result(0)
    assert caught.value.category == "server" and isinstance(caught.value.__cause__, RuntimeError)


def test_an_adapter_that_is_not_finite_fails_its_own_requests(sampler):
    import jax

    broken = jax.tree.map(lambda x: x * np.float32(np.nan), adapter(1))
    good = ask(tokens_of(5), max_tokens=25, stop=[], seed=2)
    expected = run(sampler, good)[0]
    futures = [submit(sampler, good), submit(sampler, ask(tokens_of(5), 2, max_tokens=5), "broken", broken)]
    futures.append(submit(sampler, good, "1", adapter(1)))
    finish(sampler)
    same(futures[0].result(0), expected)
    check(merged(1), tokens_of(5), futures[2].result(0))
    with pytest.raises(InternalServerError, match="logits that are not finite"):
        futures[1].result(0)


def test_a_tokenizer_that_fails_fails_its_request(sampler, monkeypatch):
    def fail(tokens):
        raise KeyError("no such token")

    monkeypatch.setattr(sampler, "_decode_text", fail)
    bad = submit(sampler, ask(tokens_of(5), 3, stop="x", max_tokens=20))
    good = submit(sampler, ask(tokens_of(6), max_tokens=20, stop=[]))
    finish(sampler, good)
    assert isinstance(bad.exception(0), RequestFailedError)


def test_closing_cancels_what_waits_and_what_runs():
    closed = make(pages=FEW)
    futures = [submit(closed, ask(tokens_of(200), max_tokens=100, stop=[])) for _ in range(3)]
    closed.step()
    closed.close()
    assert all(future.cancelled() for future in futures)
    assert_idle(closed)
