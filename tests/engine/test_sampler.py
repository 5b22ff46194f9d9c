"""The sampler: parity, independence of what else runs, stops, limits, failures."""

import dataclasses
from concurrent.futures import Future
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from tinker_jax import lora, sharding
from tinker_jax.engine.sampler import Sampler
from tinker_jax.models.weights import lora_targets, weights
from tinker_jax.types import ModelInput, SampleRequest, SamplingParams, TensorData
from tinker_jax.types.errors import BadRequestError, InternalServerError, RequestFailedError, UnsupportedError

CONTEXT = 160  # no power of two: the last bucket is a shorter one
EOS = 1


def text(tokens):
    """One character for each token; the first are letters."""
    return "".join(chr(ord("a") + token) for token in tokens)


@cache
def model(family="qwen3"):
    reference = tiny.model(family)
    cfg, params = tiny.base_params(family, reference)
    return reference, dataclasses.replace(cfg, context_length=CONTEXT), params


def make(family="qwen3", *, mesh=None, kv_bytes=1 << 26, **change):
    _, cfg, params = model(family)
    cfg = dataclasses.replace(cfg, **change)
    mesh = sharding.make_mesh(mesh)
    placed = {w.name: jax.device_put(params[w.name], sharding.named(mesh, w.full_axes)) for w in weights(cfg)}
    return Sampler(cfg, placed, mesh=mesh, dtype=jnp.float32, kv_bytes=kv_bytes, stop_ids=[EOS], decode_text=text)


@pytest.fixture(scope="module")
def sampler():
    """Shared, so that its programs compile once; every test leaves it idle."""
    return make()


@pytest.fixture(autouse=True)
def idle(sampler):
    yield
    assert sampler.live_rows == sampler.waiting == 0


@cache
def adapter(seed, rank=4):
    """A scaled adapter on every group, far from zero."""
    _, cfg, _ = model()
    tree = lora.init(jax.random.key(seed), lora_targets(cfg), rank, ("attn", "mlp", "unembed"))
    leaves, shape = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(shape, [x + rng.normal(size=x.shape).astype(np.float32) * 0.1 for x in leaves])


def merged(seed):
    """The transformers model with the adapter folded in."""
    _, cfg, _ = model()
    other = tiny.model("qwen3")
    state = other.state_dict()
    tree = adapter(seed)
    for w in weights(cfg):
        if w.lora in ("attn", "mlp"):
            factors = tree["layers"][w.module]
            for layer in range(cfg.L):
                state[w.hf.format(layer=layer)] += torch.tensor(np.asarray(factors["a"][layer] @ factors["b"][layer]).T)
    state["lm_head.weight"] += torch.tensor(np.asarray(tree["lm_head"]["a"] @ tree["lm_head"]["b"]).T)
    other.load_state_dict(state)
    return other


def ask(prompt, num_samples=1, **kwargs):
    fields = {f.name for f in dataclasses.fields(SampleRequest)}
    params = SamplingParams(**{k: v for k, v in kwargs.items() if k not in fields})
    rest = {k: v for k, v in kwargs.items() if k in fields}
    return SampleRequest(prompt=ModelInput.from_ints(list(prompt)), num_samples=num_samples, sampling_params=params, **rest)


def submit(sampler, request, weights="base", tree=None):
    future = Future()
    sampler.submit(request, weights, tree, future)
    return future


def finish(sampler, *futures):
    for _ in range(2000):
        if not sampler.step():
            break
    else:
        raise AssertionError("the sampler does not come to rest")
    return [future.result(timeout=0) for future in futures]


def run(sampler, *requests, weights="base", tree=None):
    return finish(sampler, *(submit(sampler, request, weights, tree) for request in requests))


def prompt(length, seed=0):
    return np.random.default_rng([seed, length]).integers(2, tiny.VOCAB, length).tolist()


def reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor([list(tokens)])).logits[0].double()


def check_logprobs(reference, tokens, sequence, temperature=1.0, atol=1e-5):
    """The sequence's log-probabilities are those of the model, over the whole vocabulary, at the temperature."""
    logits = reference_logits(reference, [*tokens, *sequence.tokens[:-1]])[len(tokens) - 1 :]
    expected = torch.log_softmax(logits / temperature, -1).numpy()
    np.testing.assert_allclose(sequence.logprobs_np, expected[np.arange(len(sequence.tokens)), sequence.tokens], atol=atol)
    return expected


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_tokens_are_those_of_transformers_generate(family):
    reference = model(family)[0]
    sampler = make(family)
    prompts = [prompt(n) for n in (1, 2, 9, 15)]
    responses = run(sampler, *(ask(p, temperature=0, max_tokens=24, stop=[]) for p in prompts))
    for p, response in zip(prompts, responses, strict=True):
        generated = reference.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert response.sequences[0].tokens == generated[0, len(p) :].tolist()
        check_logprobs(reference, p, response.sequences[0])


def test_prompts_around_every_bucket_border_are_scored_and_continued_right_under_an_adapter(sampler):
    reference = merged(3)
    borders = [16, 32, 64, 128, CONTEXT]
    lengths = sorted({1, *(n + d for n in borders for d in (-1, 0, 1, 2))} - {CONTEXT + 1, CONTEXT + 2})
    asks = [ask(prompt(n), max_tokens=3, seed=n, stop=[], prompt_logprobs=True) for n in lengths]
    for n, response in zip(lengths, run(sampler, *asks, weights="3", tree=adapter(3)), strict=True):
        tokens = prompt(n)
        sequence = response.sequences[0]
        check_logprobs(reference, tokens, sequence)
        assert len(sequence.tokens) == min(3, CONTEXT - n + 1)
        expected = torch.log_softmax(reference_logits(reference, tokens), -1).numpy()
        assert np.isnan(response.prompt_logprobs_np[0])
        np.testing.assert_allclose(response.prompt_logprobs_np[1:], expected[np.arange(n - 1), tokens[1:]], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_logprobs_are_tempered_and_not_renormalised_over_the_filtered_set(sampler, temperature):
    p = prompt(7)
    (response,) = run(sampler, ask(p, temperature=temperature, top_k=5, top_p=0.7, max_tokens=20, seed=1, stop=[]))
    expected = check_logprobs(model()[0], p, response.sequences[0], temperature)
    ranks = (expected > response.sequences[0].logprobs_np[:, None] + 1e-5).sum(-1)
    assert ranks.max() < 5


def test_top_sample_logprobs_are_the_likeliest_tokens_at_the_temperature(sampler):
    p = prompt(6)
    (response,) = run(sampler, ask(p, temperature=0.7, max_tokens=18, seed=2, stop=[], topk_sample_logprobs=3))
    sequence = response.sequences[0]
    expected = check_logprobs(model()[0], p, sequence, 0.7)
    top = sequence.topk_logprobs_np
    assert top.token_ids.shape == top.logprobs.shape == (18, 3)
    np.testing.assert_array_equal(top.token_ids, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(top.logprobs, -np.sort(-expected, axis=1)[:, :3], atol=1e-5)


# -- the prompt's own numbers -----------------------------------------------------------------------------------------


def test_prompt_top_k_and_last_n(sampler):
    p = prompt(12)
    expected = torch.log_softmax(reference_logits(model()[0], p), -1).numpy()
    full, last = run(
        sampler,
        ask(p, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=4),
        ask(p, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=4, prompt_logprobs_last_n=3),
    )
    ids, values = full.topk_prompt_logprobs_np.token_ids, full.topk_prompt_logprobs_np.logprobs
    np.testing.assert_array_equal(ids[1:], np.argsort(-expected[:-1], axis=1)[:, :4])
    np.testing.assert_allclose(values[1:], -np.sort(-expected[:-1], axis=1)[:, :4], atol=1e-5)
    assert full.topk_prompt_logprobs[0] is None and full.prompt_logprobs[0] is None
    assert last.prompt_logprobs[:9] == [None] * 9 and last.topk_prompt_logprobs[:9] == [None] * 9
    assert last.prompt_logprobs[9:] == full.prompt_logprobs[9:]
    assert last.topk_prompt_logprobs[9:] == full.topk_prompt_logprobs[9:]


def test_a_prompt_of_one_token_has_nothing_to_score(sampler):
    targets = TensorData(np.zeros((0, 2), np.int64), "int64", shape=[0, 2])
    (response,) = run(
        sampler,
        ask([5], max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=2, target_prompt_logprobs=targets,
            prompt_alt_tokens_k=2),
    )  # fmt: skip
    assert response.prompt_logprobs == [None] and response.topk_prompt_logprobs == [None]
    assert response.target_prompt_logprobs.shape == [0, 2] and response.prompt_alt_tokens.tokens.shape == [0, 2]


def test_target_logprobs_come_back_in_the_layout_they_were_asked_in(sampler):
    p = prompt(6)
    expected = torch.log_softmax(reference_logits(model()[0], p), -1).numpy()
    ids = np.array([[3, -1], [4, 5], [-1, -1], [7, -1], [8, 9]])
    dense = TensorData(ids, "int64", shape=[5, 2])
    sparse = TensorData(np.array([3, -1, 9]), "int64", [5, 2], [0, 1, 1, 1, 1, 3], [0, 0, 1])
    a, b = run(
        sampler,
        ask(p, max_tokens=1, target_prompt_logprobs=dense),
        ask(p, max_tokens=1, target_prompt_logprobs=sparse, prompt_logprobs=True),
    )
    want = np.where(ids < 0, 0, np.take_along_axis(expected[:5], np.maximum(ids, 0), axis=1))
    np.testing.assert_allclose(a.target_prompt_logprobs.to_numpy(), want, atol=1e-5)
    got = b.target_prompt_logprobs
    assert (got.sparse_crow_indices, got.sparse_col_indices) == ([0, 1, 1, 1, 1, 3], [0, 0, 1])
    np.testing.assert_allclose(got.data, [expected[0, 3], 0, expected[4, 9]], atol=1e-5)
    np.testing.assert_allclose(b.prompt_logprobs_np[1:], expected[np.arange(5), p[1:]], atol=1e-5)


def test_alternative_tokens_are_drawn_at_the_temperature_and_scored_at_one(sampler):
    p, k = prompt(9), 64
    expected = torch.log_softmax(reference_logits(model()[0], p), -1).numpy()[:8]
    (response, again, greedy) = run(
        sampler,
        ask(p, max_tokens=1, prompt_alt_tokens_k=k, temperature=0.3, seed=5),
        ask(p, max_tokens=1, prompt_alt_tokens_k=k, temperature=0.3, seed=5),
        ask(p, max_tokens=1, prompt_alt_tokens_k=2, temperature=0),
    )
    tokens, logprobs = (x.to_numpy() for x in (response.prompt_alt_tokens.tokens, response.prompt_alt_tokens.logprobs))
    assert tokens.shape == (8, k) and tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, again.prompt_alt_tokens.tokens.to_numpy())
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, tokens, axis=1), atol=1e-5)
    tempered = np.exp(expected / 0.3 - np.logaddexp.reduce(expected / 0.3, axis=1, keepdims=True))
    for row in range(8):
        likely = tempered[row].argmax()
        share, p_likely = (tokens[row] == likely).mean(), tempered[row, likely]
        assert abs(share - p_likely) < 5 * np.sqrt(p_likely * (1 - p_likely) / k)
    np.testing.assert_array_equal(greedy.prompt_alt_tokens.tokens.to_numpy(), expected.argmax(1)[:, None].repeat(2, 1))


# -- independence ----------------------------------------------------------------------------------------------------


def same(a, b):
    assert [s.tokens for s in a.sequences] == [s.tokens for s in b.sequences]
    for x, y in zip(a.sequences, b.sequences, strict=True):
        np.testing.assert_allclose(x.logprobs_np, y.logprobs_np, atol=1e-5)


def test_a_seed_gives_the_same_tokens_alone_among_others_and_admitted_late(sampler):
    request = ask(prompt(11), 2, max_tokens=40, seed=42, stop=[])
    (alone,) = run(sampler, request)
    others = [ask(prompt(n), 1 + n % 3, max_tokens=10 + 3 * n, temperature=n % 3 / 2, top_k=n) for n in range(1, 14)]
    crowd = [submit(sampler, other) for other in others]
    among = submit(sampler, request)
    sampler.step()
    sampler.step()
    late = submit(sampler, request)
    finish(sampler, *crowd)
    same(alone, among.result(0))
    same(alone, late.result(0))


def test_filters_of_one_row_do_not_touch_another(sampler):
    request = ask(prompt(5), max_tokens=20, seed=8, stop=[])
    (alone,) = run(sampler, request)
    beside, _ = run(sampler, request, ask(prompt(6), max_tokens=20, top_k=2, top_p=0.5, stop=[]))
    same(alone, beside)


def test_samples_of_a_request_differ_and_unseeded_requests_too(sampler):
    a, b = run(sampler, *(ask(prompt(5), 8, max_tokens=12, stop=[]) for _ in range(2)))
    drawn = [tuple(s.tokens) for s in (*a.sequences, *b.sequences)]
    assert len(set(drawn)) == 16
    assert len({s.sequence_id for s in (*a.sequences, *b.sequences)}) == 16


def test_slots_of_ended_rows_are_reused_without_a_trace(sampler):
    request = ask(prompt(20), max_tokens=30, seed=4, stop=[])
    (fresh,) = run(sampler, request)
    long = submit(sampler, ask(prompt(90), 3, max_tokens=60, stop=[]))
    short = submit(sampler, ask(prompt(70), max_tokens=2, stop=[]))
    sampler.step()
    assert short.done() and not long.done()
    reused = submit(sampler, request)
    finish(sampler, long)
    same(fresh, reused.result(0))


def test_frequencies_follow_the_model(sampler):
    p, top_k, n = prompt(3), 6, 1024
    (response,) = run(sampler, ask(p, n, max_tokens=1, temperature=0.5, top_k=top_k, seed=0))
    logits = reference_logits(model()[0], p)[-1].numpy() / 0.5
    kept = np.argsort(-logits)[:top_k]
    expected = n * np.exp(logits[kept] - np.logaddexp.reduce(logits[kept]))
    counts = np.bincount([s.tokens[0] for s in response.sequences], minlength=tiny.VOCAB)
    assert counts[kept].sum() == n
    assert ((counts[kept] - expected) ** 2 / expected).sum() < (top_k - 1) + 4 * np.sqrt(2 * (top_k - 1))


# -- slots, memory, fairness -----------------------------------------------------------------------------------------


def token_bytes():
    cfg = model()[1]
    return 2 * cfg.L * cfg.K * cfg.H * 4


def count_prefills(sampler, monkeypatch):
    calls, prefill = [], sampler._batch.prefill
    monkeypatch.setattr(sampler._batch, "prefill", lambda *a: calls.append(a[0]) or prefill(*a))
    return calls


def test_a_prompt_is_prefilled_once_even_when_its_samples_wait_for_slots(sampler, monkeypatch):
    request = ask(prompt(30), 11, max_tokens=25, seed=6)
    (expected,) = run(sampler, request)
    small = make(kv_bytes=(4 * 128 + 32) * token_bytes())
    calls = count_prefills(small, monkeypatch)
    future = submit(small, request)
    rows = set()
    while small.step():
        rows.add(small._batch.slots.shape.rows)
    assert rows == {4} and len(calls) == 1
    same(expected, future.result(0))


def test_requests_wait_in_order_when_the_cache_is_full_and_memory_is_never_exceeded(sampler):
    requests = [ask(prompt(1 + 7 * i), 1 + i % 5, max_tokens=20, seed=i) for i in range(12)]
    expected = run(sampler, *requests)
    small = make(kv_bytes=(8 * 128 + 128) * token_bytes())
    futures = [submit(small, request) for request in requests]
    order = []
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: order.append(i))
    while small.step():
        assert small._budget.bytes(small._batch.slots.shape) <= small._budget.limit
    for a, b in zip(expected, futures, strict=True):
        same(a, b.result(0))
    assert sum(abs(place - i) for place, i in enumerate(order)) <= len(order)


def test_a_cache_that_grows_while_rows_run_changes_nothing(sampler):
    requests = [ask(prompt(n), k, max_tokens=m, seed=n, stop=[]) for n, k, m in [(5, 1, 100), (9, 3, 90), (60, 12, 90)]]
    alone = [run(sampler, request)[0] for request in requests]
    futures = []
    for request in requests:
        futures.append(submit(sampler, request))
        sampler.step()
    for a, b in zip(alone, finish(sampler, *futures), strict=True):
        same(a, b)


def test_a_long_budget_starts_small_and_grows_with_the_answer():
    sampler = make(context_length=1024)
    future = submit(sampler, ask(prompt(200), max_tokens=None, temperature=0, stop=[]))
    capacities = []
    while sampler.step():
        capacities.append(sampler._batch.slots.shape.capacity)
    assert sorted(set(capacities)) == [256, 1024]
    (sequence,) = future.result(0).sequences
    assert len(sequence.tokens) == 1024 - 200 + 1 and sequence.stop_reason == "length"
    generated = model()[0].generate(
        torch.tensor([prompt(200)]), max_new_tokens=150, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert sequence.tokens[:150] == generated[0, 200:].tolist()


def test_requests_of_other_weights_take_turns_by_age(sampler):
    one, two = adapter(1), adapter(2)
    request = ask(prompt(8), max_tokens=40, seed=1, stop=[])
    expected = [run(sampler, request, weights=w, tree=t)[0] for w, t in [("1", one), ("2", two), ("base", None)]]
    first = submit(sampler, request, "1", one)
    sampler.step()
    other = submit(sampler, request, "2", two)
    base = submit(sampler, request)
    second = submit(sampler, request, "1", one)
    order = []
    for name, future in [("1", first), ("2", other), ("base", base), ("1 again", second)]:
        future.add_done_callback(lambda _, name=name: order.append(name))
    finish(sampler)
    assert order == ["1", "2", "base", "1 again"]
    for got, want in zip([first, other, base, second], [*expected, expected[0]], strict=True):
        same(got.result(0), want)


def test_alternating_weights_share_turns_instead_of_running_one_by_one(sampler):
    one = adapter(1)
    futures = [submit(sampler, ask(prompt(3 + i), max_tokens=4), *(("1", one) if i % 2 else ("base", None))) for i in range(8)]
    live = []
    while futures:
        sampler.step()
        live.append(sum(f.done() for f in futures))
        if all(f.done() for f in futures):
            break
    assert live == [4, 8]


def test_random_requests_compile_a_bounded_number_of_programs_and_log_each(caplog):
    caplog.set_level("INFO", "tinker_jax")
    sampler = make()
    rng = np.random.default_rng(0)

    def crowd():
        return [
            ask(prompt(int(rng.integers(1, 60))), int(rng.integers(1, 4)), max_tokens=int(rng.integers(1, 40)),
                temperature=float(rng.uniform(0, 2)), top_k=int(rng.integers(1, 50)), top_p=float(rng.uniform(0.1, 1)),
                stop=rng.integers(2, 300, rng.integers(0, 12)).tolist())
            for _ in range(40)
        ]  # fmt: skip

    run(sampler, *crowd())
    programs = sampler.programs
    assert programs <= 24
    for _ in range(2):
        run(sampler, *crowd())
    assert sampler.programs <= programs + 4
    assert sum("compiled " in record.message for record in caplog.records) == sampler.programs
    assert sampler._batch._decode._jit._cache_size() == sampler._batch._decode.count


def test_an_idle_sampler_keeps_no_cache(sampler):
    run(sampler, ask(prompt(4), max_tokens=2))
    assert sampler._batch._cache is None


# -- stops and budgets -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(sampler):
    """What greedy decoding says when nothing stops it."""
    (response,) = run(sampler, ask(prompt(10), temperature=0, max_tokens=40, stop=[]))
    sequence = response.sequences[0]
    assert EOS not in sequence.tokens and len(set(sequence.tokens)) > 8
    return sequence


def greedy(sampler, **kwargs):
    (response,) = run(sampler, ask(prompt(10), temperature=0, max_tokens=40, **kwargs))
    return response.sequences[0]


@pytest.mark.parametrize("extra", [0, 20], ids=["few ids", "more ids than the device checks"])
def test_a_stop_token_ends_the_sequence_and_belongs_to_it(sampler, free, extra):
    target = free.tokens[20]
    unused = [t for t in range(tiny.VOCAB) if t not in free.tokens][:extra]
    sequence = greedy(sampler, stop=[*unused, target])
    first = free.tokens.index(target)
    assert sequence.tokens == free.tokens[: first + 1] and sequence.stop_reason == "stop"
    np.testing.assert_allclose(sequence.logprobs_np, free.logprobs_np[: first + 1], atol=1e-5)


@pytest.mark.parametrize("form", [lambda s: s, lambda s: ["never there", s]], ids=["string", "list"])
def test_a_string_that_spans_tokens_ends_the_sequence_at_its_last_token(sampler, free, form):
    sequence = greedy(sampler, stop=form(text(free.tokens[18:21])))
    end = text(free.tokens).index(text(free.tokens[18:21])) + 3
    assert sequence.tokens == free.tokens[:end] and sequence.stop_reason == "stop"
    assert len(sequence.logprobs) == end


def test_none_stops_at_the_models_own_end_and_an_empty_list_does_not(free):
    _, cfg, params = model()
    ending = Sampler(
        cfg, params, mesh=sharding.make_mesh(), dtype=jnp.float32, kv_bytes=1 << 26, stop_ids=[free.tokens[5]], decode_text=text
    )  # fmt: skip
    first = free.tokens.index(free.tokens[5])
    assert greedy(ending).tokens == free.tokens[: first + 1]
    assert greedy(ending, stop=[]).tokens == free.tokens
    assert greedy(ending, stop=[free.tokens[0]]).tokens == free.tokens[:1]


def test_the_budget_ends_a_sequence_with_length(sampler, free):
    for n in (1, 15, 16, 17, 33):
        (response,) = run(sampler, ask(prompt(10), temperature=0, max_tokens=n, stop=[]))
        assert response.sequences[0].tokens == free.tokens[:n]
        assert response.sequences[0].stop_reason == "length"


@pytest.mark.parametrize("length", [1, 100, CONTEXT - 1, CONTEXT])
@pytest.mark.parametrize("max_tokens", [None, 10_000])
def test_without_a_budget_or_with_too_large_a_one_the_context_ends_it(sampler, length, max_tokens):
    (response,) = run(sampler, ask(prompt(length), max_tokens=max_tokens, stop=[]))
    assert len(response.sequences[0].tokens) == CONTEXT + 1 - length
    assert response.sequences[0].stop_reason == "length"


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: ask([]), "prompt: expected at least one token, got none"),
        (lambda: ask([3, 300]), "prompt: token 1 is 300, outside the model's vocabulary of 300"),
        (lambda: ask([-1]), "prompt: token 0 is -1, outside"),
        (lambda: ask(prompt(CONTEXT + 1)), f"prompt: {CONTEXT + 1} tokens exceed the model's context length of {CONTEXT}"),
        (lambda: ask([3], stop=[300]), r"stop\[0\]: token id 300 is outside the model's vocabulary of 300"),
        (lambda: ask([3], topk_sample_logprobs=301), "topk_sample_logprobs: expected at most 300 for this model, got 301"),
        (lambda: ask([3], topk_prompt_logprobs=301), "topk_prompt_logprobs: expected at most 300"),
        (lambda: ask([3], prompt_alt_tokens_k=1025), "prompt_alt_tokens_k: expected at most 1024"),
        (
            lambda: ask([3, 4], target_prompt_logprobs=TensorData(np.array([[2, 300]]), "int64", shape=[1, 2])),
            r"target_prompt_logprobs\[0, 1\]: expected a token id below 300, or -1 for nothing, got 300",
        ),
    ],
)
def test_bad_requests_are_refused_at_the_call_and_change_nothing(sampler, request_, message):
    with pytest.raises(BadRequestError, match=message):
        submit(sampler, request_())
    assert sampler.waiting == 0


def test_images_are_refused(sampler):
    image = {"type": "image", "data": b"x", "format": "png", "expected_tokens": 3}
    request = SampleRequest(prompt=ModelInput(chunks=[image]), sampling_params=SamplingParams())
    with pytest.raises(UnsupportedError, match=r"prompt.chunks\[0\] is ImageChunk, but qwen3 is a text model"):
        submit(sampler, request)


def test_a_request_that_never_fits_the_cache_is_refused_with_the_numbers():
    small = make(kv_bytes=160 * token_bytes())
    with pytest.raises(BadRequestError, match=r"A prompt of 50 tokens with max_tokens=100 needs [\d,]+ bytes .* engine has"):
        submit(small, ask(prompt(50), max_tokens=100))
    (response,) = run(small, ask(prompt(20), max_tokens=100, stop=[]))
    assert len(response.sequences[0].tokens) == 100


# -- cancellation and failure ----------------------------------------------------------------------------------------


def test_cancelling_frees_slots_at_the_next_step(sampler):
    stays = submit(sampler, ask(prompt(5), max_tokens=60, stop=[]))
    goes = submit(sampler, ask(prompt(6), 3, max_tokens=140, stop=[]))
    sampler.step()
    assert sampler.live_rows == 4
    never = submit(sampler, ask(prompt(7), 300, max_tokens=60))
    assert goes.cancel() and never.cancel()
    sampler.step()
    assert sampler.live_rows == 1 and sampler.waiting == 0
    finish(sampler, stays)


@pytest.mark.parametrize("seed", range(2))
def test_random_cancellation_leaks_no_slot_and_disturbs_no_neighbour(seed):
    """Small cache, several weights, requests larger than the cache, cancelled at any moment."""
    rng = np.random.default_rng(seed)
    busy = make(kv_bytes=9 * 2**17)
    trees = {"base": None, "one": adapter(1)}

    def request(weights, length, samples):
        return ask(prompt(length), samples, max_tokens=3 + 11 * (length % 4), seed=length, stop=[])

    whole = {
        (weights, length): [s.tokens for s in run(busy, request(weights, length, 20), weights=weights, tree=tree)[0].sequences]
        for weights, tree in trees.items()
        for length in (1, 14, 40)
    }
    open_jobs, finished, cancelled = [], 0, 0
    for _ in range(120):
        if len(open_jobs) < 8:
            weights, length = list(whole)[rng.integers(len(whole))]
            samples = int(rng.integers(1, 21))
            future = submit(busy, request(weights, length, samples), weights, trees[weights])
            open_jobs.append((future, weights, length, samples))
        if rng.random() < 0.3:
            open_jobs[rng.integers(len(open_jobs))][0].cancel()
        busy.step()
        owners = [busy._batch.slots.owner[slot] for slot in busy._batch.slots.live]
        for job in {id(job): job for job in owners}.values():
            assert owners.count(job) + len(job.done) + job.pending == job.ask.num_samples
        for item in [item for item in open_jobs if item[0].done()]:
            open_jobs.remove(item)
            future, weights, length, samples = item
            if future.cancelled():
                cancelled += 1
            else:
                finished += 1
                assert [s.tokens for s in future.result().sequences] == whole[weights, length][:samples]
    finish(busy)
    assert all(future.done() for future, *_ in open_jobs)
    assert busy.live_rows == busy.waiting == 0 and busy._batch._cache is None
    assert finished > 15 and cancelled > 10


def test_a_failing_decode_fails_what_it_served_and_nothing_else(sampler, monkeypatch):
    def explode(*_):
        raise RuntimeError("out of device memory")

    served = submit(sampler, ask(prompt(5), max_tokens=40, stop=[]))
    sampler.step()
    other = submit(sampler, ask(prompt(5), max_tokens=40, stop=[]), "1", adapter(1))
    with monkeypatch.context() as patch:
        patch.setattr(sampler._batch, "draw", explode)
        sampler.step()
    with pytest.raises(RequestFailedError, match="sampling failed: RuntimeError: out of device memory") as caught:
        served.result(0)
    assert caught.value.category == "server" and isinstance(caught.value.__cause__, RuntimeError)
    finish(sampler, other)


def test_a_failing_prefill_fails_its_own_requests_only(sampler, monkeypatch):
    running = submit(sampler, ask(prompt(5), max_tokens=40, stop=[], seed=3))
    sampler.step()
    prefill = sampler._batch.prefill

    def explode(prompts, B, T):
        if T > 16:
            raise RuntimeError("no room")
        return prefill(prompts, B, T)

    monkeypatch.setattr(sampler._batch, "prefill", explode)
    bad, good = submit(sampler, ask(prompt(60), 2, max_tokens=5)), submit(sampler, ask(prompt(9), max_tokens=5))
    (response, _) = finish(sampler, running, good)
    assert len(response.sequences[0].tokens) == 40
    assert isinstance(bad.exception(0), RequestFailedError)


def test_logits_that_are_not_finite_fail_the_request_and_not_its_neighbours(sampler):
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), adapter(1))
    bad = submit(sampler, ask(prompt(5), 2, max_tokens=5), "broken", broken)
    good = submit(sampler, ask(prompt(5), max_tokens=5, stop=[]))
    finish(sampler, good)
    with pytest.raises(InternalServerError, match="logits that are not finite"):
        bad.result(0)


def test_a_tokenizer_that_fails_fails_its_request(sampler, monkeypatch):
    def explode(tokens):
        raise KeyError("no such token")

    monkeypatch.setattr(sampler, "_decode_text", explode)
    bad, good = (
        submit(sampler, ask(prompt(5), stop="x", max_tokens=20)),
        submit(sampler, ask(prompt(6), max_tokens=20, stop=[])),
    )
    finish(sampler, good)
    assert isinstance(bad.exception(0), RequestFailedError)


# -- meshes ----------------------------------------------------------------------------------------------------------


def test_eight_devices_draw_what_one_draws(sampler):
    requests = [ask(prompt(n), 4, max_tokens=20, seed=n, stop=[], prompt_logprobs=True) for n in (3, 20)]
    expected = run(sampler, *requests)
    spread = make(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    futures = [submit(spread, request) for request in requests]
    spread.step()
    assert spread._batch._cache.k.addressable_shards[0].data.shape[1:3] == (2, 1)  # 8 rows over 4, 2 key heads over 2
    for a, b in zip(expected, finish(spread, *futures), strict=True):
        same(a, b)
        np.testing.assert_allclose(a.prompt_logprobs_np, b.prompt_logprobs_np, atol=1e-5)
